"""The loader that needs only torch: threads of compiled code that read images and make views, or worker processes."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Literal

import numpy as np
import torch

from caco.data.loaders.batches import (
    Compiled,
    Order,
    Pixels,
    mixed_seed,
    pixels,
    readable,
    refuse_unreadable,
)
from caco.data.loaders.bound import BoundLoader, Loader, Made
from caco.data.loaders.rows import RowReader, Rows, rows_of
from caco.data.loaders.workers import ahead_of, in_order
from caco.data.sets.sources import Source, UnreadableImage
from caco.data.views.augmentation import Views
from caco.ranges import Ahead, Workers, held


class TorchLoader(Loader):
    """Settings of a loader that needs only torch; `bind` combines them with data.

    For images in memory, for JPEGs in files or elsewhere, and for a .beton, one compiled call makes a batch, with
    threads. Forked worker processes read all other images, and JPEGs too if nothing was compiled or libturbojpeg is
    missing. The bits are the same in all cases.

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
            if (rows := rows_of(source, max(1, self.num_workers))) is not None:
                return InPlace(source, rows, views, seed, self.corrupt, order, self.num_workers, self.prefetch, device)
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
            read = [readable(index, self.source, self.corrupt) for index in indices.tolist()]
        except UnreadableImage as error:
            return error  # the training process raises it; raised here, it would arrive as a page of traceback
        made = self.views.batch_pixels([image for _, image in read], indices, mixed_seed(self.seed, epoch))
        taken = np.array([index for index, _ in read])
        return pixels([torch.from_numpy(view) for view in made], self.source, indices, taken)


class InPlace:
    """Batches of images that the compiled code reads by itself. One compiled call makes each batch, and up to `ahead`
    batches are made in advance."""

    def __init__(
        self,
        source: Source,
        rows: Rows,
        views: Views,
        seed: int,
        corrupt: str,
        keys: Iterable,
        num_workers: int,
        ahead: int,
        device: torch.device,
    ):
        self.source, self.seed, self.keys = source, seed, keys
        self.ahead = ahead if num_workers else 0
        num_threads = max(1, num_workers)
        self.reader = RowReader(source, rows, corrupt, same_class=False, num_threads=num_threads)
        self.make_views = Compiled(views, device, num_threads)

    def __iter__(self) -> Iterator[Made]:
        return ahead_of(self.make, self.keys, self.ahead)

    def make(self, key: tuple[int, np.ndarray]) -> Made:
        epoch, indices = key
        make = partial(self.make_views, stream=mixed_seed(self.seed, epoch))
        try:
            made, taken = self.reader.views(indices, make)
        except UnreadableImage as error:
            return error
        return pixels(made, self.source, indices, taken)
