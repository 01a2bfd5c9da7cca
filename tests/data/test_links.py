"""Symbolic links and other entries in a folder of images: each image is read once with its own class, or a message says
why not.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from caco.data.sets.folders import folder
from caco.errors import FileError, UserError


@pytest.fixture
def pets(tmp_path: Path, write_images: Callable) -> Path:
    write_images(tmp_path / "pets" / "train" / "cat", 3)
    write_images(tmp_path / "pets" / "train" / "dog", 2)
    write_images(tmp_path / "pets" / "test" / "cat", 1)
    write_images(tmp_path / "pets" / "test" / "dog", 1)
    return tmp_path / "pets"


def test_links_to_images_and_folders_elsewhere_are_followed(pets, tmp_path, write_images):
    write_images(tmp_path / "elsewhere" / "birds", 4)
    (pets / "train" / "bird").symlink_to(tmp_path / "elsewhere" / "birds")
    (pets / "train" / "dog" / "another.png").symlink_to(tmp_path / "elsewhere" / "birds" / "0001.png")
    (pets / "train" / "dog" / "more").symlink_to(pets / "test" / "dog")
    write_images(pets / "test" / "bird", 1)
    (tmp_path / "link").symlink_to(pets)
    source = folder(root=str(tmp_path / "link" / "train")).train
    assert source.classes == ["bird", "cat", "dog"] and np.bincount(source.labels).tolist() == [4, 3, 4]
    assert len(folder(root=str(tmp_path / "link" / "train"), labelled_root=str(pets)).pretrain) == 11


@pytest.mark.parametrize("to", ["..", "../..", "../../..", "/", "."])
def test_a_link_to_what_holds_it_is_refused_at_once(pets, to):
    (pets / "train" / "cat" / "up").symlink_to(to)
    begun = time.process_time()
    for root in (pets, pets / "train"):
        with pytest.raises(
            UserError,
            match=r"cat/up( is a link to .*, a folder above it| and .* are the same folder, because of a link)",
        ):
            folder(root=str(root))
    with pytest.raises(UserError, match="a folder above it|are the same folder"):
        folder(root=str(pets), labelled_root=str(pets))
    assert time.process_time() - begun < 5


def test_several_links_to_one_another_end(pets):
    for name in "abcdef":
        (pets / "train" / "cat" / name).symlink_to(pets / "train")
        (pets / "train" / "dog" / name).symlink_to(pets / "train" / "cat")
    with pytest.raises(UserError, match="a folder above it|are the same folder, because of a link"):
        folder(root=str(pets))


def test_one_folder_under_two_classes_is_refused(pets):
    (pets / "train" / "kitten").symlink_to("cat")
    with pytest.raises(
        UserError,
        match=r"train/kitten and .*train/cat are the same folder, because of a link, so its images would occur twice",
    ):
        folder(root=str(pets))


@pytest.mark.parametrize("to", ["../cat/0001.png", "../dog/back.png", "0000.png"])
def test_an_image_under_two_names_by_a_link_is_refused(pets, to):
    (pets / "train" / "dog" / "back.png").symlink_to("../cat/0002.png")
    (pets / "train" / "dog" / "again.png").symlink_to(to)
    (pets / "train" / "cat" / "elsewhere.png").symlink_to("../../test/cat/0000.png")
    for other in ({}, {"labelled_root": str(pets / "test")}):
        with pytest.raises(UserError, match=r"(back|again)\.png: a link to .*, which is among these images itself"):
            folder(root=str(pets), **other)
    (pets / "train" / "dog" / "back.png").unlink()
    if (pets / "train" / "dog" / "again.png").exists():
        with pytest.raises(UserError, match=r"dog/again\.png: a link to .*/train/.*, which is among these"):
            folder(root=str(pets))


def test_links_into_a_store_that_is_hidden_or_left_out_are_followed(pets, tmp_path, write_images):
    write_images(pets / "train" / ".annex", 2)
    for at, name in enumerate(("cat", "dog", "dog")):  # two images that are equal are one file there
        (pets / "train" / name / f"kept{at}.png").symlink_to("../.annex/0000.png")
    (pets / "train" / "dog" / "of_cat.png").symlink_to("../cat/0000.png")
    (tmp_path / "classes.txt").write_text("dog\n")
    chosen = folder(root=str(pets / "train"), class_list=str(tmp_path / "classes.txt"), labelled_root=None)
    assert len(chosen.train) == 5
    (pets / "train" / "dog" / "of_cat.png").unlink()
    assert len(folder(root=str(pets)).train) == 8


@pytest.mark.parametrize(
    ("link", "to"), [("train/cat/gone.png", "nowhere.png"), ("train/bird", "../nowhere"), ("train/dog/self", "self")]
)
def test_a_link_that_leads_nowhere_is_named(pets, link, to):
    (pets / link).symlink_to(to)
    with pytest.raises(
        FileError, match=rf"{link}, a link to {to}: expected a folder or an image .* Repair or remove it\."
    ):
        folder(root=str(pets))
    (pets / link).rename(pets / link.replace(Path(link).name, ".hidden"))
    assert len(folder(root=str(pets)).train) == 5


def test_what_is_no_file_is_not_waited_for(pets):
    os.mkfifo(pets / "train" / "cat" / "pipe.png")
    with pytest.raises(FileError, match=r"cat/pipe\.png: expected an image, got something that is not a file"):
        folder(root=str(pets))


def test_a_folder_that_may_not_be_read_is_not_passed_over(pets, monkeypatch):
    scandir = os.scandir

    def locked(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(FileError, match=r"train/dog: expected a folder .* got: Permission denied"):
        folder(root=str(pets))
