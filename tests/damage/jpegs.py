"""Damaged JPEGs (and a few PNGs, TIFFs and WebPs), read by Pillow and by the compiled views, with their limits on size
and time.
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


def whole() -> list[bytes]:
    made = []
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).resize(
        (120, 90), Image.Resampling.BICUBIC
    )
    for image, settings in (
        (smooth, {"quality": 90}),
        (smooth, {"quality": 75, "progressive": True}),
        (smooth.convert("L"), {"quality": 80}),
        (smooth.convert("L"), {"progressive": True}),
        (smooth, {"quality": 60, "subsampling": "4:2:0", "restart_marker_rows": 1}),
        (smooth.convert("CMYK"), {"quality": 70}),
        (smooth, {"quality": 95, "optimize": True, "comment": b"a comment", "dpi": (300, 300)}),
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
    number = int(rng.integers(0, len(files))) if rng.integers(0, 4) == 0 else int(rng.integers(0, 7))
    content = damaged(files[number], rng)
    begun = time.process_time()
    try:
        image = rgb(content, "a file")
        word = "read"
        size = image.size
        assert image.mode == "RGB"
        VIEWS.plain_pixels(image)
    except UnreadableImage as error:
        assert str(error).startswith("a file: expected an image that can be read, got ")
        word, size = "refused", (120, 90)
    if content[:2] == b"\xff\xd8" and native.library() is not None and native.turbojpeg() is not None:
        # As in a .beton: the bytes of the JPEG, and the size that its header announced.
        held = np.frombuffer(content, np.uint8)
        row = np.zeros(1, native.IMAGE)
        row["data"], row["bytes"], row["width"], row["height"] = held.ctypes.data, len(held), *size
        VIEWS.plain_batch(row)
        out = [np.empty((1, 16, 16, 3), np.uint8)]
        native.make_views(VIEWS.settings(), row, np.zeros(1), 7, out)
    assert time.process_time() - begun < SECONDS, f"{time.process_time() - begun:.1f} s"
    return word
