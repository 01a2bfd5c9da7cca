"""Sets whose encoded images lie inside other files that another library reads: Hugging Face `datasets` and the shards
of WebDataset.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from caco import distributed
from caco.data.sets.content import LOOK_BYTES, digest_of, in_threads, look_at
from caco.data.sets.memory import all_decoded, decoded_image, picked
from caco.data.sets.reading import UnreadableImage, rgb
from caco.data.sets.sources import Arrays, Source
from caco.data.sets.stored import shown, stored
from caco.saying import Say, silent


class EncodedImages(Source):
    """Encoded images that are reached by position. They are decoded in the same way as images in files.

    Args:
        content: position -> the encoded image, bytes or a view of bytes. Threads and forked processes call it.
        names: bytes [M], the name of each position, for the digest and for errors.
        name: name of the set.
        labels: int64 [N], or None.
        classes: classes[label] is the name of a class.
        at: int64 [N], the positions that this set has; None takes all.
        channels, damaged: as in `Source`.
        decoded: each image's array, if the images are in memory.
    """

    def __init__(
        self, content: Callable[[int], Any], names: np.ndarray, *, name: str, labels: np.ndarray | None = None,
        classes: list[str] | None = None, at: np.ndarray | None = None, channels: int | None = None,
        decoded: Arrays | None = None, damaged: Mapping[int, UnreadableImage] = {},
    ):  # fmt: skip
        self._content, self._names, self._at = content, names, np.arange(len(names)) if at is None else at
        self.name, self.classes, self.channels = name, classes, channels
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self._decoded, self.damaged = decoded, damaged
        self.arrays = decoded if channels is None else None
        self._looks: np.ndarray | None = None
        assert self.labels is None or len(self.labels) == len(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def encoded(self, index: int) -> Any:
        return self._content_of(index) if self.channels is None else None

    def image(self, index: int) -> Image.Image:
        made = decoded_image(self, index, self._decoded, self._read)
        return shown(made) if isinstance(made, np.ndarray) else made

    def pixels(self, index: int) -> np.ndarray:
        return np.asarray(decoded_image(self, index, self._decoded, self._read))

    def _read(self, index: int) -> Image.Image | np.ndarray:
        content, name = self._content_of(index), self._called(index)
        return rgb(content, name) if self.channels is None else stored(bytes(content), name, self.channels)

    def part(self, indices: np.ndarray, name: str) -> "EncodedImages":
        labels = None if self.labels is None else self.labels[indices]
        decoded = None if self._decoded is None else picked(self._decoded, indices)
        damaged = {place: self.damaged[index] for place, index in enumerate(indices.tolist()) if index in self.damaged}
        return EncodedImages(
            self._content, self._names, name=name, labels=labels, classes=self.classes, at=self._at[indices],
            channels=self.channels, decoded=decoded, damaged=damaged,
        )  # fmt: skip

    def in_memory(self, max_mb: int) -> "EncodedImages":
        made = all_decoded(self, max_mb, self._decoded_bytes)
        if made is None:
            return self
        decoded, damaged = made
        return EncodedImages(
            self._content, self._names, name=self.name, labels=self.labels, classes=self.classes, at=self._at,
            channels=self.channels, decoded=decoded, damaged=damaged,
        )  # fmt: skip

    def _decoded_bytes(self, index: int) -> int:
        try:
            return self.pixels(index).nbytes
        except UnreadableImage:
            return 0  # the error comes when the image is read

    def digest(self) -> str:
        self._look_at_all(silent)
        assert self._looks is not None
        return digest_of(self._names[self._at], self._looks, self.labels)

    def look(self, say: Say = silent) -> None:
        if distributed.is_main():  # only this rank computes digests
            self._look_at_all(say)

    def _look_at_all(self, say: Say) -> None:
        if self._looks is None:
            looks = in_threads(
                lambda i: look_at(self._content_of(i)),
                len(self),
                say=say,
                what=f"images of {self.name} looked at",
            )
            self._looks = np.frombuffer(b"".join(looks), np.uint8).reshape(-1, LOOK_BYTES)

    def _content_of(self, index: int) -> Any:
        try:
            return self._content(int(self._at[index]))
        except OSError as error:
            raise UnreadableImage(
                f"{self._called(index)}: expected an image that can be read, got {type(error).__name__}:"
                f" {error.strerror}"
            ) from error

    def _called(self, index: int) -> str:
        return self._names[self._at[index]].decode(errors="backslashreplace")
