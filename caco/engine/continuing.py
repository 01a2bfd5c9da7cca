"""The state with which a finished run is trained longer: that of its last checkpoint, bit by bit."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from caco.errors import UserError
from caco.runs.checkpoint import Checkpoints


def last_state(cfg: DictConfig, run_dir: Path) -> tuple[dict[str, Any], Path]:
    """The state that a run ended with, and its file.

    Raises:
        UserError: the run has none that can be read, or it is not that of its end.
    """
    newest = Checkpoints(run_dir / "checkpoints").load_newest()
    if newest is None or newest[0]["config_hash"] != cfg.continued_run:
        got = "none" if newest is None else f"one of another configuration, {newest[0]['config_hash']}"
        raise UserError(
            f"continue_from: expected the last checkpoint of {run_dir}, of configuration {cfg.continued_run}; got {got}"
        )
    return newest


def taken_over(state: dict[str, Any], *, place: list[str | int | None], config_hash: str) -> dict[str, Any]:
    """The state that a new run begins with behind another one's last step: weights, twin, bank, velocity, optimiser and
    random state are what they were there. Its results and its time are its own; what it is evaluated with stands first
    in its curve, too.

    Args:
        place: of that step in the new run, as the Trainer says it.
    Raises:
        UserError: that step lies elsewhere in the new run.
    """
    (phase, in_phase, *_), there = place, state["place"]
    # At its end a run says its last step, and not the one that would follow.
    if there[0] != phase or not isinstance(in_phase, int) or there[1] not in (in_phase, in_phase - 1):
        raise UserError(
            f"continue_from: step {state['step']} is step {there[1]} of the {there[0]} there, and step {in_phase} of"
            f" the {phase} here: the warm start has another length, or an epoch other steps; expected the same batch,"
            " images and number of warm-start steps"
        )
    own = {"config_hash": config_hash, "place": place, "evaluation_due": "epoch"}
    return {**state, **own, "latest": {}, "failed_evaluations": [], "time": {"steps": 0, "seconds": 0.0}}
