"""The check that the loss of each step is finite. On a GPU the check comes one step later, so that the host need not
wait for the GPU.

On a CPU the Trainer checks a step's loss in the same step, before anything is updated with it. A GPU computes later
than the host gives it work. If the host read the loss at once, it would have to wait until the GPU had done all the
work in its queue. Instead, the loss is copied to the host in the background, and the Trainer checks it after it has
queued the next step's forward and backward pass. So a loss that is not finite may cause one update before the run ends.
This update is lost with the run and does no harm: `settle` checks all losses so far before anything is saved, evaluated
or logged, so the last checkpoint is good.
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from caco import devices
from caco.banks import unusable
from caco.errors import UserError


class NonFiniteLossError(UserError):
    """The loss is NaN or infinite. Every checkpoint that was saved is from before this loss."""


class Sent:
    """Numbers, [N], that are being copied from a device to the host. From a GPU they are copied in the background."""

    def __init__(self, numbers_N: Tensor):
        self._numbers_N, self._arrived = numbers_N, None
        if numbers_N.device.type == "cuda":
            self._numbers_N = torch.empty(numbers_N.shape, dtype=numbers_N.dtype, pin_memory=True)
            self._numbers_N.copy_(numbers_N, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The N numbers. Waits until the copy is complete."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers_N.tolist()


class _Step(NamedTuple):
    names: Sequence[str]  # of the numbers
    sent: Sent
    where: str  # the step in words, for messages
    held: list[unusable.Held]  # what the bank noted instead of refusing at once; empty on a CPU


class Losses:
    """The losses and metrics of a run's steps, which are added and checked in order. They are means over the ranks, so
    that every rank raises the same error at the same step.

    Attributes:
        numbers: the loss and the metrics of the newest step that was checked, by name.
        stop: whether a rank had received a signal to stop in the newest step that was checked.
    """

    def __init__(self, device: torch.device):
        self._ahead = devices.runs_ahead(device)
        self._most_unchecked = 1 if self._ahead else 0  # steps
        self._waiting: deque[_Step] = deque()  # the steps that were not yet checked, oldest first
        self.numbers: dict[str, float] = {}
        self.stop = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[unusable.Held]]:
        """A context for a step's forward and backward pass. On a CPU the bank refuses there what it cannot score. On a
        GPU the list that is yielded notes it, and the check of the loss refuses it.
        """
        if not self._ahead:
            yield []
            return
        with unusable.looked_at_later() as held:
            yield held

    def add(self, names: Sequence[str], numbers_N: Tensor, where: str, held: list[unusable.Held]) -> None:
        """Add a step, and check the newest loss that can be read without waiting for the device.

        Args:
            names: "loss", the names of the metrics, and "stop".
            numbers_N: the values, on the device; the value of "stop" is the share of ranks that are to stop.
            where: the step in words, for the message of an error.
            held: the list that `watching` yielded in this step.
        Raises:
            NonFiniteLossError: on a CPU this step's loss is not finite; on a GPU the loss of the step before.
        """
        self._waiting.append(_Step(names, Sent(numbers_N), where, held))
        while len(self._waiting) > self._most_unchecked:
            self._look()

    def settle(self) -> None:
        """Check all losses so far, and wait for those that the device has not computed yet.

        Raises:
            NonFiniteLossError: one of them is not finite.
        """
        while self._waiting:
            self._look()

    def _look(self) -> None:
        names, sent, where, held = self._waiting.popleft()
        self.numbers = dict(zip(names, sent.read(), strict=True))
        self.stop = self.numbers.pop("stop") > 0
        if math.isfinite(loss := self.numbers["loss"]):
            return
        if held:  # the step used a bank, which may have made the loss NaN because it could not score
            with refused_at(where):
                for one in held:
                    one.refuse_if_wrong()
        done = "nothing of it was saved" if self._ahead else "nothing was updated with it"
        raise NonFiniteLossError(
            f"the loss is {loss} at {where}; {done}, and the last checkpoint is good; try a lower optimizer.lr, or"
            " precision=fp32"
        )


@contextlib.contextmanager
def refused_at(where: str) -> Iterator[None]:
    """A context that turns the bank's UnusableError into a NonFiniteLossError whose message also names the step."""
    try:
        yield
    except unusable.UnusableError as error:
        raise NonFiniteLossError(f"{error}; at {where}; the last checkpoint is good") from error
