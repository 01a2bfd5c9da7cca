"""Private details of FFCV that caco/data/loaders/ffcv_internals.py relies on. FFCV does not promise them, so a failing
test says what will break.
"""

import inspect
import threading

import pytest

pytest.importorskip("caco.data.loaders.ffcv_internals", reason="needs FFCV", exc_type=ImportError)
from ffcv.loader import epoch_iterator, loader  # noqa: E402
from ffcv.memory_managers import base, os_cache  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402

from caco.data.loaders import ffcv_internals  # noqa: E402


def test_the_loader_takes_the_manager_of_the_file_from_its_module():
    assert "OSCacheManager(self.reader)" in inspect.getsource(loader.Loader.__init__), (
        "FFCV's Loader makes its manager of the file in another way: `uncompiled` does not put `_MappedFile` there any"
        " more, so that ImageNet takes seconds to open, and the records that we read (storage of (bytes, places,"
        " sizes)) may be others"
    )


def test_a_loader_reads_through_our_manager_and_afterwards_through_ffcv_s_again():
    before = Compiler.is_enabled, loader.OSCacheManager
    with pytest.raises(KeyError), ffcv_internals.uncompiled():
        assert not Compiler.is_enabled and loader.OSCacheManager is ffcv_internals._MappedFile
        raise KeyError
    assert (Compiler.is_enabled, loader.OSCacheManager) == before and before[1] is os_cache.OSCacheManager


def test_the_manager_of_the_file_has_the_members_that_are_replaced():
    for name in ("state_type", "compile_reader", "schedule_epoch"):
        assert hasattr(os_cache.OSCacheManager, name), (
            f"FFCV's OSCacheManager has no {name}: so FFCV does not use what ffcv_internals sets there"
        )
    used = inspect.getsource(os_cache.OSCacheContext)
    assert "self.manager.ptrs, self.manager.sizes" in used and "self.manager.reader.file_name" in used, (
        "FFCV's context of a mapped file reads other members of its manager than `_MappedFile` has: loader=ffcv cannot"
        " open a .beton"
    )
    assert "ptr_to_size" not in inspect.getsource(os_cache) and "ptr_to_size" in inspect.getsource(base), (
        "FFCV now needs the tables of pages that `_MappedFile` leaves out"
    )


def test_an_epoch_is_a_thread_with_a_queue_and_an_event():
    assert issubclass(epoch_iterator.EpochIterator, threading.Thread), (
        "next_item and end cannot see whether FFCV's thread is alive"
    )
    made = inspect.getsource(epoch_iterator.EpochIterator)
    for words, what in {
        "self.output_queue = Queue(": "next_item has no queue to take batches from",
        "self.terminate_event = Event()": "end cannot ask the thread to stop",
        "to_output = (slot, result)": "next_item takes the batch from the second place of what is put there",
        "except StopIteration:\n            self.output_queue.put(None)": (
            "the end of an epoch is told in another way, and DecodeIntoViews ends it so"
        ),
        "def close(self)": "end does not let go of the file",
    }.items():
        assert words in made, f"FFCV's EpochIterator has changed: {what}"
