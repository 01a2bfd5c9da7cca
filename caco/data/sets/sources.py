"""Sets of images: the contract of a set (`Source`), sets in files and in memory, and seeded subsets of either."""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, Protocol

import numpy as np
from PIL import Image

from caco.data.sets.content import Looks, cache_key_of, digest_of
from caco.data.sets.reading import UnreadableImage, read_image, size_of
from caco.data.sets.stored import read_stored, shown
from caco.errors import UserError
from caco.saying import Say, silent

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")

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


class ImageFiles(Source):
    """Image files below a root folder, read at each access; `in_memory` decodes them once."""

    def __init__(
        self,
        root: Path,
        files: np.ndarray | Sequence[str],
        *,
        name: str,
        labels: np.ndarray | None = None,
        classes: list[str] | None = None,
        decoded: Arrays | None = None,
        damaged: Mapping[int, UnreadableImage] = {},
        of: tuple[Looks, np.ndarray] | None = None,
        channels: int | None = None,
    ):
        """
        Args:
            files: the files' names below `root`, as strings or as an array of bytes.
            decoded: each image's array, if the images are in memory.
            of: for a subset of another set, the fingerprints (`Looks`) of that set and the positions in it.
        """
        assert labels is None or len(labels) == len(files)
        self.root = Path(root)
        # One array of bytes, not a list of strings: counting references to the strings would make forked workers copy
        # the list's memory pages.
        self._files = files if isinstance(files, np.ndarray) else np.array([os.fsencode(file) for file in files])
        self.name = name
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes = classes
        self._decoded, self.damaged, self.channels = decoded, damaged, channels
        self.arrays = decoded if channels is None else None
        if of is None:
            every, top = self._files, str(self.root)
            of = Looks(lambda i: f"{top}/{os.fsdecode(every[i])}", len(every)), np.arange(len(every))
        self._looks: Looks = of[0]
        self._at: np.ndarray = of[1]

    def __len__(self) -> int:
        return len(self._files)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._files[index])

    def encoded(self, index: int) -> Path | None:
        return self.path(index) if self.channels is None else None

    def image(self, index: int) -> Image.Image:
        made = decoded_image(self, index, self._decoded, self._read)
        return shown(made) if isinstance(made, np.ndarray) else made

    def pixels(self, index: int) -> np.ndarray:
        return np.asarray(decoded_image(self, index, self._decoded, self._read))

    def _read(self, index: int) -> Image.Image | np.ndarray:
        path = self.path(index)
        return read_image(path) if self.channels is None else read_stored(path, self.channels)

    def part(self, indices: np.ndarray, name: str) -> "ImageFiles":
        labels = None if self.labels is None else self.labels[indices]
        decoded = None if self._decoded is None else picked(self._decoded, indices)
        damaged = {place: self.damaged[index] for place, index in enumerate(indices.tolist()) if index in self.damaged}
        of = self._looks, self._at[indices]
        return ImageFiles(
            self.root, self._files[indices], name=name, labels=labels, classes=self.classes, decoded=decoded,
            damaged=damaged, of=of,
            channels=self.channels,
        )  # fmt: skip

    def in_memory(self, max_mb: int) -> "ImageFiles":
        """The same set decoded once, if the images take at most `max_mb`; otherwise the set itself."""
        made = all_decoded(self, max_mb, self._decoded_bytes)
        if made is None:
            return self
        (decoded, damaged), of = made, (self._looks, self._at)
        return ImageFiles(
            self.root, self._files, name=self.name, labels=self.labels, classes=self.classes, decoded=decoded,
            damaged=damaged, of=of,
            channels=self.channels,
        )  # fmt: skip

    def _decoded_bytes(self, index: int) -> int:
        try:
            if self.channels is not None:
                return self.pixels(index).nbytes
            width, height = size_of(self.path(index))
        except UnreadableImage:
            return 0  # the error comes when the image is read
        return 3 * width * height

    def digest(self) -> str:
        # Also for decoded images, from the files: the digest must not depend on whether the images are in memory.
        return digest_of(self._files, self.looks(), self.labels)

    def cache_key(self) -> str:
        looks, written = self._looks.of(self._at)
        return cache_key_of(digest_of(self._files, looks, self.labels), written)

    def look(self, say: Say = silent) -> None:
        self._looks.together(self._at, say=say, what=f"files of {self.name} looked at")

    def looks(self) -> np.ndarray:
        return self._looks.of(self._at)[0]


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


def choose(labels: np.ndarray | None, count: int, total: int, *, seed: int, balanced: bool) -> np.ndarray:
    """Draw `count` of the positions 0..total - 1; they are returned in ascending order. With the same seed, a smaller
    count gives a subset of a larger one.

    Args:
        labels: int64 [total]; None draws without regard to classes.
        balanced: draw equally many of each class, as far as the classes reach; otherwise in proportion to their sizes.
    Raises:
        UserError: count is not in 1..total.
    """
    if not 1 <= count <= total:
        raise UserError(f"expected a number of images in 1..{total}, got {count}")
    draw = np.random.default_rng(seed).permutation(total)
    if labels is None:
        return np.sort(draw[:count])
    by_class = draw[np.argsort(labels[draw], kind="stable")]
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(total) - np.repeat(starts, sizes)
    # The draw's order breaks ties between the r-th images of all classes, so no class always gets the odd image.
    turn = np.empty(total)
    turn[by_class] = rank if balanced else (rank + 0.5) / np.repeat(sizes, sizes)
    return np.sort(draw[np.argsort(turn[draw], kind="stable")][:count])


def picked(images: Arrays, indices: np.ndarray) -> Arrays:
    if isinstance(images, np.ndarray):
        return images[indices]
    return [images[i] for i in indices]
