"""The contract of a set of images (`Source`), and the sets that one run reads (`Splits`)."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, Protocol

import numpy as np
from PIL import Image

from caco.data.sets.reading import UnreadableImage
from caco.errors import UserError
from caco.saying import Say, silent

P = ParamSpec("P")
Arrays = Sequence[np.ndarray] | np.ndarray  # images as uint8 [H, W, 3], one by one or as [N, H, W, 3]


class Packed(Protocol):
    """Encoded images inside one file that is mapped into memory, a .beton. The compiled views and FFCV read them
    without Python.

    Attributes:
        file: the .beton.
        at: int64 [N], the number that each image of the set has in the file.
    """

    file: Path
    at: np.ndarray

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Addresses and sizes in memory of the images at these positions of the set: `native.IMAGE` [n]."""


class Source(Protocol):
    """A map-style set of images: the contract of every set that is trained on, evaluated on or written to a file.

    To bring a set of your own, derive it from this class; it then has no arrays, paths or file unless you define them.
    Loaders fork worker processes that share the set, so it must not change; workers call `image` or `pixels` only. Of
    a set that gives `encoded` images, threads call these too. The rest of the code asks a set what it can do, never of
    which class it is.

    Attributes:
        name: a name for messages and for the record of results.
        labels: int64 [N], or [N, classes] for VOC2007; None if there are no labels.
        classes: classes[label] is the name of a class; None if the names are unknown.
        arrays: all images, if they are in memory; loaders then make views from them without calling `image`.
        channels: None for photographs. A number means images with that many channels of any numeric type, used as they
            are stored: loaders call `pixels`, and `arrays` and `packed` are None.
        damaged: for images in memory, position -> the error that `image` raises there. `arrays` holds a meaningless
            placeholder at these positions.
    """

    name: str
    labels: np.ndarray | None
    classes: list[str] | None
    arrays: Arrays | None = None
    damaged: Mapping[int, UnreadableImage] = {}
    channels: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many images, N."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The image at a position, RGB. Each call gives the same image. For a set with `channels`, it is a rendering
        for people to look at.

        Raises:
            UnreadableImage: the image is damaged; the loader then ends the run or substitutes another image.
        """

    def pixels(self, index: int) -> np.ndarray:
        """The image's values: uint8 [H, W, 3] for photographs, or [H, W, channels] in the type of the file.

        Raises:
            UnreadableImage: as in `image`.
        """
        return np.asarray(self.image(index))

    @abstractmethod
    def part(self, indices: np.ndarray, name: str) -> "Source":
        """The images at these positions, in this order, as a set with a name of its own. Limits, shares and validation
        images are made with it.
        """

    @abstractmethod
    def digest(self) -> str:
        """A short hash that changes when the images, their order or their labels change.

        A run resumes from a checkpoint only if the digest is the same. So the digest must not depend on anything else,
        such as the root folder, the time or whether files are copies. caco/data/sets/content.py has the rule.
        """

    def cache_key(self) -> str:
        """A short hash under which results computed from the images are cached on this machine. It changes with the
        digest, and also when files may have been rewritten. For a set without files it is the digest.
        """
        return self.digest()

    def look(self, say: Say = silent) -> None:
        """Read, with all ranks sharing the work, whatever `digest`, `cache_key` and `looks` need to know of the images.
        A collective. Without this call, each rank that needs them reads everything by itself.
        """
        return None

    def looks(self) -> np.ndarray | None:
        """A fingerprint of each image's encoded bytes, uint8 [N, 16]; None if the images are not encoded in files."""
        return None

    def in_memory(self, max_mb: int) -> "Source":
        """The same set with all images decoded in memory, if the set supports this and the images take at most
        `max_mb`; otherwise the set itself.
        """
        return self

    def path(self, index: int) -> Path | None:
        """The file that contains this image and nothing else; None, for all images of the set, if there are no such
        files.
        """
        return None

    def encoded(self, index: int) -> Any:
        """The encoded image from which `caco.data.sets.reading.rgb` makes the image at a position: the path of its
        file, or its bytes. Loaders may then decode it without calling `image`. None, for all images of the set, if
        there are no such images.

        Raises:
            UnreadableImage: as in `image`.
        """
        return None

    @property
    def packed(self) -> Packed | None:
        """The encoded images inside one file, if this set is such a file; otherwise None."""
        return None


@dataclass(frozen=True)
class Splits:
    """The images that one run reads: those to pre-train on, and the labelled ones to evaluate with.

    Attributes:
        pretrain: the images to pre-train on.
        train, test: the labelled images; None if there are none.
        mean, std: given statistics of each channel, for images with `Source.channels`; None has them measured.
    """

    pretrain: Source
    train: Source | None
    test: Source | None
    mean: list[float] | None = None
    std: list[float] | None = None

    def labelled(self, purpose: str) -> tuple[Source, Source]:
        """The labelled (train, test) pair.

        Args:
            purpose: what needs the labels, for the error message.
        Raises:
            UserError: a split is missing or has no labels.
        """
        for split, source in (("train", self.train), ("test", self.test)):
            if source is None or source.labels is None:
                raise UserError(
                    f"{purpose} needs labelled train and test images; expected class folders, got no labelled {split}"
                    f" split with {self.pretrain.name}.\nGive data.labelled_root=PATH (train/ and test/ of class"
                    " folders), hold some labelled images out with data.validation_fraction=0.1, or evaluate nothing"
                    " with eval=[]."
                )
        assert self.train is not None and self.test is not None
        return self.train, self.test


def digest_together(parts: Sequence[Source]) -> str:
    """A hash, 16 hexadecimal digits, of the images and labels in several sets together. It does not depend on how they
    are ordered or divided among the sets.
    """
    images = []
    for part in parts:
        looks, labels = part.looks(), labels_of(part)
        if looks is None:
            images.append(part.digest().encode())
        else:
            images += [look.tobytes() + label.tobytes() for look, label in zip(looks, labels, strict=True)]
    return hashlib.blake2b(b"".join(sorted(images)), digest_size=8).hexdigest()


def labels_of(source: Source) -> np.ndarray:
    """The labels, int64 [N], of a set that is known to have labels, as after `Splits.labelled`."""
    assert source.labels is not None, f"{source.name}: labelled"
    return source.labels


def holds(num_images: int) -> Callable[[Callable[P, Splits]], Callable[P, Splits]]:
    """Decorator for a function that reads a published data set: declares how many training images it gives, so that a
    run can be planned before the data is there.
    """

    def declare(read: Callable[P, Splits]) -> Callable[P, Splits]:
        setattr(read, "num_images", num_images)
        return read

    return declare


def num_images_of(read: Callable[..., Splits]) -> int | None:
    """The number of training images declared by `holds`; None if the set has no fixed size."""
    return getattr(read, "num_images", None)
