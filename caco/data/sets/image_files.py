"""`ImageFiles`: a set of images that are files of their own below one folder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from caco.data.sets.content import Looks, cache_key_of, digest_of
from caco.data.sets.memory import all_decoded, decoded_image, picked
from caco.data.sets.reading import UnreadableImage, read_image, size_of
from caco.data.sets.sources import Arrays, Source
from caco.data.sets.stored import read_stored, shown
from caco.saying import Say, silent


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
