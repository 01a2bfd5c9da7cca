"""FFCV's loader with one operation of ours: decode each JPEG once and make all of its views.

Importing this imports ffcv, numba and OpenCV, which takes seconds; only loader=ffcv does.

FFCV compiles its pipelines with numba, 12 seconds a process. Ours is one call of compiled code a batch, so it is run as
plain Python and nothing is compiled. FFCV's other traps are met where they lie: see the comments.
"""

import warnings
from collections.abc import Callable, Iterator
from queue import Empty
from typing import Any
from unittest.mock import patch

import numba
import numba.typed
import numpy as np
import torch

from caco.data.loaders.batches import Compiled, Order, Pixels, mixed_seed, pixels, those_after
from caco.data.sets.beton import RAW
from caco.data.sets.sources import Packed, Source, UnreadableImage
from caco.data.views import native
from caco.data.views.augmentation import Views
from caco.errors import FileError


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
from ffcv.loader import Loader  # noqa: E402
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager  # noqa: E402
from ffcv.pipeline import PipelineSpec  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.traversal_order.base import TraversalOrder  # noqa: E402


class FFCVBatches:
    """Batches of a set's .beton by ffcv.Loader; iterate once for what `order` then says."""

    def __init__(
        self,
        source: Source,
        packed: Packed,
        views: Views,
        seed: int,
        order: Order,
        num_workers: int,
        ahead: int,
        corrupt: str,
        device: torch.device,
    ):
        self._file = packed.file
        self._operation = DecodeIntoViews(source, packed, seed, corrupt, Compiled(views, device, num_workers))
        self._traversal = _Traversal(packed, len(source), order)
        with patch.object(Compiler, "is_enabled", False), patch.object(ffcv.loader.loader, "OSCacheManager", _MappedFile):
            self._loader = Loader(
                str(packed.file),
                batch_size=order.size,
                # FFCV hands this number to torch.set_num_threads, here and in each of its threads.
                num_workers=torch.get_num_threads(),
                order=self._traversal,
                pipelines={"image": PipelineSpec("image", decoder=self._operation), "label": None},
                batches_ahead=ahead,
                os_cache=True,
            )

    def __iter__(self) -> Iterator[Pixels | UnreadableImage]:
        if not self._file.is_file():
            raise FileError(f"{self._file}: expected the .beton that this run reads, got no such file any more")
        self._operation.begin(self._traversal.begin())
        if len(self._traversal.keys) == 0:
            return
        running = iter(self._loader)  # FFCV's EpochIterator: a thread that makes batches, and a queue
        try:
            while (made := _next(running)) is not None:
                yield made
        finally:
            _end(running, self._operation)


def _state_type(manager: OSCacheManager) -> numba.types.Tuple:
    """Of (the file's bytes, where images lie in it, how long they are), as FFCV means it.

    FFCV's own sets `mutable` of numba.uint8[::1], and numba has one such type for all: what it compiled for it before is no longer
    found under it, which it tells, with a traceback for each function, when they are deleted.
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
    """FFCV's, without its tables of pages, which a mapped file does not need: for ImageNet they take seconds to fill."""

    def __init__(self, reader):
        self.reader = reader
        order = np.argsort(reader.alloc_table["ptr"])
        self.ptrs, self.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]
        self.context = OSCacheContext(self)


def _next(running: Any) -> Pixels | UnreadableImage | None:
    """The next batch; where FFCV's own `next` would wait for ever for a thread that has died, an error."""
    while True:
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
        if isinstance(made, Exception) and not isinstance(made, UnreadableImage):
            raise made
        return made


def _end(running: Any, operation: "DecodeIntoViews") -> None:
    """End FFCV's thread before anything else begins; it waits for room in its queue, or makes a batch."""
    operation.ended = True
    running.terminate_event.set()
    while running.is_alive():
        try:
            running.output_queue.get_nowait()
        except Empty:
            running.join(0.01)
    running.close()


class _Traversal(TraversalOrder):
    """Which images come, as positions in the file. FFCV calls it with the loader, as if it were a class."""

    def __init__(self, packed: Packed, num_images: int, order: Order):
        self.packed, self.order = packed, order
        self.keys: list[tuple[int, np.ndarray]] = []
        # FFCV takes the number of batches of an epoch from the first traversal.
        self._positions = np.zeros(num_images // order.batch * order.size, np.int64)

    def __call__(self, loader: Loader) -> "_Traversal":
        return self

    def begin(self) -> list[tuple[int, np.ndarray]]:
        self.keys = list(self.order)
        self._positions = self.packed.at[np.concatenate([indices for _, indices in self.keys])] if self.keys else []
        return self.keys

    def sample_order(self, epoch: int) -> np.ndarray:
        return self._positions


class DecodeIntoViews(Operation):
    """A decoder of FFCV's image field: a batch's images to all of their views, as one `Pixels` with new memory.

    FFCV's own memory is a ring whose slots are written again while a batch may still be held, so none of it is asked for.
    What goes wrong is handed on in the place of the batch: an exception in FFCV's thread would leave the other waiting.
    """

    def __init__(self, source: Source, packed: Packed, seed: int, corrupt: str, make_views: Compiled):
        super().__init__()
        self.source, self.packed, self.seed, self.corrupt, self.make_views = source, packed, seed, corrupt, make_views
        self.ended = False
        self._keys: Iterator[tuple[int, np.ndarray]] = iter(())

    def begin(self, keys: list[tuple[int, np.ndarray]]) -> None:
        """From here on batches are those of these keys, in order."""
        self._keys, self.ended = iter(keys), False

    def declare_state_and_memory(self, previous_state):
        return previous_state, None

    def generate_code(self):
        def decode(positions, memory, records, storage):
            if self.ended:
                raise StopIteration  # which FFCV's thread takes for the end of the epoch
            try:
                return self._decode(positions, records, storage)
            except Exception as error:
                return error

        return decode

    def _decode(self, positions: np.ndarray, records: np.ndarray, storage: tuple) -> Pixels | UnreadableImage:
        epoch, indices = next(self._keys)
        assert np.array_equal(positions, self.packed.at[indices])
        stream = mixed_seed(self.seed, epoch)
        made, unreadable = self.make_views(_rows(positions, records, storage), indices, stream)
        taken = indices.copy()
        for row in np.flatnonzero(unreadable):
            if self.corrupt == "fail":
                return self.packed.unreadable(indices[row])
            for candidate in those_after(indices[row], len(self.source)):
                rows = _rows(self.packed.at[[candidate]], records, storage)
                out = [view[row : row + 1].numpy() for view in made]
                if not native.make_views(self.make_views.settings, rows, indices[[row]], stream, out)[0]:
                    taken[row] = candidate
                    break
            else:
                return UnreadableImage(f"{self.packed.file}: expected an image that can be read, got none")
        return pixels(made, self.source, indices, taken)


def _rows(positions: np.ndarray, records: np.ndarray, storage: tuple) -> np.ndarray:
    """Where images lie in FFCV's memory, as the compiled views take them."""
    content, places, sizes = storage
    records = records[positions]
    rows = np.empty(len(records), native.IMAGE)
    rows["data"] = content.ctypes.data + records["data_ptr"]
    rows["bytes"] = np.where(records["mode"] == RAW, 0, sizes[np.searchsorted(places, records["data_ptr"])])
    rows["height"], rows["width"] = records["height"], records["width"]
    return rows
