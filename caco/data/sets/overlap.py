"""Images that two sets share, found by the hash of their files or pixels."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from caco.data.sets.sources import Source, Splits
from caco.errors import UserError

_HEAD_BYTES = 4096


def shared_images(train: Source, test: Source) -> list[tuple[int, int]]:
    """(position in train, position in test) of every test image that is also a training image, one pair a test image.

    Files are compared byte by byte: only those of equal size and beginning are read whole. Other images are compared by
    their pixels, so a file and its decoded copy are found, one re-encoded is not.
    """
    if _in_files(train) and _in_files(test):
        heads, theirs = _positions(train, range(len(train)), _head), _positions(test, range(len(test)), _head)
        both = heads.keys() & theirs.keys()
        found = _positions(train, sorted(i for head in both for i in heads[head]), _whole)
        places = _positions(test, sorted(j for head in both for j in theirs[head]), _whole)
    else:
        found, places = _positions(train, range(len(train)), _pixels), _positions(test, range(len(test)), _pixels)
    return sorted((found[key][0], j) for key, positions in places.items() if key in found for j in positions)


def refuse_overlap(splits: Splits) -> None:
    """
    Raises:
        ValueError: a test image is among the images that are trained on, labelled or not.
    """
    if splits.test is None:
        return
    for train in {id(source): source for source in (splits.train, splits.pretrain) if source is not None}.values():
        refuse_shared(train, splits.test)


def refuse_shared(train: Source, test: Source) -> None:
    """
    Raises:
        ValueError: they share images; the first ones are named.
    """
    pairs = shared_images(train, test)
    if pairs:
        shown = "; ".join(f"{_called(train, i)} is {_called(test, j)}" for i, j in pairs[:3])
        raise UserError(
            f"{len(pairs)} of the {len(test)} images of {test.name} are images of {train.name} too ({shown}"
            f"{'; ...' if len(pairs) > 3 else ''}): expected test images that nothing was trained on. Take them out, or "
            "evaluate all the same with overlap=allow"
        )


def _positions(source: Source, indices: Iterable[int], key: Callable[..., bytes]) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = {}
    for i in indices:
        found.setdefault(key(source, i), []).append(i)
    return found


def _in_files(source: Source) -> bool:
    return len(source) > 0 and source.path(0) is not None


def _path(source: Source, index: int) -> Path:
    path = source.path(index)
    assert path is not None, "a file for every image, or for none"
    return path


def _head(source: Source, index: int) -> bytes:
    path = _path(source, index)
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    return hashlib.blake2b(b"%d\0" % path.stat().st_size + head, digest_size=16).digest()


def _whole(source: Source, index: int) -> bytes:
    return hashlib.blake2b(_path(source, index).read_bytes(), digest_size=16).digest()


def _pixels(source: Source, index: int) -> bytes:
    pixels = np.asarray(source.image(index))
    return hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()


def _called(source: Source, index: int) -> str:
    return str(source.path(index) or f"image {index} of {source.name}")
