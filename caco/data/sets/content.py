"""What the images in files are known by: the one home of the rule for digests, for caches and for the overlap check.

A look at a file is a hash of its size and of some of its content: all of a small file, else its first, middle and last
4 KiB. Two photographs that differ do so there, also where they have the same name and size: a JPEG's bytes after a
changed one are others to the end, and an uncompressed image has its edges and its middle there. A look opens a file
once and reads no more than is in it, so 1.3 million of them take no longer than reading these files once; they are
taken by threads, and by all ranks together.

Two things are made of looks, which need different things:
- A digest says which images these are, and is part of what a run is: a checkpoint is gone on from only with the same
  one. It is made of names, looks, order and labels. Times and inodes are not in it: a folder that was copied to another
  machine, or touched, holds the same images.
- A cache key is for what is kept on this machine in place of reading the images again. It is made of the digest and of
  each file's modification time and inode: these change with every file that was written anew, exchanged or moved here,
  also where a change of a few bytes escapes the look. That it changes with a copy too costs no more than computing
  again.

Within a process a look is taken once, and again when the file's size, times or inode have changed.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from caco.errors import FileError
from caco.saying import Say, counted, silent

BLOCK = 4096
LOOK_BYTES = 16
_THREADS = 16  # most of their time is waiting for a disk or a network
_CHUNK = 256

T = TypeVar("T")


def in_threads(
    work: Callable[[int], T], count: int, *, say: Say = silent, what: str = "", threads: int = _THREADS
) -> list[T]:
    """work(0), ..., work(count - 1), by some threads at once; `what` is said with how far they are, now and then.

    Raises:
        Exception: the first one that `work` raised.
    """
    results: list[T] = []
    chunks = [range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    with ThreadPoolExecutor(min(threads, max(1, len(chunks)))) as pool, counted(say, what, count) as count_on:
        try:
            for made in pool.map(lambda chunk: [work(i) for i in chunk], chunks):
                results += made
                count_on(len(made))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def look_at(content: Any) -> bytes:
    """The look at a file with this content (bytes, or an array of them)."""
    size = len(content)
    state = hashlib.blake2b(b"%d\0" % size, digest_size=LOOK_BYTES)
    for first, last in _looked_at(size):
        state.update(content[first:last])
    return state.digest()


def _looked_at(size: int) -> list[tuple[int, int]]:
    """Which bytes of a file of this size are looked at."""
    if size <= 3 * BLOCK:
        return [(0, size)]
    return [(first, first + BLOCK) for first in (0, (size - BLOCK) // 2, size - BLOCK)]


def _look(path: str, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        state = hashlib.blake2b(b"%d\0" % size, digest_size=LOOK_BYTES)
        for first, last in _looked_at(size):
            state.update(os.pread(descriptor, last - first, first))
        return state.digest()
    finally:
        os.close(descriptor)


def _stamp(status: os.stat_result) -> int:
    """What a file is as long as nobody writes it; 0 where it was written just now, and might be again within one tick
    of the clock.
    """
    if time.time_ns() - status.st_ctime_ns < 2_000_000_000:
        return 0
    # The change time is the system's own: nobody can set it back, as one can the modification time.
    return hash((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)) | 1


class Looks:
    """Looks at the files of a set, shared by all of its parts.

    Args:
        path_of: position in the set -> the file's path.
        count: files in the set.
    """

    def __init__(self, path_of: Callable[[int], str], count: int) -> None:
        self._path_of, self._count = path_of, count
        # Made when first needed: a set of a million files that nobody asks for its digest takes no memory for it.
        self._stamps: np.ndarray | None = None
        self._looks: np.ndarray | None = None

    def of(self, at: np.ndarray, *, say: Say = silent, what: str = "files looked at") -> tuple[np.ndarray, np.ndarray]:
        """Looks, uint8 [n, 16], and (modification time in ns, inode), int64 [n, 2], of the files at these positions.

        Raises:
            FileError: a file is not there, or cannot be read.
        """
        stamps, looks = self._memory()

        def one(i: int) -> tuple[int, int]:
            position = int(at[i])
            with self._at_hand(position) as path:
                status = os.stat(path)
                stamp = _stamp(status)
                if stamp == 0 or stamps[position] != stamp:
                    looks[position] = np.frombuffer(_look(path, status.st_size), np.uint8)
                    stamps[position] = stamp
            return status.st_mtime_ns, status.st_ino & (2**63 - 1)

        written = in_threads(one, len(at), say=say, what=what)
        return looks[at], np.array(written, dtype=np.int64).reshape(-1, 2)

    def together(self, at: np.ndarray, *, say: Say = silent, what: str = "files looked at") -> None:
        """Take these looks, each rank a share of them; afterwards each rank has all. A collective.

        Raises:
            FileError: on every rank, where a file cannot be read on one.
        """
        from caco import distributed  # here and not above: it imports torch, which looking at a folder does not need

        if distributed.world() == 1:
            self.of(at, say=say, what=what)
            return
        shares = [at[rank :: distributed.world()] for rank in range(distributed.world())]
        found = distributed.together(lambda: self.of(shares[distributed.rank()], say=say, what=what)[0])
        stamps, looks = self._memory()
        for share, theirs in zip(shares, found, strict=True):
            looks[share] = theirs

        others = np.setdiff1d(at, shares[distributed.rank()])
        stamps[others] = in_threads(lambda i: self._stamped(int(others[i])), len(others))

    def _stamped(self, position: int) -> int:
        with self._at_hand(position) as path:
            return _stamp(os.stat(path))

    @contextlib.contextmanager
    def _at_hand(self, position: int) -> Iterator[str]:
        """A file's path, for what reads it: of one that cannot be read it is said which."""
        path = self._path_of(position)
        try:
            yield path
        except OSError as error:
            raise FileError(
                f"{path}: expected an image that can be read, got {type(error).__name__}: {error.strerror}"
            ) from error

    def _memory(self) -> tuple[np.ndarray, np.ndarray]:
        if self._stamps is None or self._looks is None:
            self._stamps, self._looks = np.zeros(self._count, np.int64), np.zeros((self._count, LOOK_BYTES), np.uint8)
        return self._stamps, self._looks


def digest_of(names: np.ndarray, looks: np.ndarray, labels: np.ndarray | None) -> str:
    """Sixteen hexadecimal digits of images in files: names below their root, looks, labels, and the order of all
    these.
    """
    state = hashlib.blake2b(digest_size=8)
    for name, look in zip(names, looks, strict=True):
        state.update(b"%s\0%s" % (name, look.tobytes()))
    state.update(b"" if labels is None else labels.tobytes())
    return state.hexdigest()


def cache_key_of(digest: str, written: np.ndarray) -> str:
    """A digest that knows besides when each file was written, and as which inode: see above."""
    return hashlib.blake2b(digest.encode() + written.tobytes(), digest_size=8).hexdigest()
