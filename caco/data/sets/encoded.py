"""Sets whose encoded images lie inside other files, which another library reads: Hugging Face `datasets` and
WebDataset's shards.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from caco import distributed
from caco.data.sets.content import LOOK_BYTES, digest_of, in_threads, look_at
from caco.data.sets.reading import UnreadableImage, rgb
from caco.data.sets.sources import Source
from caco.data.sets.stored import shown, stored
from caco.saying import Say, silent


class EncodedImages(Source):
    """Images by position, decoded as those in files are.

    Args:
        content: position -> the encoded image, bytes or a view of them; may be called by threads and in forked
            processes.
        names: bytes [M], what each position is called in the digest and in errors.
        at: int64 [N], the positions that this set has; None: all.
        channels: as of Source.
    """

    def __init__(
        self, content: Callable[[int], Any], names: np.ndarray, *, name: str, labels: np.ndarray | None = None,
        classes: list[str] | None = None, at: np.ndarray | None = None, channels: int | None = None,
    ):  # fmt: skip
        self._content, self._names, self._at = content, names, np.arange(len(names)) if at is None else at
        self.name, self.classes, self.channels = name, classes, channels
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self._looks: np.ndarray | None = None
        assert self.labels is None or len(self.labels) == len(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def image(self, index: int) -> Image.Image:
        return rgb(self._encoded(index), self._called(index)) if self.channels is None else shown(self.pixels(index))

    def pixels(self, index: int) -> np.ndarray:
        if self.channels is None:
            return np.asarray(self.image(index))
        return stored(bytes(self._encoded(index)), self._called(index), self.channels)

    def part(self, indices: np.ndarray, name: str) -> "EncodedImages":
        labels = None if self.labels is None else self.labels[indices]
        return EncodedImages(
            self._content,
            self._names,
            name=name,
            labels=labels,
            classes=self.classes,
            at=self._at[indices],
            channels=self.channels,
        )

    def digest(self) -> str:
        self._look_at_all(silent)
        assert self._looks is not None
        return digest_of(self._names[self._at], self._looks, self.labels)

    def look(self, say: Say = silent) -> None:
        if distributed.is_main():  # which alone is asked for digests
            self._look_at_all(say)

    def _look_at_all(self, say: Say) -> None:
        if self._looks is None:
            looks = in_threads(
                lambda i: look_at(self._content(int(self._at[i]))),
                len(self),
                say=say,
                what=f"images of {self.name} looked at",
            )
            self._looks = np.frombuffer(b"".join(looks), np.uint8).reshape(-1, LOOK_BYTES)

    def _encoded(self, index: int) -> Any:
        try:
            return self._content(int(self._at[index]))
        except OSError as error:
            raise UnreadableImage(
                f"{self._called(index)}: expected an image that can be read, got {type(error).__name__}:"
                f" {error.strerror}"
            ) from error

    def _called(self, index: int) -> str:
        return self._names[self._at[index]].decode(errors="backslashreplace")
