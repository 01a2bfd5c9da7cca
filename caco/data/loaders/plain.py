"""Every image once, as evaluations see it."""

import sys
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from PIL import Image

from caco.data.loaders.batches import Pixels, called, first_readable, pixels
from caco.data.loaders.bound import device_batches
from caco.data.loaders.workers import in_order
from caco.data.sets.sources import Source, UnreadableImage
from caco.data.views import native
from caco.data.views.augmentation import Views
from caco.errors import UserError


def plain_batches(
    source: Source, views: Views, *, batch: int, num_workers: int = 0, corrupt: Literal["fail", "skip"] = "fail"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every image once, in order, as evaluations see it: (images float32 [b, 3, H, W], labels int64 [b], -1 unlabelled).

    The last batch may be smaller.

    Args:
        corrupt: an image that cannot be read ends it (fail), or the next one of its class stands in for it (skip), so that labels stay
            what they are; which ones, is said at the end.
    """
    if batch < 1:
        raise UserError(f"batch: expected at least 1, got {batch}")
    parts = [np.arange(i, min(i + batch, len(source))) for i in range(0, len(source), batch)]
    made = in_order(PlainMaker(source, views, corrupt), parts, num_workers, item_bytes=batch * (3 * views.size**2 + 16))
    stand_ins: list[tuple[int, int]] = []
    try:
        for one in device_batches(_without(stand_ins, iter(made)), source, views, torch.device("cpu"), {}):
            yield one.views[0], one.label
    finally:
        made.close()
    if stand_ins:
        shown = ", ".join(called(source, index) for index, _ in stand_ins[:3]) + (", ..." if len(stand_ins) > 3 else "")
        print(
            f"caco: {len(stand_ins)} of the {len(source)} images of {source.name} cannot be read; the next of their class stand in for "
            f"them: {shown}",
            file=sys.stderr,
        )


def _without(stand_ins: list[tuple[int, int]], made: Iterator[Pixels | UnreadableImage]) -> Iterator[Pixels | UnreadableImage]:
    """Take note of who stood in for whom, which is said once for all."""
    for one in made:
        if isinstance(one, Pixels):
            stand_ins += one.stand_ins
            one.stand_ins.clear()
        yield one


class PlainMaker:
    """Indices to the pixels of plain views."""

    def __init__(self, source: Source, views: Views, corrupt: str):
        self.source, self.views, self.corrupt = source, views, corrupt

    def __call__(self, indices: np.ndarray) -> Pixels | UnreadableImage:
        try:
            made, taken = self._make(indices)
        except UnreadableImage as error:
            return error
        return pixels([torch.from_numpy(made)], self.source, indices, taken)

    def _make(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pixels, and of which images they are."""
        taken = indices.copy()
        packed = self.source.packed
        if packed is None or native.library() is None or native.turbojpeg() is None:
            made = np.empty((len(indices), self.views.size, self.views.size, 3), np.uint8)
            for row, index in enumerate(indices.tolist()):
                try:
                    made[row] = self.views.plain_pixels(self.source.image(index))
                except UnreadableImage:
                    if self.corrupt == "fail":
                        raise
                    taken[row] = self._stand_in(made, row, index)
            return made, taken
        made, unreadable = self.views.plain_batch(packed.rows(indices), num_threads=torch.get_num_threads())
        for row in np.flatnonzero(unreadable).tolist():
            if self.corrupt == "fail":
                raise packed.unreadable(indices[row])
            taken[row] = self._stand_in(made, row, int(indices[row]))
        return made, taken

    def _stand_in(self, made: np.ndarray, row: int, index: int) -> int:
        other, image = first_readable(index, self.source, same_class=True)
        made[row] = self.views.plain_pixels(Image.fromarray(image))
        return other
