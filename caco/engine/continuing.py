"""The state from which a finished run is trained longer: exactly that of its last checkpoint, to the bit."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from caco.errors import UserError
from caco.runs.checkpoint import Checkpoints


def last_state(cfg: DictConfig, run_dir: Path) -> tuple[dict[str, Any], Path]:
    """The state that a run ended with, and its file.

    Raises:
        UserError: the run has no readable checkpoint, or the newest one belongs to another configuration.
    """
    newest = Checkpoints(run_dir / "checkpoints").load_newest()
    if newest is None or newest[0]["config_hash"] != cfg.continued_run:
        got = "none" if newest is None else f"one of another configuration, {newest[0]['config_hash']}"
        raise UserError(
            f"continue_from: expected the last checkpoint of {run_dir}, of configuration {cfg.continued_run}; got {got}"
        )
    return newest


def taken_over(state: dict[str, Any], *, place: list[str | int | None], config_hash: str) -> dict[str, Any]:
    """The state with which a new run begins after the last step of a finished one. Weights, twin, bank, velocity,
    optimiser and random state stay as they were there. Results and training time start empty, and an evaluation is due,
    so that the new run's curve begins with the old one's end.

    Args:
        place: where that step lies in the new run, in the form of Course.place.
    Raises:
        UserError: that step lies at another place in the new run than in the old one.
    """
    (phase, in_phase, *_), there = place, state["place"]
    # At its end a run records its last step; before the end it would record the step that follows.
    if there[0] != phase or not isinstance(in_phase, int) or there[1] not in (in_phase, in_phase - 1):
        raise UserError(
            f"continue_from: step {state['step']} is step {there[1]} of the {there[0]} in the old run and step"
            f" {in_phase} of the {phase} in the new one, so the length of the warm start or the number of steps in an"
            " epoch has changed; expected the same batch, images and number of warm-start steps"
        )
    own = {"config_hash": config_hash, "place": place, "evaluation_due": "epoch"}
    return {**state, **own, "latest": {}, "failed_evaluations": [], "time": {"steps": 0, "seconds": 0.0}}
