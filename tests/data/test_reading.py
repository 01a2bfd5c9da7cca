"""caco reads the pixels that an image file shows, or refuses the file: tested for every mode that Pillow opens, and for
files that unpack to far more than their size suggests.
"""

import io
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from loaded import batches
from PIL import Image
from tiny import compose

from caco.data.loaders.plain import plain_batches
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.folders import folder
from caco.data.sets.reading import FORMATS, MODES, UnreadableImage, _scans, read_image, rgb
from caco.engine.training import run_training
from caco.evals.features import FeatureStore
from caco.runs.files import read_json

GRAY = np.arange(0, 252, 21, dtype=np.uint8).reshape(3, 4)
COLOURS = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
EVERY_MODE = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "La",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16L",
    "I;16B",
)


def in_mode(mode: str) -> tuple[Image.Image, np.ndarray]:
    """An image in a Pillow mode, and the RGB pixels that it shows."""
    gray, thrice = Image.fromarray(GRAY), np.repeat(GRAY[..., None], 3, 2)
    if mode == "1":
        return gray.point(lambda v: 255 * (v > 100)).convert("1"), np.where(thrice > 100, 255, 0)
    if mode in ("L", "LA", "P", "PA", "La"):
        return gray.convert("LA").convert("La") if mode == "La" else gray.convert(mode), thrice
    if mode in ("I;16", "I;16L", "I;16B"):
        order = ">" if mode == "I;16B" else "<"
        return Image.frombytes(mode, (4, 3), (GRAY.astype(np.uint16) * 257).astype(f"{order}u2").tobytes()), thrice
    if mode == "I":
        return Image.fromarray(GRAY.astype(np.int32) * 257), thrice
    if mode == "F":
        return Image.fromarray(GRAY.astype(np.float32) / 255), thrice
    colours = Image.fromarray(COLOURS)
    if mode == "CMYK":
        return (
            Image.merge("CMYK", [Image.fromarray(255 - COLOURS[..., c]) for c in range(3)] + [Image.new("L", (4, 3))]),
            COLOURS,
        )
    if mode == "LAB":
        return Image.frombytes("LAB", (4, 3), COLOURS.tobytes()), COLOURS
    return (colours.convert("RGBA").convert("RGBa") if mode == "RGBa" else colours.convert(mode)), COLOURS


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_each_mode_of_each_format_shows_its_pixels_or_is_refused(mode):
    image, shown = in_mode(mode)
    tried = 0
    for kind in FORMATS:
        if kind in ("WEBP", "GIF") and (mode == "HSV" or mode not in MODES):
            continue  # Pillow saves this mode as RGB
        out = io.BytesIO()
        try:
            image.save(
                out,
                kind,
                **(
                    {"lossless": True}
                    if kind == "WEBP"
                    else {"quality": 100, "subsampling": 0}
                    if kind == "JPEG"
                    else {}
                ),
            )
        except (OSError, ValueError, KeyError):
            continue  # the format does not have this mode
        tried += 1
        with Image.open(io.BytesIO(out.getvalue())) as reopened:
            opened_as = reopened.mode
        if opened_as in MODES:
            pixels = np.asarray(rgb(out.getvalue(), "it")).astype(int)
            # JPEG is lossy, GIF uses a palette, and YCbCr is rounded twice.
            most = 24 if kind in ("JPEG", "GIF") else 3 if mode == "YCbCr" else 0
            assert np.abs(pixels - shown).max() <= most, (kind, opened_as)
        else:
            with pytest.raises(
                UnreadableImage,
                match=f"it: expected an image that can be read, got one of Pillow's mode {re.escape(opened_as)}, ",
            ):
                rgb(out.getvalue(), "it")
    assert tried or mode in ("HSV", "PA", "RGBa", "La", "I;16L", "RGBX")


