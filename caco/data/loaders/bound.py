"""A loader that is bound to data. It gives batches on their device; their randomness depends on (seed, epoch, sample,
view) and on nothing else.
"""

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch

from caco import devices
from caco.data.loaders.batches import Batch, Memory, Order, Pixels, say_stand_ins
from caco.data.loaders.workers import Workers
from caco.data.sets.sources import Source, UnreadableImage
from caco.data.views.augmentation import Views
from caco.errors import UserError

Made = Pixels | UnreadableImage  # a batch, or the error that prevented it


class Loader(Protocol):
    """A loader's settings; `bind` combines them with data. All loaders make the same batches, to the bit.

    Attributes:
        num_workers: threads or processes that make views. Passes over a whole set, as in evaluations, use as many.
        corrupt: whether an unreadable image ends the run (fail) or another image stands in for it (skip). This also
            applies to evaluations.
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
        """Make a loader of this rank's share of every global batch.

        Args:
            batch: number of images in a batch, over all ranks.
            device: where batches are put.
            drop_last: True ends an epoch with its last whole batch. With False a smaller batch of the remaining images
                follows, if they are at least as many as the ranks; one rank may then have one image more than another.
        Raises:
            UserError: there are fewer images than one batch, or the ranks cannot share a batch evenly.
        """


class BoundLoader:
    """The result of a loader's `bind`: `epoch` iterates over batches, `close` ends the workers.

    Args:
        maker: makes the batches of an `Order`, each before it is put on the device.
    """

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
        """The batches of an epoch, from a step on. Negative epoch numbers are allowed; each has its own order and
        views.

        Only one iterator is valid at a time: a later call ends the iterator of an earlier call.

        Args:
            order: int64, positions of images to use instead of the epoch's own permutation; at least as many as an
                epoch takes.
        Raises:
            ValueError: `order` or `start_step` is out of its range.
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
        """Number of images in a step of an epoch, over all ranks: the batch size, except for a smaller last batch."""
        return self._order.images_of(step)

    def left_over(self, epoch: int) -> np.ndarray:
        """The images at the end of the epoch's own order that its steps do not reach, fewer than a batch, int64."""
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
    take = partial(Memory(device).take, dtype=torch.float32)
    for one in made:
        if isinstance(one, UnreadableImage):
            raise UnreadableImage(str(one))
        say_stand_ins(source, one.stand_ins, stand_ins)
        # `sent` copies pixels that are not pinned: the GPU may still read when a worker reuses their memory.
        normalised = [views.normalise(devices.sent(view, device), take) for view in one.views]
        patches = normalised.pop() if normalised[-1].ndim == 5 else None
        yield Batch(normalised, devices.sent(one.index, device), devices.sent(one.label, device), patches)
