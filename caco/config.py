"""The root of the configuration: its types, how it is composed, and how a component is built from its part.

Imports neither torch nor a component, so that `--help` and every refusal come at once.
"""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from caco.errors import UserError
from caco.installed import is_installed
from caco.runs import file_digest, run_name

# Beside the package in a checkout, inside it in a wheel (pyproject.toml maps the one to the other).
CONF = next(path for path in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if path.is_dir())


ConfigError = UserError  # another name for it, of before there was one class for all that a user did


@dataclass
class Schedule:
    warmup_epochs: float = MISSING
    final_fraction: float = MISSING
    unit: str = MISSING
    final_weight_decay: float | None = MISSING
    clip_gradient_norm: float | None = MISSING


@dataclass
class WarmStart:
    steps: int | None = MISSING
    passes: int | None = MISSING


@dataclass
class BankLearning:
    lr: float = MISSING
    lr_reference_batch: int | None = MISSING
    final_lr: float | None = MISSING
    push: float = MISSING
    reading: str = MISSING
    initialisation: str = MISSING
    filling_passes: int | None = MISSING


@dataclass
class Checkpoint:
    every_epochs: int = MISSING
    every_steps: int | None = MISSING
    keep: int = MISSING
    milestone_epochs: list[int] = MISSING


@dataclass
class Root:
    """Types only: the values and what they mean are in conf/config.yaml.

    A component (Any here) is checked against the signature of its `_target_` by caco/validation.py.
    """

    name: str = MISSING
    batch: int = MISSING
    epochs: int = MISSING
    max_steps: int | None = MISSING
    accumulate: int | None = MISSING
    seed: int = MISSING
    precision: str = MISSING
    compile: bool = MISSING
    device: str = MISSING
    weights: str | None = MISSING
    format: str | None = MISSING
    weights_digest: str | None = MISSING
    schedule: Schedule = field(default_factory=Schedule)
    warm_start: WarmStart = field(default_factory=WarmStart)
    bank_learning: BankLearning = field(default_factory=BankLearning)
    log_every_steps: int = MISSING
    eval_every_epochs: int = MISSING
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    profile: bool = MISSING
    anomaly: bool = MISSING
    method: Any = MISSING
    bank: Any = MISSING
    backbone: Any = MISSING
    projector: Any = MISSING
    optimizer: Any = MISSING
    augmentation: Any = MISSING
    data: Any = MISSING
    loader: Any = MISSING
    eval: dict[str, Any] = field(default_factory=dict)
    tracking: Any = MISSING
    launcher: Any = MISSING


@dataclass
class EvaluateRoot:
    """As Root, of conf/evaluate.yaml."""

    name: str = MISSING
    run: str | None = MISSING
    weights: str | None = MISSING
    format: str | None = MISSING
    weights_digest: str | None = MISSING
    to: str | None = MISSING
    cache: str | None = MISSING
    baselines: bool = MISSING
    overlap: str = MISSING
    seed: int = MISSING
    batch: int = MISSING
    precision: str = MISSING
    device: str = MISSING
    backbone: Any = MISSING
    augmentation: Any = MISSING
    data: Any = MISSING
    loader: Any = MISSING
    eval: dict[str, Any] = field(default_factory=dict)
    tracking: Any = MISSING


@dataclass
class ExportRoot:
    """As Root, of conf/export.yaml."""

    run: str | None = MISSING
    weights: str | None = MISSING
    format: str | None = MISSING
    weights_digest: str | None = MISSING
    to: str | None = MISSING
    layouts: list[str] = MISSING
    backbone: Any = MISSING
    augmentation: Any = MISSING


ROOTS = {"config": Root, "evaluate": EvaluateRoot, "export": ExportRoot}


def register() -> None:
    """Tell Hydra the schemas and OmegaConf the resolvers: a run's directory, and what is in a file."""
    ConfigStore.instance().store("schema", Root)
    ConfigStore.instance().store("evaluate_schema", EvaluateRoot)
    ConfigStore.instance().store("export_schema", ExportRoot)
    ConfigStore.instance().store("of_the_run", {})  # caco/pretrained.py replaces it by what a run recorded
    ConfigStore.instance().store("caco", {"_target_": "hydra_plugins.caco_launcher.SubmititLauncher"}, group="hydra/launcher")
    OmegaConf.register_new_resolver("run_name", lambda *, _root_: run_name(_root_), replace=True)
    OmegaConf.register_new_resolver("file_digest", file_digest, replace=True)
    OmegaConf.register_new_resolver("installed_tracking", installed_tracking, replace=True)


def installed_tracking() -> str:
    """The option of `tracking` where none is chosen: without MLflow the ledger alone, which can be sent to it later."""
    return "mlflow" if is_installed("mlflow") else "ledger"


register()


def compose(overrides: list[str], name: str = "config") -> DictConfig:
    """The configuration of a command line, with Hydra's own part under `hydra`.

    Args:
        name: of the root in conf/.
    Raises:
        Hydra's and OmegaConf's own errors; caco.refusals.explain puts them in words.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose(name, list(overrides), return_hydra_config=True)


def job_config(cfg: DictConfig) -> DictConfig:
    """cfg without Hydra's own part."""
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])


def build(part: dict[str, Any] | DictConfig, **supplied: Any) -> Any:
    """Call a component's `_target_` with its other keys and what only the program can supply.

    Args:
        part: mapping with `_target_`, a dotted path; parts inside it that have one too are built first.
        supplied: arguments that no YAML holds, such as a module or parameters.
    """
    arguments = OmegaConf.to_container(part, resolve=True) if isinstance(part, DictConfig) else dict(part)
    module, _, name = arguments.pop("_target_").rpartition(".")
    arguments = {key: _build_inner(value) for key, value in arguments.items()}
    return getattr(importlib.import_module(module), name)(**arguments, **supplied)


def _build_inner(value: Any) -> Any:
    if isinstance(value, list):
        return [_build_inner(item) for item in value]
    if isinstance(value, dict):
        return build(value) if "_target_" in value else {key: _build_inner(item) for key, item in value.items()}
    return value
