"""A test image that was trained on is found, by its file or its pixels, and refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from caco.data.sets import overlap
from caco.data.sets.folders import class_folders
from caco.data.sets.overlap import refuse_overlap, shared_images
from caco.data.sets.sources import ImagesInMemory, Splits


@pytest.fixture
def folders(tmp_path, write_images):
    """train/ and test/ of files; test images 1 and 3 are copies of training images 4 and 0 under other names."""
    write_images(tmp_path / "train" / "cat", 6)
    write_images(tmp_path / "test" / "cat", 5, size=9)
    for test, train in ((1, 4), (3, 0)):
        shutil.copy(tmp_path / "train" / "cat" / f"{train:04d}.png", tmp_path / "test" / "cat" / f"{test:04d}.png")
    return class_folders(tmp_path / "train", "set/train"), class_folders(tmp_path / "test", "set/test")


def test_copies_are_found_among_files_and_among_pixels(folders):
    train, test = folders
    assert shared_images(train, test) == [(0, 3), (4, 1)]
    decoded = [ImagesInMemory([np.asarray(s.image(i)) for i in range(len(s))], name=s.name) for s in folders]
    assert shared_images(*decoded) == shared_images(train, decoded[1]) == [(0, 3), (4, 1)]


def test_files_of_other_size_or_beginning_are_not_read_whole(folders, monkeypatch):
    read = []
    monkeypatch.setattr(overlap, "_whole", lambda source, i: read.append(source.path(i)) or Path(source.path(i)).read_bytes())
    shared_images(*folders)
    assert len(read) == 4


def test_files_that_only_begin_alike_are_no_copies(tmp_path):
    for split, last in (("train", b"a"), ("test", b"b")):
        (tmp_path / split / "c").mkdir(parents=True)
        (tmp_path / split / "c" / "1.png").write_bytes(bytes(5000) + last)
    assert shared_images(class_folders(tmp_path / "train", "a"), class_folders(tmp_path / "test", "b")) == []


def test_an_overlap_is_refused_with_the_files_and_what_to_do(folders):
    train, test = folders
    with pytest.raises(ValueError, match=r"2 of the 5 images of set/test are images of set/train too \(.*0000.png is .*0003.png; .*overlap=allow"):
        refuse_overlap(Splits(train, train, test))
    with pytest.raises(ValueError, match="are images of set/train too"):  # pre-trained on, without labels
        refuse_overlap(Splits(train, None, test))
    refuse_overlap(Splits(train, train, None))
    refuse_overlap(Splits(train, train, test.part(np.array([0, 2, 4]), "set/test")))