def png(*, bits: int, colour: int, rows: bytes, width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_what_has_more_than_eight_bits_is_cut_to_its_high_ones_or_refused(tmp_path):
    deep = COLOURS.astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    assert np.array_equal(np.asarray(rgb(png(bits=16, colour=2, rows=rows, width=4, height=3), "deep")), COLOURS)
    gray = b"".join(b"\0" + row.tobytes() for row in GRAY.astype(">u2") * 257)
    for content in (
        png(bits=16, colour=0, rows=gray, width=4, height=3),
        b"P5 2 1 65535\n" + bytes([1, 2, 3, 4]),
        b"Pf 2 1 -1\n" + np.array([0.5, 1], "<f4").tobytes(),
    ):
        with pytest.raises(
            UnreadableImage,
            match=("whose values do not fit into 8 bits a channel: set data.channels=N, the number of their channels"),
        ):
            rgb(content, "deep")
    Image.fromarray(GRAY).save(tmp_path / "signed.tif", tiffinfo={339: 2})
    with pytest.raises(UnreadableImage, match=r"signed\.tif: .* mode L, signed, "):
        read_image(tmp_path / "signed.tif")


def test_formats_that_may_start_programs_are_not_tried():
    with pytest.raises(UnreadableImage, match="got UnidentifiedImageError: none of JPEG, PNG"):
        rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) print\n", "page.jpg")


def many_scans(side: int, more: int) -> bytes:
    """A progressive JPEG that repeats its last scan many times: each costs few bytes, but a pass over all pixels."""
    Image.new("L", (side, side), 128).save(out := io.BytesIO(), "JPEG", progressive=True)
    content = out.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * more + content[-2:]


def test_what_would_unpack_to_more_than_is_meant_is_refused_before_it_is():
    begun = time.process_time()
    for content, got in (
        (png(bits=8, colour=2, rows=b"", width=60_000, height=60_000), "DecompressionBombError|60000 x 60000 pixels"),
        (png(bits=1, colour=0, rows=b"", width=60_000, height=20), "a side more than 512 times the other"),
        (many_scans(16, 600), "a JPEG of 16 x 16 pixels in 60[0-9] scans, which would take too long"),
        (many_scans(2000, 400), "a JPEG of 2000 x 2000 pixels in 40[0-9] scans"),
    ):
        with pytest.raises(UnreadableImage, match=f"bomb: expected an image that can be read, got .*({got})"):
            rgb(content, "bomb")
    assert time.process_time() - begun < 5
    assert rgb(many_scans(64, 20), "many").size == (64, 64)


def test_scans_are_counted_wherever_they_are():
    content = bytearray(2**20 * 2 + 5)
    for at in (0, 1, 2**20 - 1, 2**20 + 1, 2**21 - 1, 2**21 + 3):
        content[at : at + 2] = b"\xff\xda"
    for held in (bytes(content), memoryview(content), b"\xff", b"\xff\xda"):
        assert _scans(held) == bytes(held).count(b"\xff\xda")


# loader.corrupt=skip, also for images in memory and in evaluations.

BROKEN = (3, 4, 8)


@pytest.fixture
def pictures(tmp_path: Path, write_images: Callable) -> Callable:
    """pictures(in_memory_mb) makes train/ and test/ with 12 cats and 8 dogs each; three of them cannot be read, each
    for a different reason.
    """
    for split in ("train", "test"):
        write_images(tmp_path / split / "cat", 12, size=20)
        write_images(tmp_path / split / "dog", 8, size=20)
        cats = tmp_path / split / "cat"
        (cats / "0003.png").write_bytes(b"no image")
        (cats / "0004.png").write_bytes(png(bits=8, colour=2, rows=b"", width=60_000, height=60_000))
        Image.fromarray(GRAY.astype(np.uint16)).save(cats / "0008.png")
    return lambda in_memory_mb: folder(root=str(tmp_path), in_memory_mb=in_memory_mb)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory_mb", [0, 16])
def test_others_stand_in_for_what_cannot_be_read_from_files_and_from_memory_alike(
    pictures, two_views, in_memory_mb, workers, capsys
):
    source = pictures(in_memory_mb).train
    (made,) = batches(source, two_views, workers=workers, batch=20, corrupt="skip")
    assert sorted(made.index.tolist()) == sorted([i for i in range(20) if i not in BROKEN] + [5, 5, 9])
    assert (
        "image 4 cannot be read; image 5 stands in for it" in (told := capsys.readouterr().err)
        and "cat/0004.png" in told
    )
    (again,) = batches(pictures(0).train, two_views, batch=20, corrupt="skip")
    assert all((a == b).all() for a, b in zip(made.views, again.views, strict=True))
    with pytest.raises(UnreadableImage, match=r"cat/000[348]\.png"):
        batches(source, two_views, workers=workers, batch=20)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory_mb", [0, 16])
