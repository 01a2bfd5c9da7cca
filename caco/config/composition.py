"""How the configuration is composed, and how a component is built from its part.

Imports neither torch nor a component, so that `--help` and every refusal come at once.
"""

import importlib
from collections.abc import Mapping
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from caco.config import folders
from caco.config.folders import CONF
from caco.config.schema import EmbedRoot, EvaluateRoot, ExportRoot, Root
from caco.errors import UserError
from caco.installed import is_installed
from caco.redaction import redacted
from caco.runs.identity import file_digest, run_name


def register() -> None:
    """Tell Hydra the schemas and OmegaConf the resolvers: a run's directory, what is in a file, what follows from other
    settings.
    """
    ConfigStore.instance().store("schema", Root)
    ConfigStore.instance().store("evaluate_schema", EvaluateRoot)
    ConfigStore.instance().store("export_schema", ExportRoot)
    ConfigStore.instance().store("embed_schema", EmbedRoot)
    ConfigStore.instance().store("of_the_run", {})  # caco/config/pretrained.py replaces it by what a run recorded
    ConfigStore.instance().store("bank_learning_taken_whole", bank_learning_taken_whole())
    ConfigStore.instance().store(
        "caco", {"_target_": "hydra_plugins.caco_launcher.SubmititLauncher"}, group="hydra/launcher"
    )
    OmegaConf.register_new_resolver("run_name", lambda *, _root_: run_name(_root_), replace=True)
    OmegaConf.register_new_resolver("file_digest", file_digest, replace=True)
    OmegaConf.register_new_resolver("config_dir", folders.config_dir, replace=True)
    OmegaConf.register_new_resolver("installed_tracking", installed_tracking, replace=True)
    OmegaConf.register_new_resolver("random_norms", random_norms, replace=True)


def bank_learning_taken_whole() -> dict[str, str]:
    """For conf/learned_bank.yaml: each setting of conf/config.yaml's bank_learning by its name, so that it is listed
    there alone.
    """
    names = OmegaConf.load(CONF / "config.yaml").bank_learning
    return {name: f"${{bank_learning.{name}}}" for name in names}


def installed_tracking() -> str:
    """The option of `tracking` where none is chosen: without MLflow the ledger alone, which can be sent to it later."""
    return "mlflow" if is_installed("mlflow") else "ledger"


def random_norms(initialisation: str, reading: str) -> str:
    """For conf/learned_bank.yaml: as published, rows that start at random and keep their norms have those of a plain
    normal law.
    """
    return "normal" if (initialisation, reading) == ("random", "code") else "unit"


register()


def compose(overrides: list[str], name: str = "config") -> DictConfig:
    """The configuration of a command line, with Hydra's own part under `hydra`.

    Args:
        name: of the root in conf/.
    Raises:
        UserError: a file is no YAML; names the file and the line.
        Hydra's and OmegaConf's own errors; caco.config.refusals.explain puts them in words.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose(name, list(overrides), return_hydra_config=True)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        raise UserError(f"{mark.name}, line {mark.line + 1}: {error.problem}" if mark else str(error)) from error
    except (HydraException, OmegaConfBaseException, ValueError):
        raise
    except OSError as error:
        name = redacted(str(error.filename or ""))
        shown = f": {name[:40]}...{name[-40:]}" if len(name) > 90 else f": {name}" if name else ""
        raise UserError(f"an option's name must be that of a file ({error.strerror}{shown})") from error
    except Exception as error:  # noqa: BLE001 - Hydra and OmegaConf raise what they like where a command line makes no sense to them
        raise UserError(
            "this command line cannot be composed:"
            f" {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def job_config(cfg: DictConfig) -> DictConfig:
    """cfg without Hydra's own part."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def instantiate(part: dict[str, Any] | DictConfig, **supplied: Any) -> Any:
    """Call a component's `_target_` with its other keys and what only the program can supply.

    Args:
        part: mapping with `_target_`, a dotted path; parts inside it that have one too are built first.
        supplied: arguments that no YAML holds, such as a module or parameters, or that come in place of what it holds.
    """
    arguments = (
        cast(dict[str, Any], OmegaConf.to_container(part, resolve=True)) if isinstance(part, DictConfig) else dict(part)
    )
    called = target({"_target_": arguments.pop("_target_")})
    arguments = {key: _build_inner(value) for key, value in arguments.items()}
    return called(**arguments | supplied)


def target(part: Mapping[str, Any] | DictConfig) -> Any:
    """What a component's `_target_` names: a class or a function, imported."""
    module, _, name = part["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def _build_inner(value: Any) -> Any:
    if isinstance(value, list):
        return [_build_inner(item) for item in value]
    if isinstance(value, dict):
        return instantiate(value) if "_target_" in value else {key: _build_inner(item) for key, item in value.items()}
    return value
