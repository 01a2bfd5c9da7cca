"""The length of a run, and numbers that change over it: tables with one number for each step, made before the loop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from caco.errors import UserError

Table = list[float]  # one number for each step
MOST_STEPS = 20_000_000  # their tables take one or two gigabytes; 800 epochs of ImageNet at batch 256 are 4 million


@dataclass(frozen=True)
class RunShape:
    """The length of the training, without the phases before epoch 0.

    Args:
        epochs: number of passes over the images.
        steps_per_epoch: number of optimiser steps in an epoch.
        batch: images in a step, over all ranks.
        unit: "step" changes a schedule's number with every step; "epoch" keeps it constant within an epoch, as CaCo's
            published code does.
        restart_epoch: the number of epochs after which all schedules begin anew (a run that is trained longer); 0: they
            never do.
    """

    epochs: int
    steps_per_epoch: int
    batch: int
    unit: Literal["step", "epoch"] = "step"
    restart_epoch: int = 0

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def of_schedules(self) -> "RunShape":
        """The part of the run over which schedules go from their start to their end.

        Raises:
            UserError: the run has so many steps that the tables of its schedules would fill the memory.
        """
        if self.steps > MOST_STEPS:
            raise UserError(
                f"epochs: expected at most {MOST_STEPS // self.steps_per_epoch:,}, which are {MOST_STEPS:,} steps of"
                f" {self.batch:,} images, got {self.epochs:,}"
            )
        return replace(self, epochs=self.epochs - self.restart_epoch, restart_epoch=0)

    def placed(self, table: Table) -> Table:
        """A number for each step of the run, from a table over `of_schedules`. The steps before it, which an earlier
        run made, get the table's first number.
        """
        return table[:1] * (self.steps - len(table)) + table

    def ticks(self) -> tuple[list[int], float]:
        """For each step the number of units that have passed; and the number of units in an epoch."""
        if self.unit == "epoch":
            return [step // self.steps_per_epoch for step in range(self.steps)], 1
        return list(range(self.steps)), self.steps_per_epoch


def constant(run: RunShape, value: float) -> Table:
    """The same number at every step."""
    return [value] * run.steps


def cosine(run: RunShape, start: float, end: float) -> Table:
    """A half cosine from `start` to `end` over the run."""
    ticks, per_epoch = run.ticks()
    total = run.epochs * per_epoch
    return [end - (end - start) * 0.5 * (1 + math.cos(math.pi * t / total)) for t in ticks]


def warmup_and_cosine(
    run: RunShape,
    highest: float,
    final: float,
    warmup_epochs: float,
    *,
    start: float | None = None,
    end: Literal["last", "next"] = "last",
) -> Table:
    """A line from `start` times `highest` to `highest` over the W units of the warm-up, then a half cosine to `final`.

    A `start` of None means 1 / W. `end` says where the line reaches `highest`: at the "last" unit of the warm-up, which
    with 1 / W gives highest * (t + 1) / W; or at the "next" one, the first of the cosine, which with a start of 0 gives
    highest * t / W. With `final` equal to `highest` the number is constant after the warm-up. A warm-up may be longer
    than the run.
    """
    ticks, per_epoch = run.ticks()
    warmup = warmup_epochs * per_epoch
    rest = max(run.epochs * per_epoch - warmup, 1)
    first = 1 / max(warmup, 1) if start is None else start
    units = max(warmup - 1 if end == "last" else warmup, 1)

    def value(t: int) -> float:
        if t < warmup and start is None and end == "last":
            return highest * min(1.0, (t + 1) / max(warmup, 1))  # the same as below, without its rounding error
        if t < warmup:
            return highest * min(1.0, first + (1 - first) * t / units)
        return final + (highest - final) * 0.5 * (1 + math.cos(math.pi * (t - warmup) / rest))

    return [value(t) for t in ticks]


def drops(run: RunShape, shares: Sequence[float], factor: float) -> Table:
    """1 at first, multiplied by `factor` at each of these shares of the run, which are rounded to whole epochs."""
    epochs = [round(share * run.epochs) for share in shares]
    return [factor ** sum(step // run.steps_per_epoch >= epoch for epoch in epochs) for step in range(run.steps)]


def scaled_lr(lr: float, batch: int, reference_batch: int | None) -> float:
    """lr * batch / reference_batch; lr itself if there is no reference batch."""
    if lr <= 0:
        raise UserError(f"optimizer.lr must be positive; got {lr}")
    return lr * batch / reference_batch if reference_batch else lr
