"""Sets of images: what a source is, files on disk, arrays in memory, seeded parts of either."""

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
MOST_CLASSES = 1_000_000  # a classifier has a row for each, so a larger label is a slip, an identity say

P = ParamSpec("P")
Arrays = Sequence[np.ndarray] | np.ndarray  # images as uint8 [H, W, 3], one by one or as [N, H, W, 3]


class Packed(Protocol):
    """Images that lie encoded in one file mapped into memory, a .beton: compiled views and FFCV read them without
    Python.

    file: the .beton. at: int64 [N], where in it each image of the set stands.
    """

    file: Path
    at: np.ndarray

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Where the images at these positions of the set lie in memory: `native.IMAGE` [n], for the compiled views."""

    def unreadable(self, index: int) -> UnreadableImage:
        """The error that names an image of which the compiled code says that it cannot be decoded."""


class Source(Protocol):
    """A map-style set of images: the contract of whatever is trained on, evaluated on or written to a file.

    A set of one's own derives from it, and has then no arrays, paths or file unless it says so. Loaders fork their
    workers and share a set among them: nothing in it may change, and only `image` is called there. A set is asked what
    it can do, never what it is.

    name: for people and the record. labels: int64 [N] (of VOC2007 [N, classes]); None where there are none. classes:
    classes[label] is a class's name; None where nobody knows. arrays: all images where they are in memory: loaders then
    make views of them without calling `image`. channels: None of photographs; else images are as they are stored, with
    so many channels, in whatever numbers: loaders call `pixels`, and `arrays` and `packed` are None. damaged: of those
    in memory, what `image` raises, by position; something of no meaning stands for them in `arrays`.
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
        """The image at a position, RGB; the same one at each call. Where `channels` says that it is none, a picture for
        people.

        Raises:
            UnreadableImage: the loader then ends the run, or lets another image stand in for it.
        """

    def pixels(self, index: int) -> np.ndarray:
        """The image's numbers: uint8 [H, W, 3], or as they are stored, [H, W, channels].

        Raises:
            UnreadableImage: as of `image`.
        """
        return np.asarray(self.image(index))

    @abstractmethod
    def part(self, indices: np.ndarray, name: str) -> "Source":
        """The images at these positions, in their order, under a name of their own: for limits, shares and validation
        images.
        """

    @abstractmethod
    def digest(self) -> str:
        """A short hash that changes when the images, their order or their labels do. A checkpoint is gone on from only
        with the same one, so what does not change an image (a root, a time, a copy) is not in it:
        caco/data/sets/content.py has the rule.
        """

    def cache_key(self) -> str:
        """A short hash by which what was computed of the images is found again on this machine: it changes with the
        digest, and where files may have been written anew. The digest, of a set that is not in files."""
        return self.digest()

    def look(self, say: Say = silent) -> None:
        """Find out, all ranks together, what `digest`, `cache_key` and `looks` need to know of the images, where that
        means reading them. A collective; without it each rank that needs them does it by itself."""
        return None

    def looks(self) -> np.ndarray | None:
        """uint8 [N, 16], of each image as it lies encoded in a file; None where images do not."""
        return None

    def in_memory(self, max_mb: int) -> "Source":
        """The same set with its images decoded once, where that can be done and takes no more than `max_mb`; else
        itself.
        """
        return self

    def path(self, index: int) -> Path | None:
        """The file that holds the image and nothing else; None, for every image alike, where there are no such
        files.
        """
        return None

    @property
    def packed(self) -> Packed | None:
        """The images as they lie encoded in one file; None where they do not."""
        return None


@dataclass(frozen=True)
class Splits:
    """What one run reads: images to pre-train on, and labelled ones to evaluate with.

    mean, std: of each channel, where images are as they are stored (Source.channels) and somebody gave them; None has
    them measured.
    """

    pretrain: Source
    train: Source | None
    test: Source | None
    mean: list[float] | None = None
    std: list[float] | None = None

    def labelled(self, purpose: str) -> tuple[Source, Source]:
        """The labelled (train, test) pair, or an error that says what `purpose` lacks.

        Raises:
            ValueError: a split is missing or has no labels.
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
    """Sixteen hexadecimal digits of the images and labels of a set in parts, however a seed has parted and ordered
    it.
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
    """The labels of a set that is known to have them, from `Splits.labelled` say."""
    assert source.labels is not None, f"{source.name}: labelled"
    return source.labels


