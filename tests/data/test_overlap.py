"""Test images that are also training images are found, by their files or their pixels, and refused."""

import shutil
from pathlib import Path

import content_worker
import numpy as np
import pytest
from processes import ranks

from caco.data.sets import overlap
from caco.data.sets.beton import BetonImages
from caco.data.sets.class_folders import class_folders
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.overlap import Overlap, shared_images
from caco.data.sets.sources import Splits
from caco.write import write_splits


@pytest.fixture
def folders(tmp_path, write_images):
    """Folders train/ and test/; test images 1 and 3 are copies of training images 4 and 0 under other names."""
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
    monkeypatch.setattr(
        overlap, "_content", lambda source, i: read.append(source.path(i)) or Path(source.path(i)).read_bytes()
    )
    shared_images(*folders)
    assert len(read) == 4


def in_memory(source, name="memory"):
    return ImagesInMemory([np.asarray(source.image(i)) for i in range(len(source))], name=name)


def test_only_images_of_a_size_that_the_other_set_has_too_are_decoded(folders, monkeypatch):
    train, test = folders  # test images have 9 px, except the two copies of training images, which have 8
    decoded = []
    monkeypatch.setattr(
        overlap, "_pixels", lambda source, i: decoded.append((source.name, i)) or source.image(i).tobytes()
    )
    assert shared_images(in_memory(train), test) == [(0, 3), (4, 1)]
    assert sorted(decoded) == [("memory", i) for i in range(6)] + [("set/test", 1), ("set/test", 3)]


def test_images_that_cannot_be_read_are_shared_with_none_unless_their_files_are(folders):
    train, test = folders
    for source, i in ((train, 2), (test, 0), (test, 2)):
        source.path(i).write_bytes(b"no image" if i == 2 else b"nor this")
    assert shared_images(train, test) == [(0, 3), (2, 2), (4, 1)]
    kept = [i for i in range(len(train)) if i != 2]
    decoded = in_memory(train.part(np.array(kept), "kept"))
    assert [(kept[i], j) for i, j in shared_images(decoded, test)] == [(0, 3), (4, 1)]


def test_of_a_set_that_is_compared_with_many_nothing_is_found_out_twice(folders, monkeypatch):
    train, test = folders
    done = []
    for name in ("_pixels", "_shape", "_content"):
        original = getattr(overlap, name)

        def counted(source, i, original=original, name=name):
            done.append((name, source.name, i))
            return original(source, i)

        counted.__name__ = name
        monkeypatch.setattr(overlap, name, counted)
    finder = Overlap()
    for other in (test, in_memory(test, "a"), in_memory(test, "b"), test):
        assert finder.shared(train, other) == [(0, 3), (4, 1)]
    assert len(done) == len(set(done)) and {name for name, source, _ in done if source == "set/train"} == {
        "_pixels",
        "_shape",
        "_content",
    }


def test_copies_are_found_among_betons_and_files_without_decoding_where_both_hold_jpegs(
    tmp_path, write_images, monkeypatch
):
    write_images(tmp_path / "train" / "cat", 6, suffix=".jpg")
    write_images(tmp_path / "test" / "cat", 5, size=9, suffix=".jpg")
    shutil.copy(tmp_path / "train" / "cat" / "0002.jpg", tmp_path / "test" / "cat" / "0004.jpg")
    train, test = (class_folders(tmp_path / name, name) for name in ("train", "test"))
    packed = {}
    for mode in ("jpeg", "raw"):
        write_splits(Splits(train, train, test), tmp_path / mode, mode=mode, num_workers=1)
        packed[mode] = [BetonImages(tmp_path / mode / f"{split}.beton", name=mode) for split in ("train", "test")]
    assert shared_images(packed["raw"][0], test) == shared_images(train, packed["raw"][1]) == [(2, 4)]
    monkeypatch.setattr(overlap, "_pixels", lambda source, i: pytest.fail("decoded"))
    assert (
        shared_images(*packed["jpeg"])
        == shared_images(packed["jpeg"][0], test)
        == shared_images(train, packed["jpeg"][1])
        == [(2, 4)]
    )


def test_two_ranks_find_what_one_does(folders, tmp_path):
    codes, outputs = ranks(2, content_worker.overlap, str(tmp_path), str(tmp_path / "out"))
    assert codes == [0, 0], outputs
    assert [(tmp_path / f"out{rank}").read_text() for rank in range(2)] == ["[(0, 3), (4, 1)] [(0, 3), (4, 1)]"] * 2


def test_files_that_only_begin_alike_are_no_copies(tmp_path):
    for split, last in (("train", b"a"), ("test", b"b")):
        (tmp_path / split / "c").mkdir(parents=True)
        (tmp_path / split / "c" / "1.png").write_bytes(bytes(5000) + last)
    assert shared_images(class_folders(tmp_path / "train", "a"), class_folders(tmp_path / "test", "b")) == []


def test_an_overlap_is_refused_with_the_files_and_what_to_do(folders):
    train, test = folders
    with pytest.raises(
        ValueError,
        match=r"2 of the 5 images of set/test are images of set/train too \(.*0000.png is .*0003.png; .*overlap=allow",
    ):
        Overlap().refuse_in(Splits(train, train, test))
    with pytest.raises(ValueError, match="are images of set/train too"):  # they were pre-trained on without labels
        Overlap().refuse_in(Splits(train, None, test))
    Overlap().refuse_in(Splits(train, train, None))
    Overlap().refuse_in(Splits(train, train, test.part(np.array([0, 2, 4]), "set/test")))
