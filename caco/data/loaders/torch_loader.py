"""The loader that needs only torch: compiled views of images in memory, or worker processes that read files."""

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch

from caco.data.loaders.batches import (
    Compiled,
    Order,
    Pixels,
    first_readable,
    mixed_seed,
    pixels,
    refuse_unreadable,
    those_after,
)
from caco.data.loaders.bound import BoundLoader, Loader, Made
from caco.data.loaders.workers import ahead_of, in_order
from caco.data.sets.sources import Source, UnreadableImage
from caco.data.views import native
from caco.data.views.augmentation import Views
from caco.ranges import Ahead, Workers, held


class TorchLoader(Loader):
    """Settings of a loader that needs only torch; `bind` combines them with data.

    For images in memory, one compiled call makes a batch, with threads. Forked worker processes serve image files, and
    all images if nothing was compiled. The bits are the same in all cases.

    Args:
        num_workers: threads or processes that make views; 0 makes a batch in the training process when it is needed.
        prefetch: number of batches that are prepared ahead; with processes, by each process.
        corrupt: whether an unreadable image ends the run (fail), or the next readable image stands in for it (skip).
    Raises:
        UserError: num_workers is negative, prefetch is below 1, or `corrupt` is another word.
    """

    @held
    def __init__(self, *, num_workers: Workers = 2, prefetch: Ahead = 4, corrupt: Literal["fail", "skip"] = "fail"):
        self.num_workers, self.prefetch, self.corrupt = num_workers, prefetch, corrupt

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
    ) -> BoundLoader:
        """As `Loader.bind`.

        Raises:
            UserError: there are fewer images than one batch, or the ranks cannot share a batch evenly.
            UnreadableImage: an image is known to be unreadable, and `corrupt` is fail.
        """
        device = torch.device(device)
        refuse_unreadable(source, self.corrupt)

        def maker(order: Order) -> Iterable[Made]:
            if source.arrays is not None and native.library() is not None:
                return InMemory(source, views, seed, order, self.num_workers, self.prefetch, device)
            patches = 0 if views.patches is None else math.prod(views.kinds.shape_of_patches(1))
            values = views.kinds.channels * sum(size * size for size in views.sizes) + patches
            bytes_of_image = values * views.dtype.itemsize + 16  # 16 for the index and the label
            make = ViewMaker(source, views, seed, self.corrupt)
            return in_order(make, order, self.num_workers, ahead=self.prefetch, item_bytes=order.size * bytes_of_image)

        return BoundLoader(
            maker, source, views, batch=batch, seed=seed, rank=rank, world=world, device=device, drop_last=drop_last
        )


class ViewMaker:
    """(epoch, indices) -> the pixels of all views. An UnreadableImage is returned, not raised."""

    def __init__(self, source: Source, views: Views, seed: int, corrupt: str):
        self.source, self.views, self.seed, self.corrupt = source, views, seed, corrupt

    def __call__(self, key: tuple[int, np.ndarray]) -> Pixels | UnreadableImage:
        epoch, indices = key
        try:
            read = [self._read(index) for index in indices.tolist()]
        except UnreadableImage as error:
            return error  # the training process raises it; raised here, it would arrive as a page of traceback
        made = self.views.batch_pixels([image for _, image in read], indices, mixed_seed(self.seed, epoch))
        taken = np.array([index for index, _ in read])
        return pixels([torch.from_numpy(view) for view in made], self.source, indices, taken)

    def _read(self, index: int) -> tuple[int, np.ndarray]:
        try:
            return index, self.source.pixels(index)
        except UnreadableImage:
            if self.corrupt == "fail":
                raise
        return first_readable(index, self.source)


class InMemory:
    """Batches of images in memory. One compiled call makes each batch, and up to `ahead` batches are made in
    advance."""

    def __init__(
        self,
        source: Source,
        views: Views,
        seed: int,
        keys: Iterable,
        num_workers: int,
        ahead: int,
        device: torch.device,
    ):
        self.source, self.seed, self.keys = source, seed, keys
        self.ahead = ahead if num_workers else 0
        self.make_views = Compiled(views, device, max(1, num_workers))
        images = source.arrays
        assert images is not None, "in memory"
        # STL-10 is a mapped array whose axes are not in the usual order, so each batch's images are copied first.
        self.mapped = images if isinstance(images, np.ndarray) and not images.flags.c_contiguous else None
        self.table = native.table(images) if self.mapped is None else None
        self.shown = np.arange(len(source))  # the image to use for each image: itself, or the one that stands in for it
        for index in source.damaged:
            self.shown[index] = next(other for other in those_after(index, source) if other not in source.damaged)

    def __iter__(self) -> Iterator[Pixels]:
        return ahead_of(self.make, self.keys, self.ahead)

    def make(self, key: tuple[int, np.ndarray]) -> Pixels:
        epoch, indices = key
        taken = self.shown[indices]
        if self.mapped is not None:
            images = np.ascontiguousarray(self.mapped[taken])  # must stay alive until the views are made
        rows = native.table(images) if self.table is None else self.table[taken]
        made, _ = self.make_views(rows, indices, mixed_seed(self.seed, epoch))
        return pixels(made, self.source, indices, taken)
