"""Passes over the whole training set beside the training: for clusters, labels and memories that a method makes
anew.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch

from caco.data.loaders.batches import Batch
from caco.data.loaders.bound import BoundLoader
from caco.data.loaders.plain import plain_batches
from caco.data.sets.sources import Source
from caco.data.views.augmentation import Views


class Images:
    """Called with "plain" or "train": an iterator over this rank's batches of one pass.

    plain: every image once over all ranks, unaugmented, one view, in order; the last batch may be smaller. train: every
    image once over all ranks, in the training's own augmented views and whole batches, in an order and with randomness
    that depend on the seed and `stream` alone; the last batch is filled with further images, whose index is -1.

    Args:
        bind: makes a loader of the training's batches, when the first pass of kind "train" needs one.
        batch: images of this rank in a plain batch; rank, world: whose, of how many.
        num_workers: that read the images of a plain pass; corrupt: as of the loader.
    """

    def __init__(
        self,
        source: Source,
        views: Views,
        bind: Callable[[], BoundLoader],
        *,
        batch: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        corrupt: Literal["fail", "skip"] = "fail",
    ):
        self._source, self._views, self._bind, self._batch, self._device = source, views, bind, batch, device
        self._num_workers = num_workers
        self._own = np.array_split(np.arange(len(source)), world)[rank]
        self._corrupt = corrupt
        self._loader: BoundLoader | None = None

    def __len__(self) -> int:
        return len(self._source)

    def __call__(self, kind: str, *, stream: int = 0) -> Iterator[Batch]:
        if kind == "plain":
            yield from self._plain()
        elif kind == "train":
            yield from self._train(stream)
        else:
            raise ValueError(f"images: expected plain or train, got {kind!r}")

    def _train(self, stream: int) -> Iterator[Batch]:
        loader = self._loader = self._loader or self._bind()
        whole, rest = -1_000_000_000 - stream, -2_000_000_000 - stream  # far from the epochs of any warm start
        yield from loader.epoch(whole)
        left = loader.left_over(whole)
        if len(left):
            others = np.setdiff1d(np.arange(len(self)), left)
            batch = next(iter(loader.epoch(rest, order=np.concatenate([left, others]))))
            is_left = torch.isin(batch.index, torch.from_numpy(left).to(batch.index.device))
            yield Batch(batch.views, torch.where(is_left, batch.index, -1), batch.label)

    def _plain(self) -> Iterator[Batch]:
        own = self._own
        done = 0
        settings: dict[str, Any] = {"num_workers": self._num_workers, "corrupt": self._corrupt, "device": self._device}
        for images, label in plain_batches(self._source, self._views, indices=own, batch=self._batch, **settings):
            index = torch.from_numpy(own[done : done + len(images)])
            done += len(images)
            yield Batch([images], index.to(self._device), label)

    def close(self) -> None:
        """End the workers."""
        if self._loader is not None:
            self._loader.close()
