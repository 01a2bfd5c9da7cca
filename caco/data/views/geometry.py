"""Where the pixels of a view come from: its random crop box, the box of the plain view, and how the crop is resized,
rotated and shifted. The functions take settings and random numbers that are drawn already.
"""

import math
from collections.abc import Callable, Sequence

from PIL import Image

from caco.data.views.draws import ANGLE, SHIFT_X, SHIFT_Y, between

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def crop_box(
    width: int,
    height: int,
    scale: Sequence[float],
    ratio: Sequence[float],
    u_tries: Sequence[float],
    u_top: float,
    u_left: float,
) -> tuple[int, int, int, int]:
    """A random box (left, upper, right, lower): area uniform in `scale`, log of the aspect ratio uniform.

    The first of ten tries that fits inside the image counts; if none does, the box is centred and is the largest with
    an allowed ratio.
    Source: torchvision's RandomResizedCrop, after arXiv 1409.4842.
    """
    low, high = ratio
    for u_area, u_ratio in zip(u_tries[::2], u_tries[1::2], strict=True):
        area = width * height * between(scale[0], scale[1], u_area)
        aspect = math.exp(between(math.log(low), math.log(high), u_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u_left * (width - w + 1)), int(u_top * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def plain_box(
    width: int, height: int, size: int, plain_crop: float
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """The plain view's geometry: the (width, height) to resize the image to, and the box (left, upper, right, lower) to
    crop from the resized image."""
    short, shorter = round(size / plain_crop), min(width, height)
    width, height = short * width // shorter, short * height // shorter
    left, top = round((width - size) / 2), round((height - size) / 2)
    return (width, height), (left, top, left + size, top + size)


def resize(image: Image.Image, width: int, height: int, interpolation: str) -> Image.Image:
    """Resize across, round to 8 bits, then resize down. Pillow does the same in one call, but from version 13 on it
    swaps the two passes for some sizes.
    """
    how = _RESAMPLING[interpolation]
    return image.resize((width, image.height), how).resize((width, height), how)


def rotation(rotate: float, shift: float, size: int, u: Sequence[float]) -> Callable[[Image.Image], Image.Image]:
    """A function that rotates and shifts a view of this size by the drawn angle and shifts.

    Args:
        rotate, shift: the largest angle in degrees, and the largest shift as a share of the view's side (see `View`).
        u: the view's random numbers (see `draws.uniforms`).
    """
    if not rotate and not shift:
        return lambda image: image
    degrees = between(-rotate, rotate, u[ANGLE])
    right, down = (between(-shift, shift, number) * size for number in (u[SHIFT_X], u[SHIFT_Y]))
    return lambda image: image.rotate(degrees, Image.Resampling.BILINEAR, translate=(right, down))  # type: ignore[arg-type] # Pillow takes floats
