"""Images that the compiled code reads by itself: in memory, in a .beton, and JPEGs in files or in other encoded sets.
Whatever it does not read, Pillow reads or refuses."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caco.data.loaders.batches import readable
from caco.data.sets.sources import Source, UnreadableImage
from caco.data.views import native

_NUM_LOOKED_AT = 8  # images of an encoded set by which it is decided whether it consists of JPEGs
# Indices -> rows of `native.IMAGE`, and an object that must stay alive while the rows are in use.
Rows = Callable[[np.ndarray], tuple[np.ndarray, Any]]
# Rows of `native.IMAGE`, samples -> a tensor [n, ...] for each view, and bool [n]: which images were not decoded.
MakeViews = Callable[[np.ndarray, np.ndarray], tuple[Sequence[torch.Tensor], np.ndarray]]


def rows_of(source: Source, num_threads: int) -> Rows | None:
    """The rows of a set's images, or None if the images have to be read one by one in Python.

    Encoded images, in files or elsewhere, count as readable by the compiled code if most of them are JPEGs, judging by
    a few of them. If most are not, worker processes read them faster.

    Args:
        num_threads: how many encoded images are fetched at once, if they are not in files of their own.
    """
    if native.library() is None:
        return None
    packed, arrays = source.packed, source.arrays
    if arrays is not None:
        # The array may be a mapped file whose axes are in another order, so each batch is copied.
        if isinstance(arrays, np.ndarray) and not arrays.flags.c_contiguous:

            def copied(indices: np.ndarray) -> tuple[np.ndarray, Any]:
                images = np.ascontiguousarray(arrays[indices])
                return native.table(images), images

            return copied
        table = native.table(arrays)
        return lambda indices: (table[indices], arrays)
    if native.turbojpeg() is None:
        return None
    if packed is not None:
        return lambda indices: (packed.rows(indices), packed)
    if _are_jpegs(source):

        def fetched(indices: np.ndarray) -> tuple[np.ndarray, Any]:
            with ThreadPoolExecutor(num_threads) as threads:
                parts = threads.map(partial(_encoded, source), np.array_split(indices, num_threads))
                return native.encoded_table(list(itertools.chain.from_iterable(parts)))

        return fetched
    return None


def _are_jpegs(source: Source) -> bool:
    looked_at = np.unique(np.linspace(0, len(source) - 1, min(len(source), _NUM_LOOKED_AT)).astype(int))
    return sum(map(_begins_as_jpeg, _encoded(source, looked_at))) > len(looked_at) / 2


def _begins_as_jpeg(image: Any) -> bool:
    if isinstance(image, Path):
        try:
            with open(image, "rb") as file:
                image = file.read(3)
        except OSError:
            return False
    return image is not None and bytes(image[:3]) == b"\xff\xd8\xff"


def _encoded(source: Source, indices: np.ndarray) -> list[Any]:
    images = []
    for index in indices.tolist():
        try:
            images.append(source.encoded(index))
        except UnreadableImage:
            images.append(b"")  # which is not decoded, so the error is raised again where Pillow reads the image
    return images


class RowReader:
    """Makes views of images that the compiled code reads, with Pillow's help, and replaces those that nothing reads.

    Args:
        rows: the result of `rows_of`.
        corrupt: whether an unreadable image is an error (fail), or another image stands in for it (skip).
        same_class: whether the other image has to be of the same class.
        num_threads: how many images Pillow decodes at once.
    """

    def __init__(
        self,
        source: Source,
        rows: Rows,
        corrupt: str,
        *,
        same_class: bool,
        num_threads: int,
    ):
        self.source, self.rows, self.corrupt = source, rows, corrupt
        self.same_class, self.num_threads = same_class, num_threads

    def views(self, indices: np.ndarray, make: MakeViews) -> tuple[list[torch.Tensor], np.ndarray]:
        """The views of these images, and the indices of the images that they come from, int64 [n]. An image that stands
        in for another is augmented with the other's random numbers.

        Raises:
            UnreadableImage: an image cannot be read, and `corrupt` is fail or no other image can stand in for it.
        """
        rows, _alive = self.rows(indices)
        views, not_made = make(rows, indices)
        if self.source.damaged:  # `arrays` holds meaningless images in their places
            not_made = not_made | np.isin(indices, list(self.source.damaged))
        made, taken = list(views), indices.copy()

        def by_pillow(row: int) -> tuple[int, Sequence[torch.Tensor]]:
            index, image = readable(int(indices[row]), self.source, self.corrupt, same_class=self.same_class)
            image = np.ascontiguousarray(image)  # held by a name, because it must live until its views are made
            return index, make(native.table([image]), indices[row : row + 1])[0]

        missing = np.flatnonzero(not_made).tolist()
        with ThreadPoolExecutor(self.num_threads) as threads:
            for row, (index, one) in zip(missing, threads.map(by_pillow, missing), strict=True):
                taken[row] = index
                for view, other in zip(made, one, strict=True):
                    view[row] = other[0]
        return made, taken
