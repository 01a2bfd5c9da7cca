"""Passes over the whole training set, in addition to the training steps, for methods that cluster or label the images
or compute a memory of their features.
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
    """Called with "plain" or "train", it gives an iterator over this rank's batches of one pass.

    plain: all ranks together see every image once, in order, without augmentation, one view; the last batch may be
    smaller. train: all ranks together see every image once, in whole batches of the training's own augmented views; the
    order and the randomness depend on the seed and `stream` alone. The last batch is filled up with further images,
    whose index is -1.

    Args:
        source, views: the training images and their views.
        bind: makes a loader of training batches; it is called for the first pass of kind "train".
        batch: number of images of this rank in a plain batch.
        device: where batches are put.
        rank, world: number of this rank, and number of ranks.
        num_workers: threads or processes that read the images of a plain pass.
        corrupt: as in the loader.
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
        # Far from the negative epoch numbers of any warm start.
        whole, rest = -1_000_000_000 - stream, -2_000_000_000 - stream
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
        """End the workers of the "train" loader."""
        if self._loader is not None:
            self._loader.close()
