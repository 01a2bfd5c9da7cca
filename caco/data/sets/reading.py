"""The bytes of an image file to RGB pixels: nothing is decoded before its size is known, nothing is shown that is not
in the file.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from caco.errors import UserError

FORMATS = (
    "JPEG",
    "PNG",
    "PPM",
    "BMP",
    "TIFF",
    "WEBP",
    "GIF",
)  # others may start programs, as EPS does, or unpack without a limit
# Modes of which Pillow makes RGB by a rule that keeps 8 bits of each channel as they are; transparency is left out. Of
# all others (16 and 32 bits, floats, CIE L*a*b*) it cuts values off or guesses a range.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
MAX_PIXELS = 178_956_970  # as Pillow's own limit; 537 MB as RGB
MAX_WORK = 1_000_000_000  # pixels times scans of a JPEG, each of which passes over all pixels: a second or two
MAX_SCANS = 500
MAX_ASPECT = 512  # the longer side over the shorter: what is resized by the shorter side grows by it
MAX_BYTES = 2**32  # of a file, and of an image as it is stored
_SAMPLE_FORMAT, _SIGNED = 339, 2  # TIFF's tag for the type of numbers


class UnreadableImage(UserError):
    """An image that cannot be read; the message names it."""


class Refused(ValueError):
    """Of an image that could be decoded, but must not be; in words."""


def rgb(content: bytes | memoryview, where: str, *, size: tuple[int, int] | None = None) -> Image.Image:
    """An encoded image as RGB.

    Args:
        where: what the error calls it.
        size: the width and height that it must have, if they are known.
    Raises:
        UnreadableImage: it is damaged, of a kind that would come out wrong, or larger than anything that is meant.
    """
    with opened(io.BytesIO(content), where) as image:
        _check(image, content, size)
        return image.convert("RGB")


def read_image(path: Path) -> Image.Image:
    """One image file as RGB.

    Raises:
        UnreadableImage: a ValueError that names the file.
    """
    return rgb(file_content(path), str(path))


def file_content(path: Path) -> bytes:
    """An image file's bytes.

    Raises:
        UnreadableImage: it cannot be read.
    """
    try:
        size = os.stat(path).st_size
        if size > MAX_BYTES:
            raise UnreadableImage(
                f"{path}: expected an image that can be read, got a file of {size:,} bytes, where at most"
                f" {MAX_BYTES:,} are read. Remove it."
            )
        return path.read_bytes()  # in one read: Pillow's own small ones take longer than decoding a small image
    except OSError as error:
        raise UnreadableImage(
            f"{path}: expected an image that can be read, got {type(error).__name__}: {error.strerror}. Are the images"
            " still where they were?"
        ) from error


def size_of(path: Path) -> tuple[int, int]:
    """Width and height, from the first bytes of a file.

    Raises:
        UnreadableImage: as of `read_image`, as far as it shows in them.
    """
    with opened(path, str(path)) as image:
        return image.size


@contextlib.contextmanager
def opened(file: io.BytesIO | Path, where: str) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet; what goes wrong in the body is said as what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: of sizes below its limit, of odd metadata
            with Image.open(file, formats=FORMATS) as image:
                yield image
    # Pillow raises errors of many types for damaged files, some its plugins' own slips: SyntaxError, struct.error,
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
    """Refuse what would take too long or too much memory to decode, by what its headers say.

    Raises:
        ValueError: it would.
    """
    if width * height > MAX_PIXELS:
        raise Refused(f"one of {width} x {height} pixels, where at most {MAX_PIXELS:,} are decoded")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Refused(f"one of {width} x {height} pixels, a side more than {MAX_ASPECT} times the other")
    if content[:2] == b"\xff\xd8":
        scans = bytes(content).count(b"\xff\xda")  # those of its thumbnails too, which are few
        if scans > MAX_SCANS or width * height * scans > MAX_WORK:
            raise Refused(
                f"a JPEG of {width} x {height} pixels in {scans} scans, which would take too long: save it as a"
                " baseline JPEG"
            )


def _check(image: Image.Image, content: bytes | memoryview, size: tuple[int, int] | None) -> None:
    if size is not None and image.size != size:
        raise Refused(f"one of {image.size[0]} x {image.size[1]} pixels where {size[0]} x {size[1]} are announced")
    check_work(*image.size, content)
    signed = _SIGNED in _sample_formats(image)
    if image.mode not in MODES or signed:
        kind = f"{image.mode}, signed" if signed else image.mode
        raise Refused(
            f"one of Pillow's mode {kind}, whose values do not fit into 8 bits a channel: say how many channels such"
            " images have, data.channels=N, and they are read as they are stored, or convert them first, by the range"
            " that they use"
        )


def _sample_formats(image: Image.Image) -> tuple[int, ...]:
    tags = getattr(image, "tag_v2", None)
    return () if tags is None else tuple(tags.get(_SAMPLE_FORMAT, ()))
