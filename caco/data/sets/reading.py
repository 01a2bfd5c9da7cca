"""Reads the bytes of an image file as RGB pixels. Nothing is decoded before its size is known, and pixels that are not
in the file are never made up.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from caco.errors import UserError

# Files of these endings are taken for photographs.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = (
    "JPEG",
    "PNG",
    "PPM",
    "BMP",
    "TIFF",
    "WEBP",
    "GIF",
)  # other formats may start programs, as EPS does, or unpack without a limit
# Pillow converts these modes to RGB by a rule that keeps the 8 bits of each channel; transparency is dropped. For all
# other modes (16 and 32 bits, floats, CIE L*a*b*) it clips values or guesses a range.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
MAX_PIXELS = 178_956_970  # Pillow's own limit; 537 MB as RGB
# Pixels times scans of a JPEG; every scan passes over all pixels, and this many take a second or two.
MAX_WORK = 1_000_000_000
MAX_SCANS = 500
# Longer side over shorter side. Resizing the shorter side to a fixed size makes the longer side this many times as
# long.
MAX_ASPECT = 512
MAX_BYTES = 2**32  # limit for the size of a file, and for the size of a stored image when it is unpacked
_SAMPLE_FORMAT, _SIGNED = 339, 2  # the TIFF tag for the type of numbers, and its value for signed integers


class UnreadableImage(UserError):
    """An image cannot be read; the message names it."""


class Refused(ValueError):
    """An image could be decoded but must not be; the message says why."""


def rgb(content: bytes | memoryview, where: str, *, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an encoded image to RGB.

    Args:
        where: what errors call the image.
        size: the width and height that it must have, if they are known.
    Raises:
        UnreadableImage: it is damaged, of a kind that would be decoded wrongly, or implausibly large.
    """
    with opened(io.BytesIO(content), where) as image:
        _check(image, content, size)
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()  # now, while its file is open; `convert` would copy the pixels
        return image


def read_image(path: Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        UnreadableImage: the file is missing, or as in `rgb`; the message names the file.
    """
    return rgb(file_content(path), str(path))


def file_content(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        UnreadableImage: it cannot be read, or has more than MAX_BYTES.
    """
    try:
        size = os.stat(path).st_size
        if size > MAX_BYTES:
            raise UnreadableImage(
                f"{path}: expected an image that can be read, got a file of {size:,} bytes, where at most"
                f" {MAX_BYTES:,} are read. Remove it."
            )
        return path.read_bytes()  # one read, because Pillow's own small reads take longer than decoding a small image
    except OSError as error:
        raise UnreadableImage(
            f"{path}: expected an image that can be read, got {type(error).__name__}: {error.strerror}. Are the images"
            " still where they were?"
        ) from error


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of an image file, read from its header.

    Raises:
        UnreadableImage: as in `read_image`, as far as the header shows it.
    """
    with opened(path, str(path)) as image:
        return image.size


@contextlib.contextmanager
def opened(file: io.BytesIO | Path, where: str) -> Iterator[Image.Image]:
    """Open an image without decoding its pixels. Any error in the body of the `with` becomes an UnreadableImage.

    Raises:
        UnreadableImage: opening the image or the body failed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large sizes below its limit and of odd metadata
            with Image.open(file, formats=FORMATS) as image:
                yield image
    # Pillow raises many types of error for damaged files, some by mistakes of its plugins: SyntaxError, struct.error,
    # IndexError, ...
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):
            why = f"UnidentifiedImageError: none of {', '.join(FORMATS)}"
        raise UnreadableImage(
            f"{where}: expected an image that can be read, got {error if isinstance(error, Refused) else why}. Replace"
            " or remove it, or let others stand in for such images: loader.corrupt=skip."
        ) from error


def check_work(width: int, height: int, content: bytes | memoryview) -> None:
    """Refuse an image whose headers show that decoding it would take too much time or memory.

    Raises:
        Refused: it would.
    """
    if width * height > MAX_PIXELS:
        raise Refused(f"one of {width} x {height} pixels, where at most {MAX_PIXELS:,} are decoded")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Refused(f"one of {width} x {height} pixels, a side more than {MAX_ASPECT} times the other")
    if content[:2] == b"\xff\xd8":
        scans = _scans(content)
        if scans > MAX_SCANS or width * height * scans > MAX_WORK:
            raise Refused(
                f"a JPEG of {width} x {height} pixels in {scans} scans, which would take too long: save it as a"
                " baseline JPEG"
            )


def _scans(content: bytes | memoryview) -> int:
    """How many scans a JPEG has. This also counts the scans of embedded thumbnails, which are few."""
    every = np.frombuffer(content, np.uint8)
    step = 2**20  # bounds the memory for the comparisons, which are several times as fast as `bytes.count`
    parts = (every[first : first + step + 1] for first in range(0, len(every), step))
    return sum(int(np.count_nonzero((part[:-1] == 0xFF) & (part[1:] == 0xDA))) for part in parts)


def _check(image: Image.Image, content: bytes | memoryview, size: tuple[int, int] | None) -> None:
    if size is not None and image.size != size:
        raise Refused(f"one of {image.size[0]} x {image.size[1]} pixels where {size[0]} x {size[1]} are announced")
    check_work(*image.size, content)
    signed = _SIGNED in _sample_formats(image)
    if image.mode not in MODES or signed:
        kind = f"{image.mode}, signed" if signed else image.mode
        raise Refused(
            f"one of Pillow's mode {kind}, whose values do not fit into 8 bits a channel: set data.channels=N, the"
            " number of their channels, to read such images as they are stored, or convert them to 8 bits first,"
            " according to the range that they use"
        )


def _sample_formats(image: Image.Image) -> tuple[int, ...]:
    tags = getattr(image, "tag_v2", None)
    return () if tags is None else tuple(tags.get(_SAMPLE_FORMAT, ()))
