"""What of FFCV 1.0.2 is used though nobody promises that it stays: all of it stands here, and
tests/data/test_ffcv_internals.py says what breaks when FFCV changes it.

Its import and its loader each do something to the process that this undoes. FFCV compiles its pipelines with numba, 12
seconds a process. Ours is one call of compiled code a batch, so it is run as plain Python and nothing is compiled.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from queue import Empty
from typing import Any

import numba
import numba.typed
import numpy as np
import torch

from caco.data.loaders.workers import PATIENCE_S
from caco.errors import UserError


def _import_ffcv() -> None:
    """Import ffcv without what its import does to a process: one thread for torch, and five seconds of compiling."""
    threads, typed_dict = torch.get_num_threads(), numba.typed.Dict
    numba.typed.Dict = dict  # for a table of two entries, whose methods numba would compile
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # distutils
            import ffcv.loader  # noqa: F401
    finally:
        numba.typed.Dict = typed_dict
        torch.set_num_threads(threads)


_import_ffcv()
import ffcv.loader.loader  # noqa: E402
from ffcv.loader import Loader  # noqa: E402, F401
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager  # noqa: E402
from ffcv.pipeline import PipelineSpec  # noqa: E402, F401
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402, F401
from ffcv.traversal_order.base import TraversalOrder  # noqa: E402, F401


def _state_type(manager: OSCacheManager) -> numba.types.Tuple:
    """Of (the file's bytes, where images lie in it, how long they are), as FFCV means it.

    FFCV's own sets `mutable` of numba.uint8[::1], and numba has one such type for all: what it compiled for it before
    is no longer found under it, which it tells, with a traceback for each function, when they are deleted.
    """
    bytes_, numbers = numba.types.Array(numba.uint8, 1, "C", readonly=True), numba.uint64[::1]
    return numba.types.Tuple([bytes_, numbers, numbers])


def _compile_reader(manager: OSCacheManager) -> Callable:
    """As FFCV's, for that type."""
    state_type = manager.state_type

    def read(place, state):
        content, places, sizes = state
        return content[place : place + sizes[np.searchsorted(places, place)]]

    return Compiler.compile(read, state_type[0](numba.uint64, state_type))


# Of the class, so that FFCV's own pipelines, compiled beside ours, are spared too.
OSCacheManager.state_type, OSCacheManager.compile_reader = property(_state_type), _compile_reader


class _MappedFile(OSCacheManager):
    """FFCV's, without its tables of pages, which a mapped file does not need: for ImageNet they take seconds to
    fill.
    """

    def __init__(self, reader):
        self.reader = reader
        order = np.argsort(reader.alloc_table["ptr"])
        self.ptrs, self.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]
        self.context = OSCacheContext(self)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """A Loader that is made in the body runs its pipeline as plain Python and reads the file through `_MappedFile`."""
    before = Compiler.is_enabled, ffcv.loader.loader.OSCacheManager
    Compiler.is_enabled, ffcv.loader.loader.OSCacheManager = False, _MappedFile
    try:
        yield
    finally:
        Compiler.is_enabled, ffcv.loader.loader.OSCacheManager = before


def next_item(running: Any) -> Any | None:
    """What FFCV's thread made of the next batch, None at the end of the epoch.

    Raises:
        RuntimeError: the thread has died, for which FFCV's own `next` would wait for ever.
        UserError: it makes nothing any more.
    """
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        alive = running.is_alive()  # asked before the queue: what it put there last is not overlooked
        try:
            item = running.output_queue.get(timeout=0.5)
        except Empty:
            if not alive:
                raise RuntimeError("FFCV's thread has ended without a batch; its own message is above") from None
            continue
        if item is None:
            return None
        (made,) = item[1]
        return made
    raise UserError(f"FFCV has made no batch for {PATIENCE_S} s. Does the storage that the .beton is on still answer?")


def end(running: Any) -> None:
    """End FFCV's thread before anything else begins; it waits for room in its queue, or makes a batch."""
    running.terminate_event.set()
    deadline = time.monotonic() + PATIENCE_S
    while running.is_alive() and time.monotonic() < deadline:
        try:
            running.output_queue.get_nowait()
        except Empty:
            running.join(0.01)
    running.close()
