"""Passes over the whole training set beside the training: for clusters, labels and memories that a method makes anew."""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch

from caco.data.loaders.batches import Batch
from caco.data.loaders.bound import BoundLoader
from caco.data.loaders.plain import plain_batches
from caco.data.sets.sources import Source
from caco.data.views.augmentation import Views


class Images:
    """Called with "plain" or "train": an iterator over this rank's batches of one pass.

    plain: every image once over all ranks, unaugmented, one view, in order; the last batch may be smaller. train: the training's own
    augmented views, of full batches, in an order and with randomness that depend on the seed and `stream` alone.

    Args:
        bind: makes a loader of the training's batches, when the first pass of kind "train" needs one.
        batch: images of this rank in a plain batch; rank, world: whose, of how many; corrupt: as of the loader.
    """

    def __init__(
        self, source: Source, views: Views, bind: Callable[[], BoundLoader], *, batch: int, device: torch.device, rank: int = 0,
        world: int = 1, corrupt: Literal["fail", "skip"] = "fail",
    ):  # fmt: skip
        self._source, self._views, self._bind, self._batch, self._device = source, views, bind, batch, device
        self._own = np.array_split(np.arange(len(source)), world)[rank]
        self._corrupt = corrupt
        self._loader: BoundLoader | None = None

    def __len__(self) -> int:
        return len(self._source)

    def __call__(self, kind: str, *, stream: int = 0) -> Iterator[Batch]:
        if kind == "plain":
            yield from self._plain()
        elif kind == "train":
            self._loader = self._loader or self._bind()
            yield from self._loader.epoch(-1_000_000_000 - stream)  # far from the epochs of any warm start
        else:
            raise ValueError(f"images: expected plain or train, got {kind!r}")

    def _plain(self) -> Iterator[Batch]:
        own = self._own
        done = 0
        for images, label in plain_batches(self._source.part(own, self._source.name), self._views, batch=self._batch, corrupt=self._corrupt):
            index = torch.from_numpy(own[done : done + len(images)])
            done += len(images)
            yield Batch([images.to(self._device)], index.to(self._device), label.to(self._device))

    def close(self) -> None:
        """End the workers."""
        if self._loader is not None:
            self._loader.close()
