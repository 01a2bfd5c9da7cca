"""Finds what an evaluation or an export starts from: a run's checkpoint, or released weights. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from caco.config import components, composition, folders, refusals, schema, validation
from caco.errors import UserError
from caco.runs import renamed
from caco.runs.files import read_json
from caco.runs.paths import expanded

CHECKPOINT = re.compile(r"step_(\d{9})\.pt")
DEFAULTS_WITHOUT_A_RUN = {"augmentation": "caco", "loader": "auto"}


@dataclass(frozen=True)
class Location:
    """A run's directory, and the checkpoint file that was named (None: use the newest)."""

    run_dir: Path
    checkpoint: Path | None


def locate(run: str, key: str = "run") -> Location:
    """Find a run from its directory, one of its checkpoint files, or its MLflow run id (searched below runs/).

    Args:
        key: the setting that names the run, for messages.
    Raises:
        UserError: there is no such run; the message says what was expected.
    """
    path = expanded(run)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise UserError(f"{key}: expected a run's directory with a config.yaml, got {run}, which has none")
        if not checkpoints(path):
            raise UserError(
                f"{key}: expected checkpoints in {run}/checkpoints, got none: the run has not saved one yet"
            )
        return Location(path, None)
    if path.is_file():
        folders = [folder for folder in path.absolute().parents[:3] if (folder / "config.yaml").is_file()]
        if not CHECKPOINT.fullmatch(path.name) or not folders:
            raise UserError(
                f"{key}: expected a checkpoint file inside its run's directory (RUN/checkpoints/step_000001000.pt), got"
                f" {run}; for any other file: weights={run} format=... backbone=... data=..."
            )
        return Location(folders[0], path)
    if re.fullmatch(r"[0-9a-f]{32}", run):
        for mark in sorted(Path("runs").glob("**/mlflow.json")):
            if read_json(mark).get("run_id") == run:
                return locate(str(mark.parent), key)
        raise UserError(
            f"{key}: no run below {Path('runs').absolute()} has the MLflow run id {run}; expected a run's directory,"
            f" {key}=DIRECTORY"
        )
    raise UserError(
        f"{key}: expected a run's directory, a checkpoint file or an MLflow run id, got {run}, which does not exist"
    )


def checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoint files, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").rglob("step_*.pt") if CHECKPOINT.fullmatch(path.name))


def compose(name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration conf/<name>.yaml of a command line, completed by what the run recorded.

    The user's own folder that the run recorded is searched for options and components from then on.

    Args:
        name: "evaluate", "export" or "embed".
    Raises:
        UserError: one line per problem.
    """
    refusals.refuse_unwritable(overrides)
    try:
        chosen = _chosen(overrides)
        of_the_run: dict[str, Any] = {}
        extra: list[str] = []
        own = schema.ROOTS[name].__dataclass_fields__
        if chosen.get("run") not in (None, "null"):
            of_the_run = _recorded(locate(chosen["run"]).run_dir, schema.ROOTS[name], chosen)
            if components.missing_package(of_the_run.get("tracking", {})) is not None:
                del of_the_run["tracking"]  # the run comes from another machine, and its tracker is not installed here
        else:
            groups = {group: option for group, option in DEFAULTS_WITHOUT_A_RUN.items() if group not in chosen}
            extra = [f"{group}={option}" for group, option in groups.items() if group in own]
        if "tracking" in own and "tracking" not in of_the_run and "tracking" not in chosen:
            extra.append(f"tracking={composition.installed_tracking()}")
        # Stored as a config that comes before the groups, so that the command line overrides what the run recorded.
        ConfigStore.instance().store("of_the_run", of_the_run)
        cfg = composition.compose([*extra, *overrides], name)
        validation.check(composition.job_config(cfg), overrides=overrides, root=schema.ROOTS[name])
        return composition.job_config(cfg)
    except (*refusals.COMPOSITION_ERRORS, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(refusals.explain(error, overrides, name)) from error


def _chosen(overrides: Sequence[str]) -> dict[str, Any]:
    """key -> value of each override, parsed by Hydra's grammar."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if any(item.is_sweep_override() for item in parsed):
        raise UserError("expected one value for each key, got several: evaluate one run at a time")
    return {item.key_or_group: str(item.value()) for item in parsed}


def _recorded(run_dir: Path, root: schema.AnyRoot, chosen: dict[str, Any]) -> dict[str, Any]:
    """The parts of a run's configuration that this root has too and that the command line does not set."""
    tree = renamed.read_config(run_dir)
    folders.use_recorded(tree.get("config_dir"))
    # The batch size of an evaluation while training, so that features, and the results computed from them, are
    # identical.
    tree["batch"] = max(1, min(tree["batch"], 512))
    taken = ("name", "backbone", "augmentation", "data", "loader", "tracking", "precision", "device", "seed", "batch")
    if root is not schema.EvaluateRoot:  # caco.embed reads other images than the run did, and caco.export reads none
        tree.pop("data", None)
    return {key: tree[key] for key in taken if key in root.__dataclass_fields__ and key in tree and key not in chosen}
