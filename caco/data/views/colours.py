"""Colours: the four changes that a jitter is made of, and spaces that set lightness apart from colour, for methods that
contrast the one with the other (CMC).

In these spaces pixels are [..., 3] in sRGB, 0..1; what is made of them has the lightness first. The numbers are
scikit-image's (skimage.color), which the published code calls.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

_XYZ_OF_LINEAR_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)  # of D65, for an observer of 2 degrees
_YDBDR = ((0.299, 0.587, 0.114), (-0.45, -0.883, 1.333), (-1.333, 1.116, 0.217))
_YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))


def _times(pixels: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    return pixels @ torch.tensor(matrix, dtype=pixels.dtype, device=pixels.device).T


def to_lab(rgb: Tensor) -> Tensor:
    """CIE L*a*b*: L in 0..100, a and b within some 110 of 0."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = _times(linear, _XYZ_OF_LINEAR_RGB) / torch.tensor(_WHITE, dtype=rgb.dtype, device=rgb.device)
    root = torch.where(xyz > 0.008856, xyz.clamp_min(0) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def to_ydbdr(rgb: Tensor) -> Tensor:
    """Y in 0..1, Db and Dr in -1.333..1.333."""
    return _times(rgb, _YDBDR)


def to_ycbcr(rgb: Tensor) -> Tensor:
    """Y in 16..235, Cb and Cr in 16..240."""
    return _times(rgb, _YCBCR) + torch.tensor([16, 128, 128], dtype=rgb.dtype, device=rgb.device)


# All but the first have lightness first (caco/config/views_needed.py names them).
CONVERSIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "rgb": None,
    "lab": to_lab,
    "ydbdr": to_ydbdr,
    "ycbcr": to_ycbcr,
}


def change_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Towards black (0), away from it (above 1)."""
    return Image.blend(Image.new("RGB", image.size), image, factor)


def change_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Towards (0), away from (above 1) the mean grey of the image."""
    mean = int(np.asarray(image.convert("L")).mean() + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def change_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Towards (0), away from (above 1) its grayscale."""
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def turn_hue(image: Image.Image, turns: float) -> Image.Image:
    """The hue turned by this share of the circle, in -0.5..0.5."""
    hue, saturation, value = image.convert("HSV").split()
    hue = ImageChops.add_modulo(hue, Image.new("L", image.size, int(turns * 255) % 256))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
