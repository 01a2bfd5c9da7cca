"""Helpers with which a training step gives work to a GPU without waiting for it.

The host puts work into a GPU's queue and continues while the GPU computes. The host has to wait until the GPU has done
all the work in its queue where the host reads a number (`item`, a tensor in an `if`), where a shape depends on values
(`nonzero`, a mask as an index), and where it sends a tensor from memory that is not pinned, as
`torch.tensor(x, device=...)` and `torch.where(mask, x, 0.0)` do (`x.masked_fill(~mask, 0.0)` passes the number to the
kernel instead). A training step should do none of these. tests/engine/test_waits.py checks this for the methods, and
docs/machines.md lists the exceptions.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def runs_ahead(device: torch.device) -> bool:
    """Whether the device computes its work later than the host queues it, so that the host has to wait to read a
    number. True for every device but a CPU.
    """
    return device.type != "cpu"


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, copied to the device. A GPU makes the copy in the background, and the host does not wait.

    Args:
        x: a tensor in the host's memory. Do not write to it afterwards: with a CPU as the device it is itself the
            result, and a GPU may read x later if its memory is pinned already.
    """
    if device.type == "cuda" and not x.is_pinned():
        x = x.pin_memory()  # a copy, which PyTorch keeps until the GPU has read it
    return x.to(device, non_blocking=True)


class Known(Generic[T]):
    """The host's copy of the value of a small tensor in a module's state, so that no step has to read the tensor from a
    GPU.

    The tensor is read again if it was written to after the last `note` or `of`, which PyTorch's version number of the
    tensor shows. It is also read again after `forget`, which must be called when a state has been loaded.

    Args:
        value: the value of the tensor when it was created.
    """

    def __init__(self, value: T):
        self._value, self._version = value, 0

    def of(self, x: Tensor, read: Callable[[Tensor], T]) -> T:
        """The value of x. Calls `read` with x, and so waits for a GPU, only if the value is not known."""
        if self._version != x._version:
            self.note(x, read(x))
        return self._value

    def note(self, x: Tensor, value: T) -> None:
        """Remember the value of x. The caller has just written this value to x."""
        self._value, self._version = value, x._version

    def forget(self) -> None:
        self._version = -1
