"""A loader bound to data: batches on their device whose randomness depends on (seed, epoch, sample, view) and on
nothing else.
"""

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Literal, Protocol

import numpy as np
import torch

from caco import devices
from caco.data.loaders.batches import Batch, Order, Pixels, say_stand_ins
from caco.data.loaders.workers import Workers
from caco.data.sets.sources import Source, UnreadableImage
from caco.data.views.augmentation import Views
from caco.errors import UserError

Made = Pixels | UnreadableImage  # a batch, or why there is none


class Loader(Protocol):
    """Settings of a loader, whose `bind` gives them data; every loader makes the same batches, to the bit.

    num_workers: threads or processes that make views; passes over a whole set, as evaluations take them, have as many.
    corrupt: whether an image that cannot be read ends the run (fail), or another stands in for it (skip), in
    evaluations too.
    """

    num_workers: int = 0
    corrupt: Literal["fail", "skip"] = "fail"

    @abstractmethod
    def bind(
        self,
        source: Source,
        views: Views,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        drop_last: bool = True,
    ) -> "BoundLoader":
        """One rank's part of every global batch of `batch` images, on `device`.

        Args:
            drop_last: whether an epoch ends with its last whole batch; else a smaller one follows, of the images that
                are left, where these are as many as the ranks. Of it one rank may have an image more than another.
        Raises:
            UserError: fewer images than one batch; a batch that the ranks cannot share evenly.
        """


class BoundLoader:
    """What a loader's `bind` returns: `epoch` iterates, `close` ends the workers."""

    def __init__(
        self,
        maker: Callable[[Order], Iterable[Made]],
        source: Source,
        views: Views,
        *,
        batch: int,
        seed: int,
        rank: int,
        world: int,
        device: torch.device,
        drop_last: bool = True,
    ):
        assert 0 <= rank < world
        if batch < 1 or batch % world:
            raise UserError(
                f"batch: expected a positive multiple of the {world} processes that share it, got {batch}. "
                f"Try batch={max(world, batch // world * world)}."
            )
        if len(source) < batch:
            raise UserError(
                f"batch: expected at most the {len(source)} images of {source.name}, got {batch}. "
                "Lower batch or give more images."
            )
        self._source, self._views, self._device = source, views, device
        self._order = Order(len(source), batch=batch, seed=seed, rank=rank, world=world, drop_last=drop_last)
        self.steps_per_epoch = self._order.steps
        self._loader: Iterable[Made] | None = maker(self._order)
        self._stand_ins: dict[int, int] = {}
        self._running = device_batches(iter(()), source, views, device, {})

    def epoch(self, epoch: int, start_step: int = 0, order: np.ndarray | None = None) -> Iterator[Batch]:
        """The batches of an epoch from a step on; negative epochs are further ones, with orders and views of their own.

        One at a time: the iterator of an earlier call ends when a later one begins.

        Args:
            order: positions of images, int64, in place of the epoch's own permutation; at least as many as an epoch
                takes.
        """
        if order is not None and (
            len(order) < self._order.taken or order.min() < 0 or order.max() >= self._order.num_images
        ):
            raise ValueError(
                f"order: expected at least {self._order.taken} positions below {self._order.num_images}, got "
                f"{len(order)} of {order.min()} to {order.max()}"
            )
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step: expected 0..{self.steps_per_epoch}, got {start_step}")
        assert self._loader is not None, "the loader is closed"
        self._running.close()
        self._order.epoch, self._order.start_step, self._order.chosen = epoch, start_step, order
        self._running = device_batches(iter(self._loader), self._source, self._views, self._device, self._stand_ins)
        return self._running

    def images_of(self, step: int) -> int:
        """Images of a step of an epoch, over all ranks: the batch, but for a smaller last one."""
        return self._order.images_of(step)

    def left_over(self, epoch: int) -> np.ndarray:
        """The images that the epoch's own order has beyond its steps, fewer than a batch, int64."""
        return self._order.permutation(epoch)[self._order.taken :]

    def close(self) -> None:
        """End the workers."""
        self._running.close()
        if isinstance(self._loader, Workers):
            self._loader.close()
        self._loader = None


def device_batches(
    made: Iterator[Made], source: Source, views: Views, device: torch.device, stand_ins: dict[int, int]
) -> Generator[Batch, None, None]:
    for one in made:
        if isinstance(one, UnreadableImage):
            raise UnreadableImage(str(one))
        say_stand_ins(source, one.stand_ins, stand_ins)
        # What is not pinned is copied: the GPU may still read it when a worker writes its memory again.
        normalised = [views.normalise(devices.sent(view, device)) for view in one.views]
        patches = normalised.pop() if normalised[-1].ndim == 5 else None
        yield Batch(normalised, devices.sent(one.index, device), devices.sent(one.label, device), patches)
