"""All uses of FFCV 1.0.2 that rely on undocumented behaviour are in this file; tests/data/test_ffcv_internals.py shows
what breaks when FFCV changes.

FFCV's import and its loader change settings of the whole process, which this file undoes. FFCV also compiles its
pipelines with numba, 12 seconds a process. Our pipeline is one call of compiled code for each batch, so it runs as
plain Python and numba compiles nothing.
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
    """Import ffcv without two effects of its import: one thread for torch, and five seconds of compiling."""
    threads, typed_dict = torch.get_num_threads(), numba.typed.Dict
    numba.typed.Dict = dict  # for a table of two entries, numba would compile this class's methods
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
    """The numba type of (the file's bytes, where images are in it, how long they are), as FFCV needs it.

    FFCV's own code sets `mutable` on numba.uint8[::1], an object that all of numba shares. Functions that were compiled
    for this type before are then no longer found under it, and numba prints a traceback for each when they are deleted.
    """
    bytes_, numbers = numba.types.Array(numba.uint8, 1, "C", readonly=True), numba.uint64[::1]
    return numba.types.Tuple([bytes_, numbers, numbers])


def _compile_reader(manager: OSCacheManager) -> Callable:
    """Like FFCV's function of this name, but for the type from `_state_type`."""
    state_type = manager.state_type

    def read(place, state):
        content, places, sizes = state
        return content[place : place + sizes[np.searchsorted(places, place)]]

    return Compiler.compile(read, state_type[0](numba.uint64, state_type))


# Set on the class, so that FFCV's own pipelines, if they are compiled in the same process, benefit too.
OSCacheManager.state_type, OSCacheManager.compile_reader = property(_state_type), _compile_reader


class _MappedFile(OSCacheManager):
    """FFCV's class without its tables of pages. A mapped file does not need these, and for ImageNet it takes seconds to
    fill them.
    """

    def __init__(self, reader):
        self.reader = reader
        order = np.argsort(reader.alloc_table["ptr"])
        self.ptrs, self.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]
        self.context = OSCacheContext(self)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inside this context, a new Loader runs its pipeline as plain Python and reads the file through `_MappedFile`."""
    before = Compiler.is_enabled, ffcv.loader.loader.OSCacheManager
    Compiler.is_enabled, ffcv.loader.loader.OSCacheManager = False, _MappedFile
    try:
        yield
    finally:
        Compiler.is_enabled, ffcv.loader.loader.OSCacheManager = before


def next_item(running: Any) -> Any | None:
    """The next batch from FFCV's thread; None at the end of the epoch.

    Raises:
        RuntimeError: the thread has died; FFCV's own `next` would wait for ever.
        UserError: the thread has made no batch for PATIENCE_S seconds.
    """
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        alive = running.is_alive()  # asked before the queue, so that the thread's last item is not missed
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
    """End FFCV's thread and wait for its end. Emptying its queue lets it go on if it waits for room there."""
    running.terminate_event.set()
    deadline = time.monotonic() + PATIENCE_S
    while running.is_alive() and time.monotonic() < deadline:
        try:
            running.output_queue.get_nowait()
        except Empty:
            running.join(0.01)
    running.close()
