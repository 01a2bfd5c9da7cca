"""When the Trainer looks at a step's loss, so that a device that computes while the host goes on is not waited for.

A CPU's loss is looked at in its step, before anything is updated with it. A GPU is a step behind the host, and to look
at once would empty its queue: the loss is sent to the host and looked at when the next step has been handed over. So
of a loss that is not finite one update may be made before the run ends. Nothing is lost by that: what is saved,
evaluated or written down is preceded by a look at all losses before it (`settle`), so the last checkpoint is good.
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from caco import devices
from caco.banks import scoring
from caco.errors import UserError


class NonFiniteLossError(UserError):
    """The loss is NaN or infinite; what was saved is good."""


class Sent:
    """Numbers on their way from a device to the host."""

    def __init__(self, numbers_N: Tensor):
        self._numbers_N, self._arrived = numbers_N, None
        if numbers_N.device.type == "cuda":
            self._numbers_N = torch.empty(numbers_N.shape, dtype=numbers_N.dtype, pin_memory=True)
            self._numbers_N.copy_(numbers_N, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """Once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers_N.tolist()


class _Step(NamedTuple):
    names: Sequence[str]
    sent: Sent
    where: str
    held: list[scoring.Held]


class Losses:
    """Of the steps of a run, in order; the means over the ranks, so every rank sees the same.

    numbers: of the newest step that was looked at, by name. stop: whether some rank was told to stop by then.
    """

    def __init__(self, device: torch.device):
        self._ahead = devices.runs_ahead(device)
        self._waiting: deque[_Step] = deque()
        self.numbers: dict[str, float] = {}
        self.stop = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[scoring.Held]]:
        """Around forward and backward pass: what a bank cannot score is refused there, or with the loss."""
        if not self._ahead:
            yield []
            return
        with scoring.looked_at_later() as held:
            yield held

    def add(self, names: Sequence[str], numbers_N: Tensor, where: str, held: list[scoring.Held]) -> None:
        """A step's loss, its metrics and "stop".

        Raises:
            NonFiniteLossError: this step's loss is not finite, or where the device is behind the one's before.
        """
        self._waiting.append(_Step(names, Sent(numbers_N), where, held))
        while len(self._waiting) > self._ahead:
            self._look()

    def settle(self) -> None:
        """Look at all losses so far.

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
        if held:  # of a step with a bank, whose loss is NaN where it could not score
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
    """What a bank refuses, with the step."""
    try:
        yield
    except scoring.UnusableError as error:
        raise NonFiniteLossError(f"{error}; at {where}; the last checkpoint is good") from error
