"""Damaged JPEGs (and a few PNGs, TIFFs and WebPs), read by Pillow and by the compiled views, with their limits on size
and time. The compiled views decode nothing that Pillow refuses, and give the same pixels.
"""

import io
import time
from pathlib import Path

import numpy as np
from damaging import damaged
from PIL import Image

from caco.data.sets.reading import UnreadableImage, rgb
from caco.data.views import native
from caco.data.views.augmentation import View, Views

VIEWS = Views(size=16, views={"one": View()}, mean=[0.5] * 3, std=[0.25] * 3)
SECONDS = 5.0  # processor time for one image
NUM_JPEGS = 8  # of the whole files; the others have other formats


def whole() -> list[bytes]:
    made = []
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).resize(
        (120, 90), Image.Resampling.BICUBIC
    )
    exif = Image.Exif()
    exif[0x0128], exif[0x011A], exif[0x010F] = 2, 72.0, "a camera"
    for image, settings in (
        (smooth, {"quality": 90}),
        (smooth, {"quality": 75, "progressive": True}),
        (smooth.convert("L"), {"quality": 80}),
        (smooth.convert("L"), {"progressive": True}),
        (smooth, {"quality": 60, "subsampling": "4:2:0", "restart_marker_rows": 1}),
        (smooth.convert("CMYK"), {"quality": 70}),
        (smooth, {"quality": 95, "optimize": True, "comment": b"a comment", "dpi": (300, 300)}),
        (smooth, {"quality": 85, "exif": exif, "icc_profile": b"0" * 300}),
    ):
        image.save(out := io.BytesIO(), "JPEG", **settings)
        made.append(out.getvalue())
    for kind in ("PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM"):
        smooth.save(out := io.BytesIO(), kind)
        made.append(out.getvalue())
    return made


def prepare(folder: Path) -> list[bytes]:
    return whole()


def case(files: list[bytes], rng: np.random.Generator) -> str:
    number = int(rng.integers(0, len(files))) if rng.integers(0, 4) == 0 else int(rng.integers(0, NUM_JPEGS))
    content = damaged(files[number], rng)
    begun = time.process_time()
    try:
        image: Image.Image | None = rgb(content, "a file")
        assert image is not None and image.mode == "RGB"
        VIEWS.plain_pixels(image)
    except UnreadableImage as error:
        assert str(error).startswith("a file: expected an image that can be read, got ")
        image = None
    if native.library() is not None and native.turbojpeg() is not None:
        compare(content, image)
    assert time.process_time() - begun < SECONDS, f"{time.process_time() - begun:.1f} s"
    return "read" if image is not None else "refused"


def compare(content: bytes, image: Image.Image | None) -> None:
    """Check that the compiled views of an encoded image, if there are any, are those of Pillow's pixels; and also if it
    is announced to have Pillow's size or, as in a damaged .beton, another."""
    row, held = native.encoded_table([content])
    announced = row.copy()
    announced["width"], announced["height"] = image.size if image is not None else (120, 90)
    other = row.copy()
    other["width"], other["height"] = 121, 90
    pixels = None if image is None else np.asarray(image)
    for plain in (18, 0):
        theirs = [np.empty((1, 16, 16, 3), np.uint8)]
        if pixels is not None:
            native.make_views(VIEWS.settings(), native.table([pixels]), np.zeros(1), 7, theirs, plain=plain)
        for rows in (row, announced, other):
            ours = [np.empty((1, 16, 16, 3), np.uint8)]
            if not native.make_views(VIEWS.settings(), rows, np.zeros(1), 7, ours, plain=plain).any():
                assert image is not None, "decoded what Pillow refuses"
                assert rows is not other or image.size == (121, 90), "decoded an image of another size"
                assert np.array_equal(ours[0], theirs[0]), "other pixels than Pillow's"
    del held
