"""How caco recognises images: the digest stays the same for a copy and changes if images are exchanged; the cache key
changes with every new file; both take no longer than reading each file once."""

import os
import shutil
import threading
import time

import content_worker
import numpy as np
import pytest
from PIL import Image
from processes import ranks

from caco.data.sets import content
from caco.data.sets.class_folders import class_folders
from caco.data.sets.content import BLOCK, Looks, in_threads, look_at
from caco.errors import FileError, UserError


@pytest.fixture
def bitmaps(tmp_path):
    """Two folders of BMP images with the same names and sizes but different pixels."""
    for folder, shift in (("one", 0), ("two", 100)):
        (tmp_path / folder / "c").mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (80, 80), (10 * i + shift, 50, 90)).save(tmp_path / folder / "c" / f"{i}.bmp")
    return tmp_path


def exchange(folder):
    (folder / "one").rename(folder / "aside")
    (folder / "two").rename(folder / "one")
    (folder / "aside").rename(folder / "two")


def keys(folder):
    source = class_folders(folder / "one", "one")
    return source.digest(), source.cache_key()


def test_an_exchange_of_folders_is_seen_by_digest_and_cache_key(bitmaps):
    source = class_folders(bitmaps / "one", "one")
    before = source.digest(), source.cache_key()
    exchange(bitmaps)
    assert source.digest() != before[0] and source.cache_key() != before[1], (
        "also for a source object that existed before"
    )
    assert keys(bitmaps)[0] != before[0] and keys(bitmaps)[1] != before[1]
    exchange(bitmaps)
    assert keys(bitmaps) == before


def test_an_exchange_of_contents_under_the_same_times_and_inodes_is_seen(bitmaps):
    before = keys(bitmaps)
    for path in (bitmaps / "one" / "c").iterdir():
        status = path.stat()
        path.write_bytes((bitmaps / "two" / "c" / path.name).read_bytes())  # in place
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size) == (
            status.st_ino,
            status.st_mtime_ns,
            status.st_size,
        )
    assert keys(bitmaps)[0] != before[0] and keys(bitmaps)[1] != before[1]


@pytest.mark.parametrize("what", ["copied", "touched"])
def test_a_folder_that_was_copied_or_touched_keeps_its_digest_and_loses_its_caches(bitmaps, what):
    before = keys(bitmaps)
    if what == "copied":
        shutil.copytree(bitmaps / "one", bitmaps / "there")
        shutil.rmtree(bitmaps / "one")
        (bitmaps / "there").rename(bitmaps / "one")
    else:
        os.utime(bitmaps / "one" / "c" / "3.bmp", (1, 1))
    digest, cache_key = keys(bitmaps)
    assert digest == before[0] and cache_key != before[1]


