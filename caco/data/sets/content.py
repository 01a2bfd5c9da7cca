"""How images in files are identified. The rules for digests, for caches and for the overlap check are all here.

A look is a short fingerprint of a file: a hash of its size and of some of its content, namely all of a small file, else
its first, middle and last 4 KiB. Two photographs differ in these parts even if they have the same name and size: in a
JPEG, all bytes after a changed byte are different, and an uncompressed image has its edges and its middle there. A look
opens a file once and reads no more than the file holds, so 1.3 million looks take no longer than reading these files
once. Several threads take looks, and all ranks share the work.

Looks serve two purposes with different needs:
- A digest identifies the images and is part of a run's identity: a run resumes from a checkpoint only if the digest is
  the same. It is made of names, looks, order and labels. It does not depend on times and inodes, because a folder that
  was copied to another machine, or touched, holds the same images.
- A cache key identifies results that are kept on this machine so that the images need not be read again. It is made of
  the digest and of each file's modification time and inode. These change with every file that is rewritten, exchanged
  or moved here, even if the look misses a change of a few bytes. They also change with a copy, which only costs
  computing the results again.

Within a process a look is taken once, and again if the file's size, times or inode have changed.
"""

import contextlib
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from caco.errors import FileError
from caco.saying import Say, counted, silent

BLOCK = 4096
LOOK_BYTES = 16
_THREADS = 16  # the threads mostly wait for a disk or a network
_CHUNK = 64  # one thread tries so many things, or gets so many at once
_FAST_S = 1e-4  # work on one thing that takes less time than this does not wait for anything
_VALID_S = 10.0  # what `Looks.together` found is taken for true for so long

T = TypeVar("T")


def in_threads(
    work: Callable[[int], T], count: int, *, say: Say = silent, what: str = "", threads: int = _THREADS
) -> list[T]:
    """[work(0), ..., work(count - 1)], computed by several threads if the work has to wait, for a disk or a network.

    If it does not wait, because the page cache has the files, threads only wait for one another: 16 of them took three
    to four times as long as one. So one thread works as long as it is fast.

    Args:
        say, what: now and then `say` reports the progress, in which `what` names the things that are counted.
        threads: number of threads at most.
    Raises:
        Exception: the first one that `work` raised.
    """
    results: list[T] = []
    chunks = deque(range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK))
    to_threads = _THREADS  # so many chunks go to the threads before one thread tries again
    with ThreadPoolExecutor(min(threads, max(1, len(chunks)))) as pool, counted(say, what, count) as count_on:
        try:
            while chunks:
                began = time.monotonic()
                tried = chunks.popleft()
                results += [work(i) for i in tried]
                fast = time.monotonic() - began < _FAST_S * len(tried)
                count_on(len(tried))
                if fast:
                    to_threads = _THREADS
                    continue
                for made in pool.map(lambda chunk: [work(i) for i in chunk], list(islice(chunks, to_threads))):
                    results += made
                    count_on(len(made))
                    chunks.popleft()
                to_threads *= 4
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def look_at(content: Any) -> bytes:
    """The look, 16 bytes, at a file with this content (bytes or an array of bytes)."""
    size = len(content)
    state = hashlib.blake2b(b"%d\0" % size, digest_size=LOOK_BYTES)
    for first, last in _looked_at(size):
        state.update(content[first:last])
    return state.digest()


def _looked_at(size: int) -> list[tuple[int, int]]:
    """The ranges [first, last) of bytes that a look reads from a file of this size."""
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
    """A number that stays the same as long as nobody writes the file. It is 0, meaning unknown, for a file written
    within the last two seconds, which could be written again within the same tick of the file system's clock.
    """
    if time.time_ns() - status.st_ctime_ns < 2_000_000_000:
        return 0
    # The change time cannot be set back by a program, as the modification time can.
    return hash((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)) | 1


class Looks:
    """The looks at the files of a set, shared by all subsets of the set.

    Args:
        path_of: position in the set -> the file's path.
        count: number of files in the set.
    """

    def __init__(self, path_of: Callable[[int], str], count: int) -> None:
        self._path_of, self._count = path_of, count
        # These arrays are made when first needed, so that a large set whose digest nobody asks for takes no memory.
        self._stamps: np.ndarray | None = None
        self._looks: np.ndarray | None = None
        # What `together` leaves for the next call of `of`: positions, what `of` returns second, and when it was found.
        self._found: tuple[np.ndarray, np.ndarray, float] | None = None

    def of(self, at: np.ndarray, *, say: Say = silent, what: str = "files looked at") -> tuple[np.ndarray, np.ndarray]:
        """The looks at the files at these positions, uint8 [n, 16], and their (modification time in ns, inode), int64
        [n, 2].

        Args:
            at: int64 [n], positions in the set.
        Raises:
            FileError: a file is missing or cannot be read.
        """
        found, self._found = self._found, None
        valid = found is not None and np.array_equal(found[0], at) and time.monotonic() - found[2] < _VALID_S
        written = found[1] if found and valid else self._visit(at, say, what)
        return self._memory()[1][at], written

    def _visit(self, at: np.ndarray, say: Say, what: str) -> np.ndarray:
        """Look at the files that are new or have changed, and return what `of` returns second."""
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

        return np.array(in_threads(one, len(at), say=say, what=what), dtype=np.int64).reshape(-1, 2)

    def together(self, at: np.ndarray, *, say: Say = silent, what: str = "files looked at") -> None:
        """Take the looks at these positions; each rank takes a share, and afterwards every rank has all of them. A
        collective. The next call of `of` for these positions takes them for true if it comes soon, so that a start does
        not ask for each file twice.

        Raises:
            FileError: a file cannot be read; every rank raises it, even if only one of them met it.
        """
        from caco import distributed  # imported here because it imports torch, which looking at a folder does not need

        world, stamps = distributed.world(), self._memory()[0]
        shares = [at[rank::world] for rank in range(world)]
        mine = shares[distributed.rank()]
        if world == 1:
            written = self._visit(at, say, what)
        else:
            written = np.zeros((len(at), 2), np.int64)
            found = distributed.together(lambda: (self._visit(mine, say, what), self._memory()[1][mine], stamps[mine]))
            for rank, (theirs, looks, stamped) in enumerate(found):
                # On a node with files of its own, another rank's stamp does not fit, and the file is looked at anew.
                written[rank::world], self._memory()[1][shares[rank]], stamps[shares[rank]] = theirs, looks, stamped
        self._found = at.copy(), written, time.monotonic()

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
    """A hash, 16 hexadecimal digits, of images in files.

    Args:
        names: bytes [N], the files' names below their root.
        looks: uint8 [N, 16].
        labels: int64 [N], or None. The order of names, looks and labels counts.
    """
    state = hashlib.blake2b(digest_size=8)
    for name, look in zip(names, looks, strict=True):
        state.update(b"%s\0%s" % (name, look.tobytes()))
    state.update(b"" if labels is None else labels.tobytes())
    return state.hexdigest()


def cache_key_of(digest: str, written: np.ndarray) -> str:
    """A hash of the digest and of `written`, each file's (modification time, inode) as `Looks.of` gives them."""
    return hashlib.blake2b(digest.encode() + written.tobytes(), digest_size=8).hexdigest()