def whole_labels(labels: Any, where: str) -> np.ndarray:
    """Labels that somebody supplies, as int64 [N].

    Args:
        where: what the error calls the set.
    Raises:
        UserError: they are no class's whole number for each image; names the first one that is not.
    """
    try:
        given = np.asarray(labels)
    except ValueError:  # of lists of different lengths
        given = np.empty((0, 0), object)
    if given.ndim != 1 or given.dtype.kind not in "iuf":
        raise UserError(
            f"{where}: expected labels that are one whole number for each image, got {given.dtype} {list(given.shape)}"
        )
    with np.errstate(invalid="ignore"):
        fits = (given >= 0) & (given < MOST_CLASSES) & (given == np.floor(given))
    if not fits.all():
        first = int(np.flatnonzero(~fits)[0])
        raise UserError(
            f"{where}: expected labels that are whole numbers from 0 to {MOST_CLASSES - 1:,}, got {given[first]} for"
            f" image {first}"
        )
    return given.astype(np.int64)


def holds(num_images: int) -> Callable[[Callable[P, Splits]], Callable[P, Splits]]:
    """Declares of a function that reads a published set how many images it gives to train on, for who plans without
    having it.
    """

    def declare(read: Callable[P, Splits]) -> Callable[P, Splits]:
        setattr(read, "num_images", num_images)
        return read

    return declare


def num_images_of(read: Callable[..., Splits]) -> int | None:
    """As `holds` declares it; None of a set that has no one size."""
    return getattr(read, "num_images", None)


class ImagesInMemory(Source):
    """Images as uint8 arrays [H, W, 3]; one array [N, H, W, 3] or any sequence of them."""

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
    """Image files below a root, read when asked for; with `in_memory`, decoded once."""

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
            decoded: each image's array, where they are in memory.
            of: the looks of the set that this is a part of, and the positions there.
        """
        assert labels is None or len(labels) == len(files)
        self.root = Path(root)
        # One array of bytes, not a list of strings: forked workers would copy a list's pages by counting references.
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

    def image(self, index: int) -> Image.Image:
        if self.channels is not None:
            return shown(self.pixels(index))
        if index in self.damaged:
            raise UnreadableImage(str(self.damaged[index]))
        if self.arrays is not None:
            return Image.fromarray(self.arrays[index])
        return read_image(self.path(index))

    def pixels(self, index: int) -> np.ndarray:
        if self.channels is None:
            return np.asarray(self.image(index))
        if index in self.damaged:
            raise UnreadableImage(str(self.damaged[index]))
        return self._decoded[index] if self._decoded is not None else read_stored(self.path(index), self.channels)

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
        """The same set decoded once, if that takes no more than `max_mb`; else itself."""
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
            return 0  # it will be named when it is read
        return 3 * width * height

    def digest(self) -> str:
        # Of the files also when decoded: how a set is held must not change what it is called.
        return digest_of(self._files, self.looks(), self.labels)

    def cache_key(self) -> str:
        looks, written = self._looks.of(self._at)
        return cache_key_of(digest_of(self._files, looks, self.labels), written)

    def look(self, say: Say = silent) -> None:
        self._looks.together(self._at, say=say, what=f"files of {self.name} looked at")

    def looks(self) -> np.ndarray:
        return self._looks.of(self._at)[0]


def all_decoded(
    source: Source, max_mb: int, bytes_of: Callable[[int], int]
) -> tuple[list[np.ndarray], dict[int, UnreadableImage]] | None:
    """Each image's array, and what is said of those that cannot be read; None where these take more than `max_mb`.

    Args:
        bytes_of: how many an image takes when it is decoded; asked of some.
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
    """`count` of `total` positions, ascending; a smaller count is a subset of a larger one.

    Args:
        labels: int64 [total]; None draws without regard to classes.
        balanced: equally many of each class (as far as the classes go) rather than in proportion to their sizes.
    Raises:
        ValueError: count is not in 1..total.
    """
    if not 1 <= count <= total:
        raise UserError(f"expected a number of images in 1..{total}, got {count}")
    draw = np.random.default_rng(seed).permutation(total)
    if labels is None:
        return np.sort(draw[:count])
    by_class = draw[np.argsort(labels[draw], kind="stable")]
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(total) - np.repeat(starts, sizes)
    # Ties (the r-th images of all classes) fall as in the draw, so no class is always the one that gets the odd image.
    turn = np.empty(total)
    turn[by_class] = rank if balanced else (rank + 0.5) / np.repeat(sizes, sizes)
    return np.sort(draw[np.argsort(turn[draw], kind="stable")][:count])


def picked(images: Arrays, indices: np.ndarray) -> Arrays:
    if isinstance(images, np.ndarray):
        return images[indices]
    return [images[i] for i in indices]
