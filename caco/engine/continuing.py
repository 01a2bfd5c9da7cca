"""What a run goes on from: whether all ranks go on from the same checkpoint of it, and the state from which a finished
run is trained longer, which is exactly that of its last checkpoint, to the bit.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from caco import distributed
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


def refuse_different_steps(step: int | None, run_dir: Path) -> None:
    """Check that all ranks loaded the same checkpoint. Each rank reads the checkpoints itself, and on one machine a
    file may still be missing or be damaged. A collective.

    Args:
        step: the step of the checkpoint that this rank has loaded, or None.
    Raises:
        UserError: the ranks have loaded different checkpoints; the steps are listed by rank.
    """
    steps = distributed.all_objects(step)
    if len(set(steps)) > 1:
        loaded = ", ".join(
            f"rank {rank} {'none' if step is None else f'step {step}'}" for rank, step in enumerate(steps)
        )
        raise UserError(
            f"every rank must load the same checkpoint; got {loaded}. Nothing was changed: make sure that all machines"
            f" can read the same files in {run_dir / 'checkpoints'}, then start the same command again"
        )


def refuse_other_groups(saved_by: int) -> None:
    """With norm_groups=rank, check that as many ranks go on as saved the checkpoint.

    Raises:
        UserError: the number of ranks differs, so that BatchNorm would work on other groups than before.
    """
    if saved_by != distributed.world():
        raise UserError(
            f"norm_groups=rank: this run's BatchNorm had {saved_by} groups, one for each process, and would have"
            f" {distributed.world()} from here on; start {saved_by} processes (a run with norm_groups={saved_by} can"
            " also go on with fewer)"
        )
