"""Reads images as they are stored, for data.channels=N: any number of channels and any type of number, without a
conversion.

The result is an array [H, W, C] of the numbers in the file. Not here: photographs, which are 8-bit RGB (reading.py),
and what is done with the numbers (caco/data/views/channels.py).
"""

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from caco.data.sets.reading import MAX_BYTES, Refused, UnreadableImage, check_work, file_content, opened
from caco.errors import UserError
from caco.installed import is_installed, to_install

EXTENSIONS = (".npy",)  # files of these endings are images besides those of photographs
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY = b"\x93NUMPY"
_PNG = b"\x89PNG\r\n\x1a\n"
# In these modes Pillow gives the numbers exactly as they are in the file. Of PNGs with 16 bits and several channels it
# keeps only 8 bits, so imagecodecs reads these.
_AS_STORED = ("L", "LA", "RGB", "RGBA", "CMYK", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def read_stored(path: Path, channels: int) -> np.ndarray:
    """Read one image file as an array [H, W, channels] of the file's own type (uint8, uint16, float32, ...).

    Raises:
        UnreadableImage: it is damaged, has another number of channels, or has numbers that are not finite; the message
            names the file.
        UserError: a package that reads such files is not installed.
    """
    return stored(file_content(path), str(path), channels)


def stored(content: bytes, where: str, channels: int) -> np.ndarray:
    """Like `read_stored`, but from the file's content; errors call the image `where`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of odd metadata
            if content.startswith(_NPY):
                pixels = _npy(content)
            elif content.startswith(_TIFF):
                pixels = _tiff(content, where, channels)
            else:
                return checked(_by_pillow(content, where, channels), where, channels)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - for damaged files, libraries raise errors of any type
        raise _unreadable(
            where, str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        ) from error
    return checked(pixels, where, channels)


def checked(pixels: np.ndarray, where: str, channels: int) -> np.ndarray:
    """Check an image's array; return it as [H, W, channels], contiguous and in the machine's byte order.

    Raises:
        UnreadableImage: it has another shape or type, or has numbers that are not finite.
    """
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.size == 0 or pixels.dtype.kind not in "buif":
        raise _unreadable(
            where,
            f"an array of shape {list(pixels.shape)} and type {pixels.dtype} where [height, width, channels] is"
            " expected",
        )
    if pixels.shape[2] != channels:
        raise _unreadable(where, f"one of {pixels.shape[2]} channels where data.channels={channels}")
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise _unreadable(where, "one that holds numbers which are not finite")
    return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))


def shown(pixels: np.ndarray) -> Image.Image:
    """Make a picture for people to look at: the first three channels, or only the first one, each stretched from its
    smallest to its largest number.
    """
    some = pixels[:, :, : 3 if pixels.shape[2] >= 3 else 1].astype(np.float64)
    least, most = some.min((0, 1)), some.max((0, 1))
    stretched = (255 * (some - least) / np.where(most > least, most - least, 1)).round().astype(np.uint8)
    return Image.fromarray(np.repeat(stretched, 3, 2) if stretched.shape[2] == 1 else stretched)


def _npy(content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    _check_size(shape[:2], shape, dtype)
    return np.load(io.BytesIO(content), allow_pickle=False)


def _tiff(content: bytes, where: str, channels: int) -> np.ndarray:
    if not is_installed("tifffile"):
        raise UserError(
            f"{where}: TIFFs are read as they are stored by tifffile, which is not"
            f" installed{to_install(package='tifffile')}"
        )
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        series = file.series[0]
        axes = series.axes
        if "Y" not in axes or "X" not in axes or len(axes) > 3:
            raise Refused(f"a TIFF of axes {axes}, where height, width and at most one more are expected")
        others = [size for size, axis in zip(series.shape, axes, strict=True) if axis not in "YX"]
        if others and others[0] != channels:
            raise Refused(f"one of {others[0]} channels where data.channels={channels}")
        _check_size((series.shape[axes.index("Y")], series.shape[axes.index("X")]), series.shape, series.dtype)
        try:
            pixels = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise UserError(
                f"{where}: this TIFF's compression needs imagecodecs, which is not"
                f" installed{to_install(package='imagecodecs')}"
            ) from error
    order = [axes.index("Y"), axes.index("X"), *(i for i, axis in enumerate(axes) if axis not in "YX")]
    return pixels.transpose(order)


def _by_pillow(content: bytes, where: str, channels: int) -> np.ndarray:
    if (
        content.startswith(_PNG) and len(content) > 25 and content[24] == 16 and content[25] in (2, 4, 6)
    ):  # byte 24 is the bit depth, byte 25 the colour type
        if not is_installed("imagecodecs"):
            raise UserError(
                f"{where}: PNGs of 16 bits and several channels are read by imagecodecs, which is not"
                f" installed{to_install(package='imagecodecs')}"
            )
        import imagecodecs

        with opened(io.BytesIO(content), where) as image:
            check_work(*image.size, content)
            return imagecodecs.png_decode(content)
    with opened(io.BytesIO(content), where) as image:
        check_work(*image.size, content)
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA" if channels == 4 else "RGB")  # the palette may have transparency
        elif image.mode == "1":
            image = image.convert("L")
        if image.mode not in _AS_STORED:
            raise Refused(
                f"one of Pillow's mode {image.mode}, whose numbers it does not hand over as they are: save it as TIFF"
                " or .npy"
            )
        return np.array(image)


def _check_size(sides: Sequence[int], shape: Sequence[int], dtype: np.dtype) -> None:
    """Refuse, before any of it is unpacked, what would take too much memory: by height and width, and by its bytes."""
    if len(sides) == 2:
        check_work(int(sides[1]), int(sides[0]), b"")
    if (size := math.prod(map(int, shape)) * dtype.itemsize) > MAX_BYTES:
        raise Refused(f"an array of shape {list(shape)} and type {dtype}, {size:,} bytes")


def _unreadable(where: str, got: str) -> UnreadableImage:
    return UnreadableImage(
        f"{where}: expected an image that can be read, got {got}. Replace or remove it, or let others stand in for such"
        " images: loader.corrupt=skip."
    )
