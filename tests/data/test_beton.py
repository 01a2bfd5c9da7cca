""".beton files: FFCV reads what caco writes, and caco reads what FFCV writes. An interrupted write leaves no file, and
a broken file is refused.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from caco import instructions, write
from caco.data.loaders.ffcv_loader import FFCVLoader
from caco.data.sets.beton import BetonImages, beton
from caco.data.sets.folders import folder
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.sources import Splits
from caco.errors import FileError, UserError
from caco.write import write_splits

ffcv_internals = pytest.importorskip("caco.data.loaders.ffcv_internals", reason="needs FFCV", exc_type=ImportError)
import numba  # noqa: E402


def same(source, other) -> bool:
    return len(source) == len(other) and all(
        np.array_equal(np.asarray(source.image(i)), np.asarray(other.image(i))) for i in range(len(source))
    )


@pytest.fixture
def in_memory(noise_source) -> Splits:
    train = noise_source(37)
    return Splits(train, train, train.part(np.arange(5), "noise/test"))


def test_raw_pixels_labels_and_class_names_come_back(in_memory, tmp_path):
    write_splits(in_memory, tmp_path, mode="raw", num_workers=2)
    splits = beton(root=str(tmp_path))
    assert splits.pretrain is splits.train
    for ours, theirs in ((splits.train, in_memory.train), (splits.test, in_memory.test)):
        assert same(ours, theirs) and np.array_equal(ours.labels, theirs.labels) and ours.classes == ["a", "b", "c"]
    assert same(splits.train.part(np.array([7, 3]), "two"), in_memory.train.part(np.array([7, 3]), "two"))


def test_unlabelled_images_are_pretrained_on_beside_labelled_ones(in_memory, tmp_path):
    unlabelled = ImagesInMemory(in_memory.train.arrays[::-1].copy(), name="unlabelled")
    write_splits(Splits(unlabelled, in_memory.train, in_memory.test), tmp_path, mode="raw", num_workers=1)
    splits = beton(root=str(tmp_path), limit=9)
    assert splits.pretrain.labels is None and len(splits.pretrain) == 9 and len(splits.train) == 37


def test_jpegs_stay_as_they_are_and_others_are_encoded(tmp_path, write_images):
    write_images(tmp_path / "in", 3, size=20, suffix=".jpg")
    Image.new("L", (30, 10), 77).save(tmp_path / "in" / "gray.jpg")
    Image.new("CMYK", (30, 10), (1, 2, 3, 4)).save(tmp_path / "in" / "ink.jpg")
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "in" / "wash.png")
    source = folder(root=str(tmp_path / "in"), in_memory_mb=0).pretrain
    write_splits(Splits(source, None, None), tmp_path, num_workers=2)
    made = beton(root=str(tmp_path)).pretrain
    for i in range(4):
        assert np.array_equal(np.asarray(made.image(i)), np.asarray(source.image(i)))
        content = source.path(i).read_bytes()
        place = int(made.records["image"]["place"][i])
        assert bytes(made._bytes[place : place + len(content)]) == content
    wash = np.asarray(made.image(5)).astype(int) - np.asarray(source.image(5))
    assert np.abs(wash).max() <= 4 and made.labels is None and made.classes is None


def test_images_are_shrunk_to_the_maximum_resolution(tmp_path, write_images):
    write_images(tmp_path / "in", 1, size=20)
    Image.new("RGB", (90, 30)).save(tmp_path / "in" / "wide.png")
    source = folder(root=str(tmp_path / "in")).pretrain
    for mode in ("jpeg", "raw"):
        write_splits(Splits(source, None, None), tmp_path, mode=mode, max_resolution=45, num_workers=1)
        made = beton(root=str(tmp_path)).pretrain
        assert [made.image(i).size for i in range(2)] == [(20, 20), (45, 15)]


def test_ffcv_reads_what_we_write(in_memory, tmp_path, monkeypatch):
    """FFCV's own decoders read the file; they need images of one size."""
    write_splits(in_memory, tmp_path, mode="raw", num_workers=1)
    monkeypatch.setattr(ffcv_internals.Compiler, "is_enabled", False)
    loader = ffcv_internals.Loader(str(tmp_path / "train.beton"), batch_size=10, num_workers=1, drop_last=False)
    images, labels = zip(*((images.clone(), labels.clone()) for images, labels in loader), strict=True)
    assert np.array_equal(np.concatenate(images), in_memory.train.arrays)
    assert np.array_equal(np.concatenate(labels)[:, 0], in_memory.train.labels)


@pytest.mark.skipif(
    instructions.LEVEL == "torch",
    reason="FFCV's pipeline calls the compiled views, which CACO_INSTRUCTIONS=torch turns off",
)
def test_ffcvs_pipelines_leave_numbas_types_as_they_are(in_memory, two_views, tmp_path, monkeypatch):
    """Numba stores compiled functions by type. If a type changes, numba does not find them again and prints a traceback
    when they are deleted.
    """
    filed = {numba.uint8[::1]: "compiled for arrays of bytes"}
    write_splits(in_memory, tmp_path, mode="raw", num_workers=1)
    with contextlib.closing(
        FFCVLoader(num_workers=1).bind(beton(root=str(tmp_path)).train, two_views, batch=8, seed=0)
    ):
        assert numba.uint8[::1] in filed and numba.uint8[::1].mutable
    monkeypatch.setattr(ffcv_internals.Compiler, "is_enabled", False)
    ffcv_internals.Loader(str(tmp_path / "train.beton"), batch_size=10, num_workers=1)
    assert numba.uint8[::1] in filed and numba.uint8[::1].mutable


