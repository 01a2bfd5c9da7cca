"""FFCV's loader with one operation of our own, which decodes each JPEG once and makes all of its views.

Importing this module imports ffcv, numba and OpenCV, which takes seconds, so only loader=ffcv does it. Everything that
relies on undocumented behaviour of FFCV is in ffcv_internals.py.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from caco.data.loaders.batches import Compiled, Order, Pixels, mixed_seed, pixels
from caco.data.loaders.ffcv_internals import (
    Loader,
    Operation,
    PipelineSpec,
    TraversalOrder,
    end,
    next_item,
    uncompiled,
)
from caco.data.loaders.rows import RowReader
from caco.data.sets.beton import RAW
from caco.data.sets.sources import Packed, Source, UnreadableImage
from caco.data.views import native
from caco.data.views.augmentation import Views
from caco.errors import FileError


class FFCVBatches:
    """Batches of a set in a .beton, read by ffcv.Loader. Each iteration follows the current state of `order`."""

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
        self._traversal = _Traversal(packed, order)
        with uncompiled():
            self._loader = Loader(
                str(packed.file),
                batch_size=order.size,
                # FFCV passes this number to torch.set_num_threads, here and in each of its threads, so it must be the
                # current one.
                num_workers=torch.get_num_threads(),
                order=self._traversal,
                pipelines={"image": PipelineSpec("image", decoder=self._operation), "label": None},
                batches_ahead=ahead,
                os_cache=True,
                drop_last=False,  # `order` decides which images are dropped
            )

    def __iter__(self) -> Iterator[Pixels | UnreadableImage]:
        if not self._file.is_file():
            raise FileError(f"{self._file}: expected the .beton that this run reads, got no such file any more")
        self._operation.begin(self._traversal.begin())
        if len(self._traversal.keys) == 0:
            return
        running = iter(self._loader)  # FFCV's EpochIterator: a thread that makes batches and puts them into a queue
        try:
            while (made := next_item(running)) is not None:
                if isinstance(made, Exception) and not isinstance(made, UnreadableImage):
                    raise made
                yield made
        finally:
            self._operation.ended = True
            end(running)


class _Traversal(TraversalOrder):
    """The images of an epoch as positions in the file. FFCV calls this object with the loader, as if it were a
    class."""

    def __init__(self, packed: Packed, order: Order):
        self.packed, self.order = packed, order
        self.keys: list[tuple[int, np.ndarray]] = []
        # FFCV takes the number of batches of an epoch from the first call of sample_order.
        self._positions = np.zeros(order.own, np.int64)

    def __call__(self, loader: Loader) -> "_Traversal":
        return self

    def begin(self) -> list[tuple[int, np.ndarray]]:
        self.keys = list(self.order)
        self._positions = self.packed.at[np.concatenate([indices for _, indices in self.keys])] if self.keys else []
        return self.keys

    def sample_order(self, epoch: int) -> np.ndarray:
        return self._positions


class DecodeIntoViews(Operation):
    """A decoder of FFCV's image field that turns a batch's images into all of their views, one `Pixels` in new memory.

    FFCV's own memory is a ring whose slots are overwritten while a batch may still be in use, so no memory is requested
    from it. An error is returned in the place of the batch: an exception in FFCV's thread would make the other thread
    wait for ever.
    """

    def __init__(self, source: Source, packed: Packed, seed: int, corrupt: str, make_views: Compiled):
        super().__init__()
        self.source, self.packed, self.seed, self.corrupt, self.make_views = source, packed, seed, corrupt, make_views
        self.ended = False
        self._keys: Iterator[tuple[int, np.ndarray]] = iter(())

    def begin(self, keys: list[tuple[int, np.ndarray]]) -> None:
        """Start an epoch: the next batches are those of these keys, in order."""
        self._keys, self.ended = iter(keys), False

    def declare_state_and_memory(self, previous_state):
        return previous_state, None

    def generate_code(self):
        def decode(positions, memory, records, storage):
            if self.ended:
                raise StopIteration  # FFCV's thread takes this as the end of the epoch
            try:
                return self._decode(positions, records, storage)
            except Exception as error:
                return error

        return decode

    def _decode(self, positions: np.ndarray, records: np.ndarray, storage: tuple) -> Pixels:
        epoch, indices = next(self._keys)
        assert np.array_equal(positions, self.packed.at[indices])

        def rows(indices: np.ndarray) -> tuple[np.ndarray, Any]:
            return _rows(self.packed.at[indices], records, storage), storage

        reader = RowReader(self.source, rows, self.corrupt, same_class=False, num_threads=self.make_views.num_threads)
        made, taken = reader.views(indices, partial(self.make_views, stream=mixed_seed(self.seed, epoch)))
        return pixels(made, self.source, indices, taken)


def _rows(positions: np.ndarray, records: np.ndarray, storage: tuple) -> np.ndarray:
    """Addresses and sizes of images in FFCV's memory, in the form that the compiled views take."""
    content, places, sizes = storage
    records = records[positions]
    rows = np.empty(len(records), native.IMAGE)
    rows["data"] = content.ctypes.data + records["data_ptr"]
    rows["bytes"] = np.where(records["mode"] == RAW, 0, sizes[np.searchsorted(places, records["data_ptr"])])
    rows["height"], rows["width"] = records["height"], records["width"]
    return rows
