"""A pass over a set as evaluations make it: every image once, without augmentation, read by as many workers as in
training."""

import contextlib
import sys
from collections.abc import Generator, Iterator
from typing import Literal

import numpy as np
import torch
from PIL import Image

from caco.data.loaders.batches import Memory, Pixels, called, pixels, readable
from caco.data.loaders.bound import Made, device_batches
from caco.data.loaders.rows import RowReader, Rows, rows_of
from caco.data.loaders.workers import ahead_of, in_order
from caco.data.sets.sources import Source, UnreadableImage
from caco.data.views import native
from caco.data.views.augmentation import Views
from caco.errors import UserError

# Bytes of pixels that a worker process makes at once. About twenty such pieces are in progress at a time, however large
# the batch and the images are.
_PIECE_BYTES = 2**23


def plain_batches(
    source: Source,
    views: Views,
    *,
    batch: int,
    indices: np.ndarray | None = None,
    num_workers: int = 0,
    corrupt: Literal["fail", "skip"] = "fail",
    device: torch.device | str = "cpu",
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every image once, in order, without augmentation. Yields (images float32 [b, 3, H, W], labels int64 [b]), where a
    label of -1 means unlabelled.

    The last batch may be smaller.

    Args:
        indices: int64, positions of the images to read; None reads all.
        num_workers: threads (for images in memory, for JPEGs and for a .beton) or forked processes (for other files)
            that read, decode and resize; 0 does this in the calling process when a batch is needed.
        corrupt: whether an unreadable image is an error (fail), or the next image of its class in the whole set stands
            in for it (skip). So labels stay right, and the choice does not depend on which images are read together. A
            message at the end counts these images.
        device: where the images are put; a GPU receives bytes and normalises them.
    Raises:
        UserError: batch is below 1.
        UnreadableImage: an image cannot be read, and `corrupt` is fail or no other image can stand in for it.
    """
    device = torch.device(device)
    # The compiled code can normalise at little cost; a GPU is sent bytes instead, a quarter of the data.
    dtype = torch.float32 if device.type == "cpu" and views.colours == "rgb" else torch.uint8
    made = _pass(source, views, dtype, device, batch=batch, indices=indices, num_workers=num_workers, corrupt=corrupt)
    with contextlib.closing(made):
        for one in device_batches(made, source, views, device, {}):
            yield one.views[0], one.label


def plain_pixels(
    source: Source,
    views: Views,
    *,
    batch: int,
    indices: np.ndarray | None = None,
    num_workers: int = 0,
    corrupt: Literal["fail", "skip"] = "fail",
) -> Generator[Made, None, None]:
    """Like `plain_batches`, but before normalisation and on the CPU: a view uint8 [b, H, W, 3]. The next batch may
    reuse its memory. Instead of raising it, this yields an UnreadableImage, which ends the pass."""
    return _pass(
        source, views, torch.uint8, torch.device("cpu"), batch=batch, indices=indices, num_workers=num_workers,
        corrupt=corrupt,
    )  # fmt: skip


def _pass(
    source: Source,
    views: Views,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int,
    indices: np.ndarray | None,
    num_workers: int,
    corrupt: str,
) -> Generator[Made, None, None]:
    """The batches of `plain_batches` on the CPU. Those that the compiled code makes alone are of this type: uint8, or
    float32 and normalised. All others are of the views' own type, before normalisation.

    Args:
        device: where the batches go from here; for a GPU they are put into pinned memory if possible.
    """
    if batch < 1:
        raise UserError(f"batch: expected at least 1, got {batch}")
    indices = np.arange(len(source)) if indices is None else indices
    batches = [indices[first : first + batch] for first in range(0, len(indices), batch)]
    stand_ins: list[tuple[int, int]] = []
    num_threads = max(1, num_workers)
    rows = rows_of(source, num_threads) if views.plain_is_compiled else None
    with contextlib.ExitStack() as stack:
        if rows is not None:
            size = batch
            in_place = PlainInPlace(source, rows, views, corrupt, dtype, device, num_threads=num_threads)
            made: Iterator[Made] = stack.enter_context(
                contextlib.closing(ahead_of(in_place, batches, 1 if num_workers else 0))
            )
        else:
            num_bytes = views.kinds.channels * views.dtype.itemsize * views.size**2
            size = max(1, min(batch, _PIECE_BYTES // num_bytes))
            pieces = [one[first : first + size] for one in batches for first in range(0, len(one), size)]
            maker, item_bytes = PlainMaker(source, views, corrupt), size * (num_bytes + 16)
            workers = in_order(maker, pieces, min(num_workers, len(pieces)), item_bytes=item_bytes)
            stack.enter_context(contextlib.closing(workers))
            made = iter(workers)
        memory = Memory(device)
        for one in batches:
            joined = _joined(made, len(one), size, memory)
            if isinstance(joined, Pixels):
                stand_ins += joined.stand_ins
                joined.stand_ins.clear()  # one message at the end reports all of them
            yield joined
    if stand_ins:
        shown = ", ".join(called(source, index) for index, _ in stand_ins[:3]) + (", ..." if len(stand_ins) > 3 else "")
        print(
            f"caco: {len(stand_ins)} of the {len(indices)} images of {source.name} cannot be read; the next of their"
            f" class stand in for them: {shown}",
            file=sys.stderr,
        )


def _joined(pieces: Iterator[Made], count: int, size: int, memory: Memory) -> Made:
    """Join pieces of at most `size` images into a batch of `count` images; an UnreadableImage among them is returned
    instead."""
    if count <= size:
        return next(pieces)
    whole, indices, labels, stand_ins = None, [], [], list[tuple[int, int]]()
    for first in range(0, count, size):
        part = next(pieces)
        if isinstance(part, UnreadableImage):
            return part
        (views,) = part.views
        if whole is None:
            whole = memory.take((count, *views.shape[1:]), views.dtype)
        whole[first : first + size] = views  # a copy, because the next piece may reuse its memory
        indices.append(part.index)
        labels.append(part.label)
        stand_ins += part.stand_ins
    assert whole is not None
    return Pixels([whole], torch.cat(indices), torch.cat(labels), stand_ins)


class PlainInPlace:
    """Indices -> a batch of plain views of images that the compiled code reads by itself. An UnreadableImage is
    returned, not raised.

    Args:
        rows: the result of `rows_of`.
        dtype, device: as in `_pass`.
    """

    def __init__(
        self,
        source: Source,
        rows: Rows,
        views: Views,
        corrupt: str,
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_threads: int,
    ):
        self.source, self.views, self.dtype, self.num_threads = source, views, dtype, num_threads
        self.reader = RowReader(source, rows, corrupt, same_class=True, num_threads=num_threads)
        self.memory = Memory(device)

    def __call__(self, indices: np.ndarray) -> Made:
        try:
            made, taken = self.reader.views(indices, self._make)
        except UnreadableImage as error:
            return error
        return pixels(made, self.source, indices, taken)

    def _make(self, rows: np.ndarray, _samples: np.ndarray) -> tuple[list[torch.Tensor], np.ndarray]:
        made = self.memory.take((len(rows), self.views.size, self.views.size, 3), self.dtype)
        return [made], self.views.plain_batch(rows, made.numpy(), num_threads=self.num_threads)


class PlainMaker:
    """Indices -> the pixels of plain views of images that are read one by one. An UnreadableImage is returned, not
    raised."""

    def __init__(self, source: Source, views: Views, corrupt: str):
        self.source, self.views, self.corrupt = source, views, corrupt

    def __call__(self, indices: np.ndarray) -> Made:
        shape = (len(indices), self.views.size, self.views.size, self.views.kinds.channels)
        made, taken = np.empty(shape, self.views.dtype), indices.copy()
        try:
            for row, index in enumerate(indices.tolist()):
                taken[row], image = readable(index, self.source, self.corrupt, same_class=True)
                self._make(image, made[row : row + 1])
        except UnreadableImage as error:
            return error
        return pixels([torch.from_numpy(made)], self.source, indices, taken)

    def _make(self, image: np.ndarray, out: np.ndarray) -> None:
        if self.views.plain_is_compiled:
            image = np.ascontiguousarray(image)  # held by a name, because it must live until its view is made
            self.views.plain_batch(native.table([image]), out)
        else:
            out[0] = self.views.plain_pixels(image if self.views.channels is not None else Image.fromarray(image))
