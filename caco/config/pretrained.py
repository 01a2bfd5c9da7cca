"""What an evaluation or an export starts from: a run's checkpoint, or weights from elsewhere. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from caco.config import composition, folders, refusals, schema, validation
from caco.errors import UserError
from caco.runs import renamed
from caco.runs.files import read_json
from caco.runs.paths import expanded

CHECKPOINT = re.compile(r"step_(\d{9})\.pt")
DEFAULTS_WITHOUT_A_RUN = {"augmentation": "caco", "loader": "auto"}


@dataclass(frozen=True)
class Location:
    """A run's directory, and the checkpoint file that was asked for (None: the newest)."""

    run_dir: Path
    checkpoint: Path | None


def locate(run: str, key: str = "run") -> Location:
    """A run from its directory, one of its checkpoint files, or its MLflow run id (looked for below runs/).

    Args:
        key: the setting that names it.
    Raises:
        UserError: there is none; says what was expected.
    """
    path = expanded(run)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise UserError(f"{key}: expected a run's directory, with config.yaml, got {run}, which has none")
        if not checkpoints(path):
            raise UserError(
                f"{key}: expected checkpoints in {run}/checkpoints, got none: the run has not saved one yet"
            )
        return Location(path, None)
    if path.is_file():
        folders = [folder for folder in path.absolute().parents[:3] if (folder / "config.yaml").is_file()]
        if not CHECKPOINT.fullmatch(path.name) or not folders:
            raise UserError(
                f"{key}: expected a checkpoint file where its run left it (RUN/checkpoints/step_000001000.pt), got"
                f" {run}; for a file from elsewhere: weights={run} format=... backbone=... data=..."
            )
        return Location(folders[0], path)
    if re.fullmatch(r"[0-9a-f]{32}", run):
        for mark in sorted(Path("runs").glob("**/mlflow.json")):
            if read_json(mark).get("run_id") == run:
                return locate(str(mark.parent), key)
        raise UserError(
            f"{key}: no run below {Path('runs').absolute()} was sent to MLflow as {run}; expected its directory,"
            f" {key}=DIRECTORY"
        )
    raise UserError(
        f"{key}: expected a run's directory, a checkpoint file or an MLflow run id, got {run}, which is not there"
    )


def checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoint files, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").rglob("step_*.pt") if CHECKPOINT.fullmatch(path.name))


def compose(name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration conf/<name>.yaml of a command line, with what the run recorded where nothing else was chosen.

    The folder of the user's own that the run recorded is looked into from then on.

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
            if validation.missing_package(of_the_run.get("tracking", {})) is not None:
                del of_the_run["tracking"]  # of a run from another machine
        else:
            groups = {group: option for group, option in DEFAULTS_WITHOUT_A_RUN.items() if group not in chosen}
            extra = [f"{group}={option}" for group, option in groups.items() if group in own]
        if "tracking" in own and "tracking" not in of_the_run and "tracking" not in chosen:
            extra.append(f"tracking={composition.installed_tracking()}")
        # As a config of its own, before the groups: what the command line chooses replaces what the run recorded.
        ConfigStore.instance().store("of_the_run", of_the_run)
        cfg = composition.compose([*extra, *overrides], name)
        validation.check(composition.job_config(cfg), overrides=overrides, root=schema.ROOTS[name])
        return composition.job_config(cfg)
    except (*refusals.COMPOSITION_ERRORS, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(refusals.explain(error, overrides, name)) from error


def _chosen(overrides: Sequence[str]) -> dict[str, Any]:
    """key -> value of each override, read by Hydra's grammar."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if any(item.is_sweep_override() for item in parsed):
        raise UserError("expected one value for each key, got several: evaluate one run after the other")
    return {item.key_or_group: str(item.value()) for item in parsed}


def _recorded(run_dir: Path, root: schema.AnyRoot, chosen: dict[str, Any]) -> dict[str, Any]:
    """The parts of a run's configuration that this root has too and that the command line does not choose anew."""
    tree = renamed.read_config(run_dir)
    folders.use_recorded(tree.get("config_dir"))
    tree["batch"] = max(
        1, min(tree["batch"], 512)
    )  # as in training: then features, and what is counted on them, are the same
    taken = ("name", "backbone", "augmentation", "data", "loader", "tracking", "precision", "device", "seed", "batch")
    if root is not schema.EvaluateRoot:  # an embedding's images are others, and an export reads none
        tree.pop("data", None)
    return {key: tree[key] for key in taken if key in root.__dataclass_fields__ and key in tree and key not in chosen}
