"""caco.write beside others, and of images that no JPEG can hold; what it writes is tests/data/test_beton.py's."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from caco import errors
from caco.data.sets.folders import folder
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.sources import Splits, UnreadableImage
from caco.errors import UserError
from caco.write import write_splits


def test_two_that_write_into_one_folder_are_told_apart(tmp_path):
    """Another process holds the lock: two of one process would not exclude each other."""
    images = Splits(ImagesInMemory(np.zeros((2, 8, 8, 3), np.uint8), name="two"), None, None)
    holds = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX);"
        " print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", holds, tmp_path / ".lock"], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(BlockingIOError) as error:
            write_splits(images, tmp_path, mode="raw", num_workers=1)
        assert errors.is_for_user(error.value) and str(tmp_path / ".lock") in errors.message(error.value)
    finally:
        other.kill()
        other.communicate()
    write_splits(images, tmp_path, mode="raw", num_workers=1)
    assert not (tmp_path / ".lock").exists()


def test_an_image_with_a_side_that_no_jpeg_has_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (65_501, 200)).save(tmp_path / "images" / "long.png")
    source = folder(root=str(tmp_path / "images")).pretrain
    with pytest.raises(UnreadableImage, match=r"long\.png: 65501 x 200 pixels, and a JPEG has 65,500 a side at most"):
        write_splits(Splits(source, None, None), tmp_path / "out", num_workers=1)


def test_a_split_of_an_earlier_set_is_not_left_beside_another_sets(tmp_path):
    one = ImagesInMemory(np.zeros((2, 8, 8, 3), np.uint8), name="one", labels=np.arange(2))
    write_splits(Splits(one, one, one), tmp_path, mode="raw", num_workers=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        UserError, match=r"out: .*/test\.beton is there of an earlier set, and this one has no such split"
    ):
        write_splits(Splits(one, one, None), tmp_path, mode="raw", num_workers=1)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    write_splits(Splits(one, one, one), tmp_path, mode="raw", num_workers=1)
