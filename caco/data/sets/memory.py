"""Images decoded in memory: a set of them (`ImagesInMemory`), and the decoding of all images of another set."""

import hashlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from caco.data.sets.reading import UnreadableImage
from caco.data.sets.sources import Arrays, Source


class ImagesInMemory(Source):
    """Images in memory: one array uint8 [N, H, W, 3], or any sequence of arrays uint8 [H, W, 3]."""

    arrays: Arrays

    def __init__(
        self, images: Arrays, *, name: str, labels: np.ndarray | None = None, classes: list[str] | None = None
    ):
        assert labels is None or len(labels) == len(images)
        self.arrays = images
        self.name = name
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.arrays)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.arrays[index]))

    def part(self, indices: np.ndarray, name: str) -> "ImagesInMemory":
        labels = None if self.labels is None else self.labels[indices]
        return ImagesInMemory(picked(self.arrays, indices), name=name, labels=labels, classes=self.classes)

    def digest(self) -> str:
        state = hashlib.blake2b(digest_size=8)
        for image in self.arrays:
            state.update(repr(image.shape).encode())
            state.update(np.ascontiguousarray(image).data)
        state.update(b"" if self.labels is None else self.labels.tobytes())
        return state.hexdigest()


def decoded_image(
    source: Source, index: int, in_memory: Arrays | None, read: Callable[[int], Image.Image | np.ndarray]
) -> Image.Image | np.ndarray:
    """The image at a position of a set that may be in memory: RGB for photographs; an array [H, W, channels] for a set
    with `channels`.

    Args:
        in_memory: each image's array; None if the images are not in memory.
        read: position -> the image, if it has to be read.
    Raises:
        UnreadableImage: the image is among the set's damaged ones, or `read` raised it.
    """
    if index in source.damaged:
        raise UnreadableImage(str(source.damaged[index]))
    if in_memory is None:
        return read(index)
    return Image.fromarray(in_memory[index]) if source.channels is None else in_memory[index]


def all_decoded(
    source: Source, max_mb: int, bytes_of: Callable[[int], int]
) -> tuple[list[np.ndarray], dict[int, UnreadableImage]] | None:
    """Decode all images of a set: each image's array, and the errors of unreadable images by position. None if the
    arrays take more than `max_mb`.

    Args:
        bytes_of: position -> bytes of the decoded image. It is called for 16 images to estimate the total.
    """
    budget = max_mb * 2**20
    sample = np.unique(np.linspace(0, len(source) - 1, 16).astype(int))
    if budget == 0 or np.mean([bytes_of(i) for i in sample]) * len(source) > budget:
        return None
    decoded, used, damaged = list[np.ndarray](), 0, dict[int, UnreadableImage]()
    for i in range(len(source)):
        try:
            decoded.append(source.pixels(i))
        except UnreadableImage as error:
            damaged[i] = error
            decoded.append(np.zeros((1, 1, source.channels or 3), np.uint8))
        used += decoded[-1].nbytes
        if used > budget:
            return None
    return decoded, damaged


def picked(images: Arrays, indices: np.ndarray) -> Arrays:
    if isinstance(images, np.ndarray):
        return images[indices]
    return [images[i] for i in indices]
