"""What a run writes down while it trains: the rows of steps, epochs and evaluations for the tracker, the lines that a
person sees of them, and the newest value of each metric, with which the run ends.
"""

import traceback
from collections.abc import Mapping
from typing import Any

import torch

from caco import distributed
from caco.engine.course import Course
from caco.engine.progress import Progress
from caco.errors import is_for_user
from caco.methods.base import Method, Now
from caco.methods.diagnostics import Signs
from caco.saying import clock
from caco.tracking.base import Row, Tracker


class Recording:
    """Collects a run's values and hands them to the tracker; only rank 0 does the latter.

    Args:
        tracker: takes the rows.
        method: is asked for its statistics and its warning after each epoch.
        signs: of collapse, which the steps have shown.
        course: says how far the run is.
    """

    def __init__(self, tracker: Tracker, method: Method, signs: Signs, course: Course) -> None:
        self.tracker, self.method, self.signs, self.course = tracker, method, signs, course
        self.epoch_sums: dict[str, torch.Tensor] = {}
        self.latest: dict[str, float] = {}  # the newest value of each metric of an epoch or an evaluation
        self.failed_evaluations: list[dict[str, Any]] = []  # each with its evaluator, step and message
        self.has_warned = False

    def _row(self, steps: int, row: Row, kind: str) -> None:
        if distributed.is_main():
            self.tracker.log(steps, row, kind=kind)

    def log_step(
        self,
        now: Now,
        values: Mapping[str, torch.Tensor],
        progress: Progress,
        *,
        numbers: Mapping[str, float],
        lr: float,
        due: bool,
    ) -> None:
        """Add a step's values to those of its epoch, show the step, and write its row if one is due.

        Args:
            values: loss and metrics of the step, on the device.
            numbers: the newest loss and metrics that the host has read.
            lr: the learning rate of the step.
        """
        steps = now.step + 1
        for name, value in values.items():
            self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value
        self.epoch_sums["count"] = self.epoch_sums.get("count", 0.0) + torch.ones((), dtype=torch.float64)
        newest = numbers.get("loss")
        progress.step(steps, self.course.described(now), newest if due or progress.bar is None else None)
        if due:
            row = {
                **({} if now.epoch is None else {"epoch": now.epoch}),
                **numbers,
                "lr": lr,
                **now.values,
                "images_per_second": progress.images_per_second(steps),
            }
            self._row(steps, row, "train" if now.epoch is not None else now.phase.replace(" ", "_"))

    def log_epoch(self, steps: int, epoch: int, progress: Progress) -> None:
        """Write the row of an epoch that has ended after `steps` steps of the run, and warn once if there is reason."""
        count = self.epoch_sums.pop("count").item()
        row = (
            {name: value.item() / count for name, value in self.epoch_sums.items()}
            | self.method.statistics()
            | self.signs.of_epoch()
        )
        self.epoch_sums.clear()
        self.latest |= row
        self._row(steps, {"epoch": epoch, **row}, "epoch")
        if not self.has_warned and (warning := self.method.warning(row)):
            self.has_warned = True
            progress.say(f"caco: warning: after epoch {epoch + 1} of {self.course.run.epochs}: {warning}")
            self._row(steps, {"epoch": epoch, "message": warning}, "warning")

    def log_evaluation(self, steps: int, results: Mapping[str, float], progress: Progress) -> None:
        """Write and show the results of the evaluators; accuracies are in percent."""
        ended = self.course.phase_ended(steps)
        self.latest |= results
        epochs = self.course.epochs_done(steps)
        self._row(steps, {"epochs": epochs, **({"phase": ended.name} if ended else {}), **results}, "eval")
        shown = ", ".join(f"{name} {value:.2f}" for name, value in results.items())
        progress.say(f"after {self.course.done(steps)} ({clock(progress.elapsed())}): {shown}")

    def log_failed_evaluation(self, steps: int, name: str, error: Exception, progress: Progress) -> None:
        """Write and show that an evaluator has failed, and keep it for the end of the run."""
        if distributed.is_main() and not is_for_user(error):
            traceback.print_exception(error)
        message = f"eval.{name} failed after {self.course.done(steps)}: {str(error) or type(error).__name__}"
        self.failed_evaluations.append({"evaluator": name, "step": steps, "message": message})
        progress.say(f"caco: {message}")
        self._row(steps, {"epochs": self.course.epochs_done(steps), "message": message}, "warning")
