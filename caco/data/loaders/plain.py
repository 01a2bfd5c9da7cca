"""A pass over a set as evaluations make it: every image once, without augmentation, read by as many workers as in
training."""

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Literal

import numpy as np
import torch
from PIL import Image

from caco.data.loaders.batches import Pixels, called, first_readable, pixels
from caco.data.loaders.bound import Made, device_batches
from caco.data.loaders.workers import ahead_of, in_order
from caco.data.sets.sources import Source, UnreadableImage
from caco.data.views import native
from caco.data.views.augmentation import Views
from caco.errors import UserError

# Bytes of pixels that a worker makes at once. About twenty such pieces are in progress at a time, however large the
# batch and the images are.
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
        num_workers: threads (for images in memory or in a .beton) or forked processes (for files) that read, decode and
            resize; 0 does this in the calling process when a batch is needed.
        corrupt: whether an unreadable image is an error (fail), or the next image of its class in the whole set stands
            in for it (skip). So labels stay right, and the choice does not depend on which images are read together. A
            message at the end counts these images.
        device: where the images are put; a GPU receives bytes and normalises them.
    Raises:
        UserError: batch is below 1.
        UnreadableImage: an image cannot be read, and `corrupt` is fail or no other image can stand in for it.
    """
    with contextlib.closing(
        plain_pixels(source, views, batch=batch, indices=indices, num_workers=num_workers, corrupt=corrupt)
    ) as made:
        for one in device_batches(made, source, views, torch.device(device), {}):
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
    if batch < 1:
        raise UserError(f"batch: expected at least 1, got {batch}")
    indices = np.arange(len(source)) if indices is None else indices
    num_bytes = views.kinds.channels * views.dtype.itemsize * views.size**2
    size = max(1, min(batch, _PIECE_BYTES // num_bytes))
    batches = [indices[first : first + batch] for first in range(0, len(indices), batch)]
    pieces = [one[first : first + size] for one in batches for first in range(0, len(one), size)]
    maker = PlainMaker(source, views, corrupt, num_threads=max(1, num_workers))
    stand_ins: list[tuple[int, int]] = []
    with contextlib.ExitStack() as stack:
        if maker.rows is not None:
            made: Iterator[Made] = stack.enter_context(
                contextlib.closing(ahead_of(maker, pieces, 1 if num_workers else 0))
            )
        else:
            workers = in_order(maker, pieces, min(num_workers, len(pieces)), item_bytes=size * (num_bytes + 16))
            stack.enter_context(contextlib.closing(workers))
            made = iter(workers)
        for one in batches:
            joined = _joined(made, len(one), size)
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


def _joined(pieces: Iterator[Made], count: int, size: int) -> Made:
    """Join pieces of at most `size` images into a batch of `count` images; an UnreadableImage among them is returned
    instead."""
    if count <= size:
        return next(pieces)
    views, indices, labels, stand_ins = [], [], [], list[tuple[int, int]]()
    for _ in range(0, count, size):
        part = next(pieces)
        if isinstance(part, UnreadableImage):
            return part
        views.append(part.views[0].clone())  # the next piece may reuse its memory
        indices.append(part.index)
        labels.append(part.label)
        stand_ins += part.stand_ins
    return Pixels([torch.cat(views)], torch.cat(indices), torch.cat(labels), stand_ins)


class PlainMaker:
    """Indices -> the pixels of plain views. An UnreadableImage is returned, not raised.

    Attributes:
        rows: for images that compiled code can read in place, in memory or in a .beton: a function from indices to
            their addresses; None for images that have to be read and decoded one by one.
    """

    def __init__(self, source: Source, views: Views, corrupt: str, *, num_threads: int = 1):
        self.source, self.views, self.corrupt, self.num_threads = source, views, corrupt, num_threads
        self.rows = _rows_of(source) if views.plain_is_compiled else None

    def __call__(self, indices: np.ndarray) -> Made:
        try:
            made, taken = self._make(indices)
        except UnreadableImage as error:
            return error
        return pixels([torch.from_numpy(made)], self.source, indices, taken)

    def _make(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pixels [n, H, W, C], and the indices of the images that they come from."""
        taken = indices.copy()
        made, wrong = self._where_they_lie(indices) if self.rows is not None else self._one_by_one(indices)
        for row, error in wrong.items():
            if self.corrupt == "fail":
                raise error
            taken[row], image = first_readable(int(indices[row]), self.source, same_class=True)
            made[row] = self._plain(image)
        return made, taken

    def _where_they_lie(self, indices: np.ndarray) -> tuple[np.ndarray, dict[int, UnreadableImage]]:
        """The pixels [n, H, W, C]; and for each row without valid pixels, its error."""
        assert self.rows is not None
        rows, _images = self.rows(indices)  # the second result must stay alive until the views are made
        made, unreadable = self.views.plain_batch(rows, num_threads=self.num_threads)
        damaged, packed = self.source.damaged, self.source.packed
        wrong = {row: damaged[index] for row, index in enumerate(indices.tolist()) if index in damaged}
        for row in np.flatnonzero(unreadable).tolist():
            assert packed is not None, "images in memory are decoded"
            wrong[row] = packed.unreadable(indices[row])
        return made, wrong

    def _one_by_one(self, indices: np.ndarray) -> tuple[np.ndarray, dict[int, UnreadableImage]]:
        made = np.empty((len(indices), self.views.size, self.views.size, self.views.kinds.channels), self.views.dtype)
        read: dict[int, np.ndarray] = {}
        wrong: dict[int, UnreadableImage] = {}
        for row, index in enumerate(indices.tolist()):
            try:
                image = self.source.pixels(index)
            except UnreadableImage as error:
                wrong[row] = error
                if self.corrupt == "fail":
                    break
                continue
            if self.views.plain_is_compiled:
                read[row] = image
            else:
                made[row] = self._plain(image)
        if read:
            arrays = [np.ascontiguousarray(image) for image in read.values()]
            made[list(read)] = self.views.plain_batch(native.table(arrays))[0]
        return made, wrong

    def _plain(self, image: np.ndarray) -> np.ndarray:
        return self.views.plain_pixels(image if self.views.channels is not None else Image.fromarray(image))


def _rows_of(source: Source) -> Callable[[np.ndarray], tuple[np.ndarray, object]] | None:
    packed, arrays = source.packed, source.arrays
    if arrays is not None:
        # The array may be a mapped file whose axes are in another order, so each batch is copied.
        if isinstance(arrays, np.ndarray):

            def copied(indices: np.ndarray) -> tuple[np.ndarray, object]:
                images = np.ascontiguousarray(arrays[indices])
                return native.table(images), images

            return copied
        table = native.table(arrays)
        return lambda indices: (table[indices], arrays)
    if packed is not None and native.turbojpeg() is not None:
        return lambda indices: (packed.rows(indices), packed)
    return None
