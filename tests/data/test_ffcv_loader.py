"""A .beton is read with FFCV, or without it, into the same batches; what is damaged in it is named."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from loaded import EVERY_PART, FFCV, assert_same, batches, needs_ffcv
from PIL import Image

from caco import instructions
from caco.data.loaders.ffcv_loader import AutoLoader, FFCVLoader
from caco.data.loaders.plain import plain_batches
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.beton import BetonImages
from caco.data.sets.folders import folder
from caco.data.views import native
from caco.errors import FileError
from caco.write import write_splits


@needs_ffcv
@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (3, 2)])
def test_ffcv_makes_the_same_batches(noise_source, beton_source, two_views, threads, prefetch):
    source, file = noise_source(30), beton_source(30)
    for part in EVERY_PART:
        expected = batches(source, two_views, **part)
        made = batches(file, two_views, kind=FFCVLoader, workers=threads, prefetch=prefetch, **part)
        assert len(made) == len(expected)
        if made:
            assert_same(made, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_beton_gives_the_same_batches_without_ffcv(noise_source, beton_source, two_views, workers):
    assert_same(batches(beton_source(30), two_views, workers=workers), batches(noise_source(30), two_views))


@needs_ffcv
def test_auto_takes_ffcv_for_a_beton_and_says_so(noise_source, beton_source, two_views, capsys, monkeypatch):
    source, file = noise_source(16), beton_source(16)
    capsys.readouterr()
    made = batches(file, two_views, kind=AutoLoader)
    assert capsys.readouterr().err == "caco: images and augmentation: FFCV reads, its compiled pipeline augments\n"
    assert_same(made, batches(source, two_views, kind=AutoLoader))
    assert (
        capsys.readouterr().err
        == "caco: images and augmentation: decoded images kept in memory, augmented by compiled C++ code\n"
    )
    assert_same(
        batches(source, two_views, kind=AutoLoader, rank=1, world=2), batches(source, two_views, rank=1, world=2)
    )
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("caco.data.loaders.ffcv_loader.is_installed", lambda name: False)
    assert_same(batches(file, two_views, kind=AutoLoader), made)
    assert (
        "threads of compiled C++ code decode images and augment them; FFCV is not used: needs FFCV"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(native, "turbojpeg", lambda: None)
    assert_same(batches(file, two_views, kind=AutoLoader), made)
    assert (
        "worker processes read files, augmented by compiled C++ code; FFCV is not used: needs libturbojpeg"
        in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="loader=ffcv: needs libturbojpeg .*; loader=auto and loader=torch do without"):
        batches(file, two_views, kind=FFCVLoader, workers=1)
    with pytest.raises(ValueError, match=r"loader=ffcv: reads a \.beton"):
        batches(source, two_views, kind=FFCVLoader, workers=1)


def test_with_compiled_parts_turned_off_pillow_makes_the_same_batches_and_ffcv_is_refused(
    noise_source, beton_source, two_views, capsys, monkeypatch
):
    source, file = noise_source(16), beton_source(16)
    made = batches(source, two_views)
    monkeypatch.setattr(instructions, "LEVEL", "torch")
    capsys.readouterr()
    assert_same(batches(source, two_views, kind=AutoLoader), made)
    assert (
        capsys.readouterr().err
        == "caco: images and augmentation: decoded images kept in memory, augmented by Pillow (the compiled views are"
        " turned off by CACO_INSTRUCTIONS=torch)\n"
    )
    assert_same(batches(file, two_views, kind=AutoLoader), made)
    message = (
        "loader=ffcv: needs the compiled views, which are turned off by CACO_INSTRUCTIONS=torch: unset"
        " CACO_INSTRUCTIONS; loader=auto"
    )
    with pytest.raises(ValueError, match=message):
        batches(file, two_views, kind=FFCVLoader, workers=1)


@needs_ffcv
def test_ffcv_leaves_the_process_as_it_was(beton_source, two_views):
    file = beton_source(16)
    torch.set_num_threads(2)
    try:
        before, threads = torch.get_rng_state(), set(threading.enumerate())
        loader = FFCVLoader(num_workers=1).bind(file, two_views, batch=4, seed=7)
        list(loader.epoch(0))
        next(loader.epoch(1))
        loader.close()
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), before) and set(threading.enumerate()) <= threads
    finally:
        torch.set_num_threads(1)


@pytest.fixture
def photos(tmp_path: Path) -> BetonImages:
    """Twelve JPEGs in a .beton; number 3 is cut short, and number 4 contains random bytes."""
    (tmp_path / "in").mkdir()
    smooth = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8)
    for i, colours in enumerate(smooth):
        Image.fromarray(colours).resize((60, 40), Image.Resampling.BICUBIC).save(
            tmp_path / "in" / f"{i:02d}.jpg", quality=90
        )
    splits = folder(root=str(tmp_path / "in"))
    write_splits(splits, tmp_path, num_workers=1)
    file = tmp_path / "train.beton"
    whole = BetonImages(file, name="photos")
    content = bytearray(file.read_bytes())
    for at, begin in ((3, int(whole._sizes[3]) // 2), (4, 0)):
        place, size = int(whole.records["image"]["place"][at]), int(whole._sizes[at])
        content[place + begin : place + size] = bytes(size - begin)
    file.write_bytes(content)
    return BetonImages(file, name="photos")


@pytest.mark.parametrize(
    ("kind", "workers"), [(TorchLoader, 0), (TorchLoader, 2), pytest.param(FFCVLoader, 2, marks=needs_ffcv)]
)
def test_a_corrupt_jpeg_is_named_or_another_stands_in_for_it(photos, two_views, kind, workers, capsys):
    with pytest.raises(ValueError, match=r"train\.beton: .* corrupt JPEG as number [34]\. .*loader\.corrupt=skip"):
        batches(photos, two_views, kind=kind, workers=workers, batch=12)
    (made,) = batches(photos, two_views, kind=kind, workers=workers, batch=12, corrupt="skip")
    assert sorted(made.index.tolist()) == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10, 11]
    told = capsys.readouterr().err
    assert "image 3 cannot be read; image 5 stands in for it" in told and "(2 such so far)" in told
    (again,) = batches(photos, two_views, batch=12, corrupt="skip")
    assert_same([made], [again])
    stand_ins = [made.views[0][row] for row in range(12) if made.index[row] == 5]
    assert not torch.equal(stand_ins[0], stand_ins[1])  # each has the random numbers of its own place
    with pytest.raises(ValueError, match=r"corrupt JPEG as number 3\."):
        list(plain_batches(photos, two_views, batch=6))


@pytest.mark.parametrize("kind", [TorchLoader, FFCV])
def test_where_nothing_can_be_read_skipping_ends_too(photos, two_views, kind):
    broken = photos.part(np.array([3, 4, 3, 4]), "broken")
    with pytest.raises(
        ValueError,
        match="broken: expected an image that can be read in place of image 0 of broken, got none among the 3 that",
    ):
        batches(broken, two_views, kind=kind, workers=1, batch=4, corrupt="skip")


@needs_ffcv
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_breaks_inside_ffcv_ends_the_epoch(beton_source, two_views, monkeypatch):
    from caco.data.loaders import ffcv_pipeline

    file = beton_source(16)
    loader = FFCVLoader(num_workers=1).bind(file, two_views, batch=4, seed=7)
    monkeypatch.setattr(native, "make_views", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(loader.epoch(0))
    monkeypatch.undo()
    broken = property(lambda self: 1 / 0, lambda self, value: None)
    monkeypatch.setattr(ffcv_pipeline.DecodeIntoViews, "ended", broken, raising=False)
    with pytest.raises(RuntimeError, match="FFCV's thread has ended without a batch"):
        list(loader.epoch(1))
    monkeypatch.undo()
    assert len(list(loader.epoch(2))) == 4  # the loader still works
    file.file.unlink()
    with pytest.raises(FileError, match=r"train\.beton: expected the \.beton that this run reads"):
        list(loader.epoch(3))
    loader.close()
