"""Sets made from what a user's own program has: arrays, sequences of images, PyTorch datasets."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from caco.data.sets.labels import whole_labels
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.sources import Source, UnreadableImage
from caco.errors import UserError


class Indexed(Protocol):
    """A map-style dataset, as PyTorch has them. An item is an image, or a tuple that begins with an image and its
    label.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def rgb(image: Any, name: str) -> Image.Image:
    """Convert a Pillow image, or an array uint8 [H, W, 3] or [H, W], to an RGB image.

    Args:
        name: what errors call the image.
    Raises:
        UserError: it is neither, or its values are not 8-bit.
    """
    if isinstance(image, np.ndarray):
        if (
            image.dtype != np.uint8
            or image.ndim not in (2, 3)
            or image.ndim == 3
            and image.shape[2] != 3
            or not image.size
        ):
            raise UserError(
                f"{name}: expected an image as uint8 [H, W, 3] or [H, W], got {image.dtype} {list(image.shape)}"
            )
        image = Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        raise UserError(
            f"{name}: expected an image of Pillow's or an array uint8 [H, W, 3], got {type(image).__name__}:"
            " remove the transform that converts it, for example that of a dataset; caco resizes and normalises images"
            " itself"
        )
    if image.mode not in ("RGB", "L", "P", "1", "RGBA", "CMYK", "YCbCr"):
        raise UserError(f"{name}: expected an image of 8 bits, RGB or grey, got Pillow's mode {image.mode}")
    return image.convert("RGB")


class DatasetImages(Source):
    """The images of a user's map-style dataset, read at each access.

    Args:
        dataset: items are images, or tuples that begin with an image.
        labels: int64 [N], or None.
        indices: int64 [N], the dataset's items that this set has; None takes all.
        classes: classes[label] is the name of a class.
    """

    def __init__(
        self,
        dataset: Indexed,
        *,
        name: str,
        labels: np.ndarray | None,
        indices: np.ndarray | None = None,
        classes: list[str] | None = None,
    ):
        self._dataset, self.name, self.classes = dataset, name, classes
        self._indices = np.arange(len(dataset)) if indices is None else indices
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Image.Image:
        item = self._dataset[int(self._indices[index])]
        try:
            return rgb(
                item[0] if isinstance(item, (tuple, list)) else item, f"{self.name}, image {self._indices[index]}"
            )
        except UserError as error:
            raise UnreadableImage(str(error)) from error

    def part(self, indices: np.ndarray, name: str) -> "DatasetImages":
        labels = None if self.labels is None else self.labels[indices]
        return DatasetImages(
            self._dataset, name=name, labels=labels, indices=self._indices[indices], classes=self.classes
        )

    def digest(self) -> str:
        state = hashlib.blake2b(b"" if self.labels is None else self.labels.tobytes(), digest_size=8)
        for index in range(len(self)):
            image = self.image(index)
            state.update(repr(image.size).encode())
            state.update(image.tobytes())
        return state.hexdigest()


def as_source(images: Any, *, labels: Any = None, name: str = "images") -> Source:
    """Make a set from the images of a program, in any common form.

    Args:
        images: uint8 [N, H, W, 3] or a list of uint8 [H, W, 3]; a list of Pillow images; a map-style dataset whose
            items are images, or tuples (image, label); a pair (images, labels) of these; or a caco set.
        labels: int [N]; None takes the dataset's `targets` or `labels`, or else the labels of its items, if it has any.
        name: name of the set in messages.
    Raises:
        UserError: `images` has none of these forms, is empty, or does not have one label for each image.
    """
    if all(hasattr(images, part) for part in ("image", "part", "digest")):
        return images  # it is a caco set already
    if isinstance(images, tuple) and len(images) == 2 and labels is None:
        images, labels = images
    try:
        number = len(images)
        first = images[0] if number else None
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"{name}: expected arrays, Pillow images or a dataset with a length and an index, got"
            f" {type(images).__name__}"
        ) from error
    if not number:
        raise UserError(f"{name}: expected images, got none")
    rgb(first[0] if isinstance(first, (tuple, list)) else first, f"{name}, image 0")
    classes = list(images.classes) if isinstance(getattr(images, "classes", None), Sequence) else None
    labels = _labels(images, first, labels, name)
    if labels is not None and labels.shape != (number,):
        raise UserError(f"{name}: expected a label for each of {number} images, got {list(labels.shape)}")
    if isinstance(first, np.ndarray) and first.ndim == 3 and isinstance(images, (np.ndarray, list, tuple)):
        wrong = next(
            (at for at, one in enumerate(images) if one.dtype != np.uint8 or one.ndim != 3 or one.shape[2] != 3), None
        )
        if wrong is not None:
            rgb(images[wrong], f"{name}, image {wrong}")
        else:
            return ImagesInMemory(
                images if isinstance(images, np.ndarray) else list(images), name=name, labels=labels, classes=classes
            )
    return DatasetImages(images, name=name, labels=labels, classes=classes)


def _labels(images: Any, first: Any, labels: Any, name: str) -> np.ndarray | None:
    if labels is None:
        labels = next(
            (value for key in ("targets", "labels") if (value := getattr(images, key, None)) is not None), None
        )
    if labels is None and isinstance(first, (tuple, list)) and len(first) > 1:
        labels = [images[index][1] for index in range(len(images))]
    return None if labels is None else whole_labels(labels, name)