def test_in_evaluations_the_next_of_the_same_class_stand_in(pictures, two_views, in_memory_mb, workers, capsys):
    source = pictures(in_memory_mb).test.part(np.array([0, 3, 12, 8, 13, 1]), "some")  # the image after 8 is a dog
    images, labels = zip(*plain_batches(source, two_views, batch=4, num_workers=workers, corrupt="skip"), strict=True)
    images, labels = np.concatenate(images), np.concatenate(labels)
    assert labels.tolist() == [0, 0, 1, 0, 1, 0]
    assert np.array_equal(images[1], images[5]) and np.array_equal(images[3], images[5])
    told = capsys.readouterr().err
    assert (
        told.count("\n") == 1
        and "caco: 2 of the 6 images of some cannot be read; the next of their class stand in" in told
    )
    assert "cat/0003.png" in told and "cat/0008.png" in told
    with pytest.raises(UnreadableImage, match=r"cat/0003\.png"):
        list(plain_batches(source, two_views, batch=4, num_workers=workers))


@pytest.mark.parametrize("in_memory_mb", [0, 16])
def test_who_stands_in_does_not_depend_on_what_is_read_together(pictures, two_views, in_memory_mb, monkeypatch):
    source = pictures(in_memory_mb).test
    (whole, _), *_ = plain_batches(source, two_views, batch=20, corrupt="skip")
    assert (
        np.array_equal(whole[3], whole[5]) and np.array_equal(whole[4], whole[5]) and np.array_equal(whole[8], whole[9])
    )
    monkeypatch.setattr("caco.data.loaders.plain._PIECE_BYTES", 1)  # one image at a time
    for some in ([8], [3, 0], [19, 4, 8, 2, 3]):  # as ranks or a resumed computation read them
        ((images, _),) = plain_batches(
            source, two_views, batch=20, indices=np.array(some), num_workers=2, corrupt="skip"
        )
        assert np.array_equal(images, whole[some])


def test_where_too_many_cannot_be_read_it_is_said_instead_of_tried_for_ever(tmp_path, write_images, two_views):
    write_images(tmp_path / "cat", 120)
    source = folder(root=str(tmp_path), in_memory_mb=0).train
    for file in (tmp_path / "cat").iterdir():
        file.unlink()
    with pytest.raises(
        UnreadableImage,
        match=r"in place of .*cat/\d+\.png, got none among the 100 that follow it\. Are the images still",
    ):
        batches(source, two_views, corrupt="skip")
    with pytest.raises(UnreadableImage, match=r"cat/0000\.png, got none among the 100 of its class that follow it"):
        list(plain_batches(source, two_views, batch=4, corrupt="skip"))
    with pytest.raises(
        UnreadableImage, match="FileNotFoundError: No such file or directory. Are the images still where they were"
    ):
        batches(source, two_views)
    with pytest.raises(
        OSError, match=r"cat/0000\.png: expected an image that can be read, got FileNotFoundError: No such file"
    ):
        source.digest()


def test_features_with_stand_ins_are_kept_apart_from_those_without(pictures, two_views, tmp_path):
    def store(corrupt: Literal["fail", "skip"]) -> FeatureStore:
        return FeatureStore(
            pictures(0),
            two_views,
            batch=4,
            device="cpu",
            precision="fp32",
            loader=TorchLoader(corrupt=corrupt),
            folder=tmp_path / "kept",
        )

    from caco.evals.pixels import RawPixels

    assert store("skip").features(RawPixels(8), "test").shape == (20, 192)
    with pytest.raises(UnreadableImage, match=r"cat/0003\.png"):
        store("fail").features(RawPixels(8), "test")


@pytest.mark.parametrize("in_memory_mb", [0, 16])
def test_a_run_that_skips_trains_and_evaluates(pictures, tmp_path, in_memory_mb):
    pictures(0)
    settings = [
        "data=folder", f"data.root={tmp_path}", f"data.in_memory_mb={in_memory_mb}", "batch=8", "loader.corrupt=skip",
        "augmentation.size=16",
        "max_steps=4", "bank.size=16", "eval.knn.k=2",
    ]  # fmt: skip
    run_training(compose(*settings, bank=False), tmp_path / "run")
    assert read_json(tmp_path / "run" / "summary.json")["loss"] > 0