def test_we_read_what_ffcv_writes(in_memory, tmp_path, capfd):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    train = in_memory.train
    samples = [(train.arrays[i], train.labels[i]) for i in range(len(train))]
    file = tmp_path / "theirs.beton"
    DatasetWriter(str(file), {"image": RGBImageField(), "label": IntField()}, num_workers=1).from_indexed_dataset(
        samples
    )
    made = BetonImages(file, name="theirs")
    assert same(made, train) and np.array_equal(made.labels, train.labels) and made.classes is None


def test_the_digest_follows_the_images_and_their_choice(in_memory, tmp_path):
    def digest(source) -> str:
        write_splits(Splits(source, source, None), tmp_path, mode="raw", num_workers=1)
        train = beton(root=str(tmp_path)).train
        assert train is not None
        return train.digest()

    first = digest(in_memory.train)
    assert digest(in_memory.train) == first
    part = beton(root=str(tmp_path), limit=36).train.digest()
    changed = ImagesInMemory(
        in_memory.train.arrays ^ 1, name="noise", labels=in_memory.train.labels, classes=["a", "b", "c"]
    )
    assert len({first, part, digest(changed)}) == 3


def test_a_file_that_ends_early_is_refused(in_memory, tmp_path):
    file, _ = write_splits(in_memory, tmp_path, mode="raw", num_workers=1)
    whole = file.read_bytes()
    for size, message in (
        (len(whole) - 1, "complete .beton of 37 images"),
        (2000, "got 2000 bytes"),
        (0, "got 0 bytes"),
    ):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=message):
            BetonImages(file, name="cut")
    file.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=r"whose table is at \d+ of \d+ bytes"):
        BetonImages(file, name="longer")
    other = in_memory.train.part(np.arange(36), "noise")
    write_splits(Splits(other, other, None), tmp_path / "other", mode="raw", num_workers=1)
    file.write_bytes((tmp_path / "other" / "train.beton").read_bytes())
    with pytest.raises(ValueError, match=r"expected the \d+ bytes that train\.json names"):
        BetonImages(file, name="another")
    file.write_bytes(b"\1" + whole[1:])
    with pytest.raises(ValueError, match="got version 1 with 2 fields"):
        BetonImages(file, name="older")


def test_an_unreadable_image_ends_the_writing_and_leaves_nothing(tmp_path, write_images):
    write_images(tmp_path / "in", 40, suffix=".jpg")
    (tmp_path / "in" / "0033.jpg").write_bytes(b"no image")
    source = folder(root=str(tmp_path / "in"), in_memory_mb=0).pretrain
    with pytest.raises(ValueError, match=r"0033\.jpg: expected an image that can be read"):
        write_splits(Splits(source, None, None), tmp_path / "out", num_workers=2)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_process_that_is_killed_ends_the_writing_and_leaves_nothing(in_memory, tmp_path, monkeypatch):
    parent = os.getpid()

    def killed(self, index):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(write._Encoder, "__call__", killed)
    with pytest.raises(UserError, match="ended from outside"):
        write_splits(in_memory, tmp_path, num_workers=2)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_meant_is_refused(in_memory, tmp_path):
    for settings, message in (
        ({"mode": "png"}, "mode: expected jpeg or raw, got 'png'"),
        ({"mode": "raw", "quality": 90}, "quality: expected 1..100 with mode=jpeg, got 90 with mode=raw"),
        ({"quality": 101}, "got 101"),
        ({"max_resolution": 0}, "max_resolution: expected a positive"),
        ({"num_workers": 0}, "num_workers: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            write_splits(in_memory, tmp_path, **settings)
    with pytest.raises(FileError, match=r"expected .*train\.beton, got no such file; python -m caco\.write"):
        beton(root=str(tmp_path))


def test_the_command_writes_a_folder_and_refuses_in_words(repo_root, tmp_path, write_images):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "caco.write", *arguments]
        return subprocess.run(command, cwd=repo_root, capture_output=True, text=True)

    write_images(tmp_path / "in" / "cat", 2)
    write_images(tmp_path / "in" / "dog", 1)
    done = run("data=folder", f"data.root={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "mode=raw")
    assert done.returncode == 0, done.stderr
    assert f"caco: wrote {tmp_path / 'out' / 'train.beton'}: 3 images" in done.stderr
    facts = json.loads((tmp_path / "out" / "train.json").read_text())
    assert facts["classes"] == ["cat", "dog"] and facts["images"] == 3 and facts["labelled"]
    refused = run("data=folder", f"data.root={tmp_path / 'none'}", f"out={tmp_path / 'out'}", "qualty=3")
    assert refused.returncode == 2 and "qualty=3: expected data=..., data.KEY=..." in refused.stderr
    assert "Traceback" not in refused.stderr