def test_a_small_file_is_looked_at_whole_and_a_large_one_at_its_ends_and_its_middle(tmp_path):
    rng = np.random.default_rng(0)
    for size in (0, 1, 3 * BLOCK, 3 * BLOCK + 1, 20 * BLOCK):
        whole = rng.integers(0, 256, size, dtype=np.uint8)
        (tmp_path / "file").write_bytes(whole.tobytes())
        (look,), _ = Looks(lambda i: str(tmp_path / "file"), 1).of(np.array([0]))
        assert look.tobytes() == look_at(whole) == look_at(whole.tobytes())
        middle = (size - BLOCK) // 2
        seen = range(size) if size <= 3 * BLOCK else [0, BLOCK - 1, middle, middle + BLOCK - 1, size - BLOCK, size - 1]
        for place in list(seen)[:: max(1, len(seen) // 40)]:
            whole[place] ^= 1
            assert look_at(whole) != look.tobytes(), place
            whole[place] ^= 1
    assert look_at(bytes(5)) != look_at(bytes(6)), "the size is part of the digest"


def test_a_file_is_read_once_as_long_as_it_stays_as_it_is(tmp_path, write_images, monkeypatch):
    write_images(tmp_path / "c", 5)
    source, read = class_folders(tmp_path, "set"), []
    original = content._look
    monkeypatch.setattr(content, "_look", lambda path, size: (read.append(path), original(path, size))[1])
    for path in (tmp_path / "c").iterdir():
        os.utime(path)
    source.digest()
    source.digest()
    assert len(read) == 10, "files younger than two seconds must be read again, because a change may go unnoticed"
    real = time.time_ns
    monkeypatch.setattr(content.time, "time_ns", lambda: real() + 3_000_000_000)
    read.clear()
    for made in (source, source.part(np.array([1, 3]), "part"), source.in_memory(1)):
        made.digest(), made.cache_key()
    assert len(read) == 5
    (tmp_path / "c" / "0002.png").write_bytes(b"another")
    source.digest()
    assert len(read) == 6


def test_a_file_that_is_gone_is_named(tmp_path, write_images):
    write_images(tmp_path / "c", 3)
    source = class_folders(tmp_path, "set")
    (tmp_path / "c" / "0001.png").unlink()
    with pytest.raises(
        FileError, match=r"0001\.png: expected an image that can be read, got FileNotFoundError: No such file"
    ):
        source.digest()


def test_a_look_reads_no_more_than_the_file(tmp_path, write_images, monkeypatch):
    """For 1.3 million files, computing digests must not take longer than reading them once. The test counts bytes and
    open calls, because time in a test says little.
    """
    write_images(tmp_path / "c", 40, size=80)
    counted = {"bytes": 0, "open": 0}
    pread, open_ = os.pread, os.open
    monkeypatch.setattr(
        content.os, "pread", lambda *a: (counted.__setitem__("bytes", counted["bytes"] + a[1]), pread(*a))[1]
    )
    monkeypatch.setattr(content.os, "open", lambda *a: (counted.__setitem__("open", counted["open"] + 1), open_(*a))[1])
    source = class_folders(tmp_path, "set")
    source.digest()
    size = sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    assert counted["open"] == 40 and counted["bytes"] == 40 * 3 * BLOCK < size


def test_work_in_threads_comes_in_order_and_its_errors_come_out():
    assert in_threads(lambda i: i * i, 1000) == [i * i for i in range(1000)] and in_threads(lambda i: i, 0) == []

    def fails(i):
        if i == 700:
            raise UserError("number 700")
        return i

    with pytest.raises(UserError, match="number 700"):
        in_threads(fails, 1000)


def test_threads_help_where_the_work_waits_and_one_thread_serves_where_it_does_not():
    """Python's threads wait for one another where nothing else makes them wait."""
    fast, slow = set(), set()
    in_threads(lambda i: fast.add(threading.get_ident()), 2000)
    in_threads(lambda i: (slow.add(threading.get_ident()), time.sleep(5e-4)), 2000)
    assert fast == {threading.get_ident()} and len(slow) > 4


def test_a_start_asks_for_each_file_once(tmp_path, write_images, monkeypatch):
    write_images(tmp_path / "c", 5)
    source, visit = class_folders(tmp_path, "set"), content._stamp
    asked = []
    monkeypatch.setattr(content, "_stamp", lambda status: (asked.append(status), visit(status))[1])
    source.look()
    digest = source.digest()
    assert len(asked) == 5
    (tmp_path / "c" / "0002.png").write_bytes(b"another")
    assert source.digest() != digest and len(asked) == 10, "later digests ask again"
    source.look()
    monkeypatch.setattr(content.time, "monotonic", lambda: 1e9)
    source.digest()
    assert len(asked) == 20, "what was found a while ago is not taken for true"


def test_two_ranks_take_half_of_the_looks_each_and_both_have_all(tmp_path, write_images):
    write_images(tmp_path / "set" / "c", 7)
    codes, outputs = ranks(2, content_worker.look, str(tmp_path / "set"), str(tmp_path / "out"))
    assert codes == [0, 0], outputs
    told = [(tmp_path / f"out{rank}").read_text().split() for rank in range(2)]
    expected = class_folders(tmp_path / "set", "set").digest()
    assert [line[0] for line in told] == [expected, expected]
    assert sorted(int(line[1]) for line in told) == [3, 4], "no file may be read again for the digest"


def test_what_one_rank_cannot_read_ends_all_ranks_with_its_name(tmp_path, write_images):
    write_images(tmp_path / "set" / "c", 6)
    codes, outputs = ranks(2, content_worker.fail, str(tmp_path / "set"))
    assert codes == [3, 3] and all("0003.png: expected an image that can be read" in out for out, _ in outputs)
