"""What a training step says to a device that computes while the host goes on, so that neither waits for the other.

A GPU has a queue: the host puts work into it and goes on. The host waits until the queue is empty where it wants a
number (`item`, a tensor in an `if`), where a shape depends on one (`nonzero`, a mask as an index), and where it sends a
tensor from memory that is not pinned, as `torch.tensor(x, device=...)` does. A step of the training does none of these;
tests/engine/test_waits.py holds every method to it.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def runs_ahead(device: torch.device) -> bool:
    """Whether what it is told is computed later, and asking it for a number means waiting for it."""
    return device.type != "cpu"


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on the device; a GPU takes it when it gets there in its queue.

    x: not to be written to again, unless its memory is pinned already.
    """
    if device.type == "cuda" and not x.is_pinned():
        x = x.pin_memory()  # a copy; torch keeps it until the device has taken it
    return x.to(device, non_blocking=True)


def where_or(mask: Tensor, x: Tensor, number: float) -> Tensor:
    """As torch.where(mask, x, number), with a number that a kernel takes as an argument, so that nothing is sent."""
    return x.masked_fill(~mask, number)


class Known(Generic[T]):
    """What the host knows of a small tensor of a module's state, so that it is not read at every step: read anew where
    somebody else has written to it, or `forget` was called, as it has to be when a state is loaded.

    Args:
        value: of the tensor as it was made.
    """

    def __init__(self, value: T):
        self._value, self._version = value, 0

    def of(self, x: Tensor, read: Callable[[Tensor], T]) -> T:
        """The value of x, which `read` takes from it."""
        if self._version != x._version:
            self.note(x, read(x))
        return self._value

    def note(self, x: Tensor, value: T) -> None:
        """After x was given this value."""
        self._value, self._version = value, x._version

    def forget(self) -> None:
        self._version = -1
