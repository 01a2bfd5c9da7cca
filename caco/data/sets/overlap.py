"""Finds images that two sets share. Files are compared by their looks (short fingerprints, see content.py) and then
byte by byte; other images are compared by their sizes and then by their pixels.
"""

import contextlib
import ctypes
import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from caco import distributed
from caco.data.sets.content import in_threads
from caco.data.sets.reading import UnreadableImage, file_content, size_of
from caco.data.sets.sources import Source, Splits
from caco.errors import UserError
from caco.saying import Say, silent

_KEY_BYTES = 16
R = TypeVar("R")


class Overlap:
    """Finds images that sets share. What was read of a set is kept, so that one set can be compared with many.

    Every method is a collective: each rank does a share of the reading, and all ranks have the whole answer.

    Args:
        say: receives the progress of slow steps.
    """

    def __init__(self, say: Say = silent) -> None:
        self._say = say
        # The keys are ids of sets. Each value holds its set, so that the set stays alive and its id is not reused.
        self._seen: dict[int, tuple[Source, np.ndarray | None]] = {}
        self._sizes: dict[int, tuple[Source, np.ndarray]] = {}
        self._hashes: dict[tuple[int, str], tuple[Source, dict[int, bytes]]] = {}

    def shared(self, train: Source, test: Source) -> list[tuple[int, int]]:
        """Find every test image that is also a training image: (position in train, position in test) pairs, one for
        each such test image.

        If both sets have looks, files are compared byte by byte; only files whose looks are equal are read as a whole.
        Otherwise images are compared by their pixels; only images whose height and width also occur in the other set
        are decoded. So a file and its decoded copy count as the same image, a re-encoded copy does not.
        """
        if len(train) == 0 or len(test) == 0:
            return []
        cheap = [self._looks(train), self._looks(test)]
        whole = _content
        if any(looks is None for looks in cheap):
            cheap, whole = [self._shapes(train), self._shapes(test)], _pixels
        ours, theirs = (_rows(one) for one in cheap if one is not None)
        both = np.intersect1d(ours, theirs)
        where = [np.flatnonzero(np.isin(one, both)) for one in (ours, theirs)]
        found: dict[bytes, int] = {}
        for key, i in zip(self._hashed(train, where[0], whole), where[0].tolist(), strict=True):
            found.setdefault(key, i)
        pairs = zip(self._hashed(test, where[1], whole), where[1].tolist(), strict=True)
        return sorted((found[key], j) for key, j in pairs if key in found)

    def refuse(self, train: Source, test: Source) -> None:
        """Check that two sets share no image.

        Raises:
            UserError: they share images; the message names the first ones.
        """
        pairs = self.shared(train, test)
        if pairs:
            shown = "; ".join(f"{_called(train, i)} is {_called(test, j)}" for i, j in pairs[:3])
            raise UserError(
                f"{len(pairs)} of the {len(test)} images of {test.name} are images of {train.name} too"
                f" ({shown}{'; ...' if len(pairs) > 3 else ''}): expected test images that are not trained on."
                " Remove them from one of the sets, or evaluate anyway with overlap=allow"
            )

    def refuse_in(self, splits: Splits) -> None:
        """Check that no test image is among the images that are trained on, labelled or not.

        Raises:
            UserError: there is such an image.
        """
        if splits.test is None:
            return
        for train in {id(source): source for source in (splits.train, splits.pretrain) if source is not None}.values():
            self.refuse(train, splits.test)

    def _looks(self, source: Source) -> np.ndarray | None:
        if id(source) not in self._seen:
            source.look(self._say)
            self._seen[id(source)] = source, source.looks()
        return self._seen[id(source)][1]

    def _shapes(self, source: Source) -> np.ndarray:
        """int32 [N, 2], the shorter and the longer side of each image."""
        if id(source) not in self._sizes:
            made = self._shared_out(source, range(len(source)), _shape, f"sizes of the images of {source.name}")
            self._sizes[id(source)] = source, np.sort(np.array(made, dtype=np.int32), axis=1)
        return self._sizes[id(source)][1]

    def _hashed(self, source: Source, indices: np.ndarray, whole: Callable[[Source, int], bytes]) -> list[bytes]:
        """A hash of each of these images, of its content or its pixels as `whole` gives them. Each is computed once."""
        _, known = self._hashes.setdefault((id(source), whole.__name__), (source, {}))
        todo = [i for i in indices.tolist() if i not in known]
        what = f"images of {source.name} compared as a whole"
        known.update(zip(todo, self._shared_out(source, todo, lambda s, i: _hash(whole(s, i)), what), strict=True))
        return [known[i] for i in indices.tolist()]

    def _shared_out(
        self, source: Source, indices: Sequence[int], work: Callable[[Source, int], R], what: str
    ) -> list[R]:
        """[work(source, i) for each index], with the work divided among the ranks."""
        rank, world = distributed.rank(), distributed.world()
        own = indices[rank::world]
        parts = distributed.together(
            lambda: in_threads(lambda i: work(source, own[i]), len(own), say=self._say, what=what)
        )
        made: list[R | None] = [None] * len(indices)
        for number, part in enumerate(parts):
            made[number::world] = part
        return made  # type: ignore[return-value]


def shared_images(train: Source, test: Source) -> list[tuple[int, int]]:
    """Like Overlap.shared, for two sets that are compared only once."""
    return Overlap().shared(train, test)


def _rows(table: np.ndarray) -> np.ndarray:
    """Each row of [N, n] as one value that can be compared: [N]."""
    return np.ascontiguousarray(table).view(f"V{table.dtype.itemsize * table.shape[1]}").ravel()


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()


def _content(source: Source, index: int) -> bytes:
    """The bytes of an encoded image."""
    path = source.path(index)
    if path is not None:
        return file_content(path)
    assert source.packed is not None, "a set with looks has its images in files"
    (row,) = source.packed.rows(np.array([index]))
    return ctypes.string_at(int(row["data"]), int(row["bytes"]))


def _pixels(source: Source, index: int) -> bytes:
    try:
        pixels = source.pixels(index)
    except UnreadableImage:
        # Equal to no other image; whoever uses the image will report that it is unreadable.
        return f"{id(source)} {index}".encode()
    return repr(pixels.shape).encode() + pixels.tobytes()


def _shape(source: Source, index: int) -> tuple[int, ...]:
    """The lengths of the image's two sides, in either order, without decoding the image where possible; (0, 0) for an
    unreadable image."""
    if source.arrays is not None:
        return source.arrays[index].shape[:2]
    if source.packed is not None:
        (row,) = source.packed.rows(np.array([index]))
        return int(row["height"]), int(row["width"])
    path = source.path(index)
    if path is not None:
        with contextlib.suppress(UnreadableImage):
            return size_of(path)
    with contextlib.suppress(UnreadableImage):
        return source.image(index).size
    return 0, 0


def _called(source: Source, index: int) -> str:
    return str(source.path(index) or f"image {index} of {source.name}")
