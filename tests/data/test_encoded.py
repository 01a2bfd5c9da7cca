"""Encoded images that the compiled code reads by itself give the same batches, errors and messages as Pillow, whatever
kind of image they are."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_reading import many_scans

from caco.data.loaders import rows
from caco.data.loaders.ffcv_loader import AutoLoader
from caco.data.loaders.plain import plain_batches
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.beton import beton
from caco.data.sets.encoded import EncodedImages
from caco.data.sets.image_files import ImageFiles
from caco.data.sets.reading import UnreadableImage, rgb
from caco.data.sets.sources import Source, Splits
from caco.data.views import native
from caco.data.views.augmentation import Patches, View, Views
from caco.data.views.operations import Grayscale
from caco.write import write_splits


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    if native.library() is None:
        pytest.skip(f"the compiled views {native.why_not()}")
    if native.turbojpeg() is None:
        pytest.skip("libturbojpeg is missing")


def picture(width: int = 150, height: int = 110) -> Image.Image:
    """Smooth colours with noise."""
    y, x = np.mgrid[:height, :width]
    wash = np.stack([2 * x + y, 3 * y, 255 - x], -1) + np.random.default_rng(0).integers(0, 60, (height, width, 3))
    return Image.fromarray(wash.astype(np.uint8))


def saved(image: Image.Image, kind: str = "JPEG", **settings) -> bytes:
    image.save(out := io.BytesIO(), kind, **settings)
    return out.getvalue()


def segment(content: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment before its others."""
    return content[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + content[2:]


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of (tag, type, count, value of four bytes) entries, with the number 72 / 1 at offset 100."""
    table = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return (b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + table).ljust(106, b"\0") + struct.pack(
        "<II", 72, 1
    )


INCHES, RESOLUTION = (0x0128, 3, 1, b"\2\0\0\0"), (0x011A, 5, 1, b"\x64\0\0\0")


def sampled(across: int, down: int) -> bytes:
    """A JPEG whose sampling factors of the first component were changed. Its pixels are wrong, and too few or too many,
    but each decoder has to treat them alike."""
    content = bytearray(saved(picture(), subsampling=0))
    frame = content.index(b"\xff\xc0")
    content[frame + 11] = across << 4 | down
    return bytes(content)


def without_jfif(content: bytes) -> bytes:
    """A JPEG without the segment that says its resolution, which Pillow then takes from EXIF data."""
    return content.replace(content[content.index(b"\xff\xe0\x00\x10JFIF") :][:18], b"")


WHOLE = saved(picture())
KINDS = {
    "4:4:4": saved(picture(), subsampling=0),
    "4:2:2": saved(picture(), subsampling=1),
    "4:2:0": saved(picture(), subsampling=2),
    "4:4:0": sampled(1, 2),
    "4:1:1": sampled(4, 1),
    "3:1 across": sampled(3, 1),
    "grey": saved(picture().convert("L")),
    "progressive": saved(picture(), progressive=True),
    "grey, progressive": saved(picture().convert("L"), progressive=True),
    "RGB without conversion": saved(picture(), keep_rgb=True),
    "CMYK": saved(picture().convert("CMYK")),
    "restart markers": saved(picture(), restart_marker_rows=1),
    "optimised": saved(picture(), optimize=True, quality=30),
    "coarse": saved(picture(), quality=1),
    "EXIF, turned": segment(WHOLE, 0xE1, exif((0x0112, 3, 1, b"\6\0\0\0"), INCHES, RESOLUTION)),
    "EXIF with a resolution in text": without_jfif(segment(WHOLE, 0xE1, exif(INCHES, (0x011A, 2, 1, bytes(4))))),
    "EXIF instead of JFIF": without_jfif(segment(WHOLE, 0xE1, exif(INCHES, RESOLUTION))),
    "EXIF of nothing": segment(WHOLE, 0xE1, b"Exif\0\0"),
    "profile": saved(picture(), icc_profile=b"profile" * 20_000),
    "profile of no number": segment(WHOLE, 0xE2, b"ICC_PROFILE\0"),
    "Photoshop": segment(WHOLE, 0xED, b"Photoshop 3.0\0008BIM\x03\xed\0\0\0\0\0\x10" + bytes(16)),
    "Photoshop, cut short": segment(WHOLE, 0xED, b"Photoshop 3.0\0008BIM\x03\xed"),
    "Adobe, cut short": segment(WHOLE, 0xEE, b"Adobe"),
    "comment": saved(picture(), comment=b"\xff\xda\xff\xd9"),
    "several images": saved(picture(), "MPO", save_all=True, append_images=[picture(20, 20)]),
    "bytes after the end": WHOLE + b"more" * 100,
    "two in one": WHOLE + saved(picture(30, 30)),
    "filled between segments": WHOLE[:2] + b"\xff\xff" + WHOLE[2:],
    "12 bits": WHOLE.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"),
    "arithmetic coding": WHOLE.replace(b"\xff\xc0", b"\xff\xc9"),
    "no end": WHOLE[:-2],
    "half": WHOLE[: len(WHOLE) // 2],
    "headers only": WHOLE[: WHOLE.index(b"\xff\xda")],
    "end in the middle": WHOLE[: len(WHOLE) // 2] + b"\xff\xd9" + WHOLE[len(WHOLE) // 2 :],
    "an unknown marker in the data": WHOLE[: 2 * len(WHOLE) // 3] + b"\xff\x02" + WHOLE[2 * len(WHOLE) // 3 :],
    "noise in the data": WHOLE[: len(WHOLE) // 2] + bytes(range(60)) + WHOLE[len(WHOLE) // 2 :],
    "many scans": many_scans(16, 600),
    "some scans": many_scans(64, 20),
    "announced too large": saved(picture()).replace(struct.pack(">HH", 110, 150), struct.pack(">HH", 60_000, 60_000)),
    "announced too long": saved(picture()).replace(struct.pack(">HH", 110, 150), struct.pack(">HH", 2, 60_000)),
    "no height": saved(picture()).replace(struct.pack(">HH", 110, 150), struct.pack(">HH", 0, 150)),
    "one pixel": saved(picture(1, 1)),
    "small": saved(picture(9, 5), subsampling=2),
    "wide": saved(picture(500, 40), subsampling=2),
    "tall": saved(picture(40, 500), subsampling=1),
    "PNG": saved(picture(), "PNG"),
    "WebP": saved(picture(), "WEBP"),
    "no image": b"no image",
    "nothing": b"",
}
DAMAGED = (
    "EXIF with a resolution in text", "profile of no number", "Photoshop, cut short", "Adobe, cut short", "12 bits",
    "no end", "half", "headers only", "an unknown marker in the data",
    "many scans", "announced too large", "announced too long", "no height", "no image", "nothing",
)  # fmt: skip
AUGMENTATIONS = {
    "two sizes": {"large": View(scale=[0.05, 0.6], blur_p=0.5), "small": View(size=14, scale=[0.02, 0.2])},
    "bicubic and rotated": {"one": View(interpolation="bicubic", rotate=20.0, shift=0.1)},
    "further operations": {"one": View(then={"fewer": Grayscale(p=0.5)})},
    "patches": {
        "whole": View(),
        "cut": View(size=24, patches=Patches(grid=2, size=10, stride=12, jitter=2, each=View(size=None))),
    },
}


def views_of(name: str, **settings) -> Views:
    return Views(size=24, views=AUGMENTATIONS[name], mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3], **settings)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """without() hides libturbojpeg, so that Pillow decodes."""
    return lambda: monkeypatch.setattr(native, "turbojpeg", lambda: None)


def files_of(folder: Path, contents: list[bytes]) -> ImageFiles:
    names = [f"{number:03}.jpg" for number in range(len(contents))]
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_bytes(content)
    return ImageFiles(folder, names, name="files", labels=np.arange(len(contents)) % 2, classes=["a", "b"])


def in_memory_of(contents: list[bytes]) -> EncodedImages:
    names = np.array([f"row {number}".encode() for number in range(len(contents))])
    labels = np.arange(len(contents)) % 2
    return EncodedImages(lambda i: memoryview(contents[i]), names, name="encoded", labels=labels, classes=["a", "b"])


def both(source: Source, without: Callable, make: Callable[[], list]) -> tuple[list, list]:
    """The results of `make` with the compiled decoder, and without it."""
    assert rows.rows_of(source, 1) is not None
    ours = make()
    without()
    assert rows.rows_of(source, 1) is None
    return ours, make()


def readable() -> list[bytes]:
    return [content for name, content in KINDS.items() if name not in DAMAGED]


@pytest.mark.parametrize("make_source", [files_of, lambda _, contents: in_memory_of(contents)], ids=["files", "memory"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_training_batches_are_those_of_pillow(tmp_path, without, make_source, workers, augmentation):
    source = make_source(tmp_path, readable())

    def batches() -> list:
        loader = TorchLoader(num_workers=workers).bind(source, views_of(augmentation), batch=8, seed=3, drop_last=False)
        made = [(*[v.clone() for v in b.views], b.patches, b.index.clone(), b.label.clone()) for b in loader.epoch(1)]
        loader.close()
        return [tensor for batch in made for tensor in batch if tensor is not None]

    ours, theirs = both(source, without, batches)
    assert len(ours) == len(theirs) > 8 and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("make_source", [files_of, lambda _, contents: in_memory_of(contents)], ids=["files", "memory"])
@pytest.mark.parametrize("settings", [{}, {"plain_interpolation": "bicubic", "plain_crop": 1.0}, {"colours": "lab"}])
def test_plain_batches_are_those_of_pillow(tmp_path, without, make_source, settings):
    source = make_source(tmp_path, readable())
    views = views_of("two sizes", **settings)

    def batches() -> list:
        return [tensor.clone() for batch in plain_batches(source, views, batch=8, num_workers=2) for tensor in batch]

    ours, theirs = both(source, without, batches)
    assert len(ours) == len(theirs) > 8 and all(map(torch.equal, ours, theirs))
    for image, content in zip(torch.cat(theirs[::2]), readable(), strict=True):
        assert torch.equal(image, views.plain(rgb(content, "it")))


def test_usual_jpegs_are_decoded_by_the_compiled_code_and_doubtful_ones_by_pillow():
    made = np.empty((len(KINDS), 24, 24, 3), np.uint8)
    table, held = native.encoded_table(list(KINDS.values()))
    left = views_of("two sizes").plain_batch(table, made)
    del held
    by_pillow = {name for name, is_left in zip(KINDS, left, strict=True) if is_left}
    assert by_pillow == {
        *DAMAGED, "CMYK", "EXIF of nothing", "several images", "filled between segments", "arithmetic coding",
        "end in the middle", "some scans", "PNG", "WebP",
    }  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("corrupt", ["fail", "skip"])
def test_damaged_images_have_the_same_messages_and_stand_ins(tmp_path, without, name, corrupt, capsys):
    contents = [WHOLE, KINDS["grey"], KINDS[name], KINDS["4:2:0"], KINDS["progressive"], WHOLE]
    source, views = files_of(tmp_path, contents), views_of("two sizes")

    def outcomes() -> list:
        made: list = []
        for workers in (0, 2):
            loader = TorchLoader(num_workers=workers, corrupt=corrupt).bind(source, views, batch=3, seed=0)
            training = ((*batch.views, batch.index) for batch in loader.epoch(0))
            for batches in (plain_batches(source, views, batch=4, num_workers=workers, corrupt=corrupt), training):
                try:
                    made += [tensor.clone() for batch in batches for tensor in batch]
                except UnreadableImage as error:
                    made.append(str(error))
            loader.close()
        return [*made, capsys.readouterr().err]

    ours, theirs = both(source, without, outcomes)
    assert len(ours) == len(theirs) and "002.jpg" in str(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", [TorchLoader, AutoLoader])
def test_a_beton_gives_what_the_files_give_whoever_decodes(tmp_path, kind):
    # Those that are written as they are; all others are encoded anew.
    names = [name for name in KINDS if name not in (*DAMAGED, "CMYK", "several images", "PNG", "WebP")]
    source = files_of(tmp_path, [KINDS[name] for name in names])
    write_splits(Splits(source, None, None), tmp_path, num_workers=1)
    packed = beton(root=str(tmp_path)).pretrain
    made = []
    for loader, images in ((TorchLoader(num_workers=1), source), (kind(num_workers=2), packed)):
        bound = loader.bind(images, views_of("two sizes"), batch=len(names), seed=3)
        made.append([view.clone() for batch in bound.epoch(1) for view in batch.views])
        bound.close()
    assert len(made[0]) == len(made[1]) == 2 and all(map(torch.equal, *made))


def test_what_is_too_large_is_not_decoded(monkeypatch):
    """Neither by the compiled code nor, for lack of a limit, afterwards."""
    for name in ("announced too large", "announced too long", "many scans"):
        table, held = native.encoded_table([KINDS[name]])
        assert views_of("two sizes").plain_batch(table, np.empty((1, 24, 24, 3), np.uint8)).all()
        del held
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(UnreadableImage):
            rgb(KINDS[name], "it")
        monkeypatch.undo()


def test_a_file_that_is_gone_or_no_file_is_refused_by_name(tmp_path):
    source, views = files_of(tmp_path, [WHOLE] * 5), views_of("two sizes")
    (tmp_path / "002.jpg").unlink()
    with pytest.raises(UnreadableImage, match=r"002\.jpg: expected .* FileNotFoundError: .* still where they were"):
        list(plain_batches(source, views, batch=5, num_workers=1))
    (tmp_path / "002.jpg").mkdir()
    with pytest.raises(UnreadableImage, match=r"002\.jpg: expected .* IsADirectoryError"):
        list(plain_batches(source, views, batch=5, num_workers=1))


def test_sets_of_other_formats_and_channels_are_read_by_processes(tmp_path):
    pngs = files_of(tmp_path, [KINDS["PNG"]] * 5 + [WHOLE] * 3)
    assert rows.rows_of(pngs, 1) is None
    assert rows.rows_of(pngs.part(np.arange(3, 8), "some"), 1) is not None
    assert rows.rows_of(ImageFiles(tmp_path, ["005.jpg"], name="one", channels=3), 1) is None
