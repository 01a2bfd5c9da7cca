"""Every image once, as evaluations see it."""

from collections.abc import Iterator

import numpy as np
import torch

from caco.data.loaders.batches import Pixels, pixels
from caco.data.loaders.bound import device_batches
from caco.data.loaders.workers import begin, data_loader
from caco.data.sets.sources import Source, UnreadableImage
from caco.data.views import native
from caco.data.views.augmentation import Views
from caco.errors import UserError


def plain_batches(
    source: Source, views: Views, *, batch: int, num_workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every image once, in order, as evaluations see it: (images float32 [b, 3, H, W], labels int64 [b], -1 unlabelled).

    The last batch may be smaller.
    """
    if batch < 1:
        raise UserError(f"batch: expected at least 1, got {batch}")
    parts = [np.arange(i, min(i + batch, len(source))) for i in range(0, len(source), batch)]
    loader = data_loader(PlainMaker(source, views), parts, num_workers)
    for one in device_batches(begin(loader), views, torch.device("cpu"), {}):
        yield one.views[0], one.label


class PlainMaker:
    """The dataset of evaluations: indices to the pixels of plain views."""

    def __init__(self, source: Source, views: Views):
        self.source, self.views = source, views

    def __getitem__(self, indices: np.ndarray) -> Pixels | UnreadableImage:
        try:
            made = self._make(indices)
        except UnreadableImage as error:
            return error
        return pixels([torch.from_numpy(made)], self.source, indices, indices)

    def _make(self, indices: np.ndarray) -> np.ndarray:
        packed = self.source.packed
        if packed is None or native.library() is None or native.turbojpeg() is None:
            return np.stack([self.views.plain_pixels(self.source.image(index)) for index in indices.tolist()])
        made, unreadable = self.views.plain_batch(packed.rows(indices), num_threads=torch.get_num_threads())
        for row in np.flatnonzero(unreadable):
            raise packed.unreadable(indices[row])
        return made
