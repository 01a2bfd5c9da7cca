"""Composes the configuration of a command line, and builds a component from its part of the configuration.

Imports neither torch nor a component, so that `--help` and every refusal appear at once.
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
    """Register the schemas with Hydra and the resolvers with OmegaConf: a run's directory name, a file's digest, and
    values that follow from other settings.
    """
    ConfigStore.instance().store("schema", Root)
    ConfigStore.instance().store("evaluate_schema", EvaluateRoot)
    ConfigStore.instance().store("export_schema", ExportRoot)
    ConfigStore.instance().store("embed_schema", EmbedRoot)
    ConfigStore.instance().store("of_the_run", {})  # caco/config/pretrained.py replaces it by the recorded settings
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
    """For conf/learned_bank.yaml: maps every setting of bank_learning to a reference to its value, so that only
    conf/config.yaml lists these settings.
    """
    names = OmegaConf.load(CONF / "config.yaml").bank_learning
    return {name: f"${{bank_learning.{name}}}" for name in names}


def installed_tracking() -> str:
    """The default option of `tracking`: mlflow if MLflow is installed, else the ledger, which can be sent to it
    later.
    """
    return "mlflow" if is_installed("mlflow") else "ledger"


def random_norms(initialisation: str, reading: str) -> str:
    """For conf/learned_bank.yaml: the norms of the bank's first rows. Published code starts rows from a plain normal
    distribution; only random rows read as in that code (reading=code) keep those norms, all others have length 1.
    """
    return "normal" if (initialisation, reading) == ("random", "code") else "unit"


register()


def compose(overrides: list[str], name: str = "config") -> DictConfig:
    """The configuration of a command line, including Hydra's own settings under `hydra`.

    Args:
        name: the root configuration, a file of conf/ or one that is stored with Hydra.
    Raises:
        UserError: a file is not valid YAML; names the file and the line.
        Hydra's and OmegaConf's own errors, which caco.config.refusals.explain puts into words.
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
        raise UserError(f"an option's name must be a valid file name ({error.strerror}{shown})") from error
    except Exception as error:  # noqa: BLE001 - Hydra and OmegaConf raise many types for a senseless command line
        raise UserError(
            "this command line cannot be composed:"
            f" {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def job_config(cfg: DictConfig) -> DictConfig:
    """cfg without Hydra's own settings."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def instantiate(part: dict[str, Any] | DictConfig, **supplied: Any) -> Any:
    """Call a component's `_target_` with its other keys as arguments, and with arguments that only the program has.

    Args:
        part: mapping with `_target_`, a dotted path. Inner mappings with a `_target_` are built first.
        supplied: arguments that YAML cannot hold, such as a module or parameters. They also replace keys of `part`.
    """
    arguments = (
        cast(dict[str, Any], OmegaConf.to_container(part, resolve=True)) if isinstance(part, DictConfig) else dict(part)
    )
    called = target({"_target_": arguments.pop("_target_")})
    arguments = {key: _build_inner(value) for key, value in arguments.items()}
    return called(**arguments | supplied)


def target(part: Mapping[str, Any] | DictConfig) -> Any:
    """The class or function that a component's `_target_` names, imported."""
    module, _, name = part["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def _build_inner(value: Any) -> Any:
    if isinstance(value, list):
        return [_build_inner(item) for item in value]
    if isinstance(value, dict):
        return instantiate(value) if "_target_" in value else {key: _build_inner(item) for key, item in value.items()}
    return value
