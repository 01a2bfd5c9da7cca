"""Every image once, as evaluations see it: read and decoded by as many workers as training has."""

from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch

from caco.data.loaders.batches import Pixels, pixels
from caco.data.loaders.bound import Made, device_batches
from caco.data.loaders.workers import ahead_of, begin, data_loader
from caco.data.sets.sources import Source, UnreadableImage
from caco.data.views import native
from caco.data.views.augmentation import Views
from caco.errors import UserError

# Pixels that a worker makes at once. Some twenty such pieces are under way at a time, however large batch and images are.
_PIECE_BYTES = 2**23


def plain_batches(
    source: Source, views: Views, *, batch: int, num_workers: int = 0, device: torch.device | str = "cpu"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every image once, in order, as evaluations see it: (images float32 [b, 3, H, W], labels int64 [b], -1 unlabelled).

    The last batch may be smaller.

    Args:
        num_workers: threads (of images in memory, or in a .beton) or forked processes (of files) that read, decode and resize; 0 does
            it when a batch is asked for.
        device: where the images are put; a GPU is sent bytes and normalises them.
    """
    device = torch.device(device)
    for one in device_batches(plain_pixels(source, views, batch=batch, num_workers=num_workers), views, device, {}):
        yield one.views[0], one.label


def plain_pixels(source: Source, views: Views, *, batch: int, num_workers: int = 0) -> Generator[Made, None, None]:
    """As `plain_batches`, before normalisation and on the CPU: a view uint8 [b, H, W, 3]; an UnreadableImage ends it."""
    if batch < 1:
        raise UserError(f"batch: expected at least 1, got {batch}")
    piece = max(1, min(batch, _PIECE_BYTES // (3 * views.size**2)))
    pieces = [
        np.arange(first, min(first + piece, begun + batch, len(source)))
        for begun in range(0, len(source), batch)
        for first in range(begun, min(begun + batch, len(source)), piece)
    ]
    maker = PlainMaker(source, views, num_threads=max(1, num_workers))
    if maker.rows is not None:
        made: Iterator[Made] = ahead_of(maker.__getitem__, pieces, 1 if num_workers else 0)
    else:
        made = begin(data_loader(maker, pieces, min(num_workers, len(pieces))))
    try:
        while True:
            parts: list[Pixels] = []
            while sum(len(part.index) for part in parts) < batch and (part := next(made, None)) is not None:
                if isinstance(part, UnreadableImage):
                    yield part
                    return
                parts.append(part)
            if not parts:
                return
            yield parts[0] if len(parts) == 1 else _joined(parts)
    finally:
        # As in `device_batches`: an exception's traceback keeps this frame, and with it DataLoader's iterator.
        del made


def _joined(parts: list[Pixels]) -> Pixels:
    view = torch.cat([part.views[0] for part in parts])
    stand_ins = [pair for part in parts for pair in part.stand_ins]
    return Pixels([view], torch.cat([part.index for part in parts]), torch.cat([part.label for part in parts]), stand_ins)


class PlainMaker:
    """The dataset of evaluations: indices to the pixels of plain views.

    rows: of images that compiled code reads where they lie, in memory or in a .beton, where in memory those at some indices are; None
    of those that have to be read and decoded one by one.
    """

    def __init__(self, source: Source, views: Views, *, num_threads: int = 1):
        self.source, self.views, self.num_threads = source, views, num_threads
        self.rows = _rows_of(source) if views.plain_is_compiled else None

    def __getitem__(self, indices: np.ndarray) -> Pixels | UnreadableImage:
        try:
            made = self._make(indices)
        except UnreadableImage as error:
            return error
        return pixels([torch.from_numpy(made)], self.source, indices, indices)

    def _make(self, indices: np.ndarray) -> np.ndarray:
        if self.rows is not None:
            rows, _images = self.rows(indices)  # which have to live until the views are made
            made, unreadable = self.views.plain_batch(rows, num_threads=self.num_threads)
            for row in np.flatnonzero(unreadable):
                assert self.source.packed is not None, "images in memory are decoded"
                raise self.source.packed.unreadable(indices[row])
            return made
        images = [self.source.image(index) for index in indices.tolist()]
        if not self.views.plain_is_compiled:
            return np.stack([self.views.plain_pixels(image) for image in images])
        arrays = [np.ascontiguousarray(image) for image in images]
        return self.views.plain_batch(native.table(arrays))[0]


def _rows_of(source: Source) -> Callable[[np.ndarray], tuple[np.ndarray, object]] | None:
    packed, arrays = source.packed, source.arrays
    if arrays is not None:
        if isinstance(arrays, np.ndarray):  # mapped perhaps, in an order of its own: a batch of it is copied when it is made

            def copied(indices: np.ndarray) -> tuple[np.ndarray, object]:
                images = np.ascontiguousarray(arrays[indices])
                return native.table(images), images

            return copied
        table = native.table(arrays)
        return lambda indices: (table[indices], arrays)
    if packed is not None and native.turbojpeg() is not None:
        return lambda indices: (packed.rows(indices), packed)
    return None
