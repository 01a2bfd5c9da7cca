"""Trains a finished run longer: `continue_from=RUN epochs=400 continued_schedule=restart|planned`. Imports no torch.

The new run uses the configuration that RUN recorded; only a few settings may differ. This configuration is stored with
Hydra as a root named "continued", beside conf/config.yaml, so that Hydra composes, sweeps and launches it like any
other.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from caco import metrics
from caco.config import components, folders, pretrained
from caco.config.composition import installed_tracking
from caco.errors import UserError
from caco.runs import renamed
from caco.runs.files import read_json
from caco.runs.identity import AS_BEFORE, key_of, read_yaml, run_hash

SCHEDULES = ("restart", "planned")
GROUPS = ("eval", "tracking", "loader", "launcher")  # an option may be chosen anew; all other groups stay as recorded
# Keys that may differ; one that ends in a dot stands for all keys below it. Every other setting decides what a
# checkpoint holds or what the images are.
MAY_DIFFER = (
    "continue_from", "continued_schedule", "epochs", "max_steps", "name", "precision", "device", "compile", "schedule.",
    "optimizer.lr", "bank.lr",
    "bank.final_lr", "data.root", "data.labelled_root", "data.download", "data.in_memory_mb", "log_every_steps",
    "eval_every_epochs",
    "checkpoint.", "profile", "anomaly", "hydra.", "derived", *(f"{group}." for group in GROUPS),
)  # fmt: skip
_choices: dict[str, str] = {}  # group -> option, as the continued run was started


def choices() -> Mapping[str, str]:
    """group -> option, of the run that this process continues; {} if it continues none."""
    return _choices


def root(overrides: Sequence[str]) -> str:
    """The root that a command line is composed with: "config", or "continued", which is built here from the run that
    continue_from names.

    Raises:
        UserError: the run does not exist or is not finished, or the command line changes a setting that may not differ.
    """
    _choices.clear()
    given = _given(overrides)
    if not given:
        return "config"
    if len(given) > 1:
        raise UserError(
            f"continue_from: expected one run, got {', '.join(given)}; start a separate command for each of them"
        )
    location = pretrained.locate(given[0], key="continue_from")
    run_dir = location.run_dir
    if location.checkpoint is not None:
        raise UserError(
            f"continue_from: a run is continued from its end; expected its directory, continue_from={run_dir}, got one"
            " of its checkpoints"
        )
    tree, summary = _finished(run_dir)
    _refuse_what_may_not_differ(overrides, run_dir)
    folders.use_recorded(tree.get("config_dir"))
    _choices.update(_chosen_by(run_dir))
    ConfigStore.instance().store("continued", _composed_of(tree, summary, overrides))
    return "continued"


def _given(overrides: Sequence[str]) -> list[str]:
    """The runs that continue_from names."""
    mine = [item for item in overrides if item.lstrip("+").partition("=")[0] == "continue_from"]
    try:
        parsed = OverridesParser.create().parse_overrides(mine[-1:])
    except OverrideParseException:
        return []  # composing the command line reports this error
    values = [
        value for item in parsed for value in (item.sweep_iterator() if item.is_discrete_sweep() else [item.value()])
    ]
    return [str(value) for value in values if value is not None]


def _finished(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A finished run's configuration and summary."""
    if renamed.is_old(run_dir):
        raise UserError(
            f"continue_from: {run_dir} was made by an earlier version of caco; this version can show, evaluate and"
            " export it but cannot continue it"
        )
    summary, environment = read_json(run_dir / "summary.json"), read_json(run_dir / "environment.json")
    if not summary or metrics.missing_at_the_end(summary):
        how = (
            f"to finish it, give its own command again: {environment['command']}"
            if "command" in environment
            else "to finish it, give its own command again"
        )
        raise UserError(f"continue_from: {run_dir} is not finished; {how}")
    return renamed.read_config(run_dir), summary


def _refuse_what_may_not_differ(overrides: Sequence[str], run_dir: Path) -> None:
    keys = {key_of(item): item for item in overrides}
    wrong = [
        item
        for key, item in keys.items()
        if key not in GROUPS and not any(key == may or may[-1] == "." and key.startswith(may) for may in MAY_DIFFER)
    ]
    if wrong:
        raise UserError(
            f"continue_from: {', '.join(wrong)} cannot differ from {run_dir}, because its weights, optimiser and images"
            " are continued. These may be set: epochs, continued_schedule, max_steps, schedule.*, optimizer.lr,"
            " bank.lr, bank.final_lr, precision, device, eval, loader, tracking, launcher, checkpoint.*, name and the"
            " places of the data. To start a new run from its weights instead:"
            f" weights={shlex.quote(str(pretrained.checkpoints(run_dir)[-1]))} format=caco"
        )


def _chosen_by(run_dir: Path) -> dict[str, str]:
    params = read_json(run_dir / "tracking.json").get("params", {})
    return {
        group: params[group]
        for group in folders.groups()
        if isinstance(params.get(group), str) and params[group] != "null"
    }


def _composed_of(tree: dict[str, Any], summary: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The root "continued": the run's recorded settings; for settings introduced since, the value that reproduces the
    earlier behaviour; and today's defaults for settings that are no part of a run's identity.
    """
    today = read_yaml(folders.CONF / "config.yaml")
    defaults = OmegaConf.to_container(today, resolve=False)
    assert isinstance(defaults, dict)
    hydra = defaults.pop("hydra")
    defaults.pop("defaults")
    before: dict[str, Any] = {}
    for key, value in AS_BEFORE.items():
        part, _, name = key.partition(".")
        if not name:
            before[part] = value
        # A component's missing setting needs no entry: its constructor's default is the earlier behaviour.
        elif isinstance(defaults.get(part), dict):
            before.setdefault(part, {})[name] = value
    merged = OmegaConf.to_container(OmegaConf.merge(DictConfig(defaults), DictConfig(before)), resolve=False)
    assert isinstance(merged, dict)
    for key, value in tree.items():
        merged[key] = (
            {**merged[key], **value} if isinstance(merged.get(key), dict) and isinstance(value, dict) else value
        )
    merged |= {
        "max_steps": None, "weights": None, "format": None, "weights_digest": None, "config_dir": "${config_dir:}",
        "derived": [],
        "continued_schedule": None, "continued_run": run_hash(tree), "continued_epochs": summary["epochs"],
    }  # fmt: skip
    chosen = {key_of(item) for item in overrides}
    if "tracking" not in chosen and components.missing_package(merged.get("tracking", {})) is not None:
        chosen.add("tracking")  # the run comes from another machine, and its tracker is not installed here
    groups: dict[str, Any] = {"eval": [], "tracking": None, "loader": None, "launcher": None}
    if "tracking" in chosen:
        groups["tracking"] = installed_tracking()
    merged.pop("launcher", None)
    for group in chosen & {"eval", "tracking", "loader"}:
        del merged[group]
    listed = [{group: option} for group, option in groups.items() if group != "launcher"]
    job_logging = [{"override hydra/job_logging": "none"}]
    return {"defaults": ["schema", "_self_", *listed, {"launcher": "none"}, *job_logging], **merged, "hydra": hydra}
