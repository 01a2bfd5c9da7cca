"""Colours: the jitter and its four changes, and colour spaces that separate lightness from colour, for methods that
contrast the two (CMC).

The conversions take pixels [..., 3] in sRGB, 0..1, and put the lightness first. Their constants are those of
scikit-image (skimage.color), which the published code calls. The four changes take and give RGB images of Pillow, and
the tests compare their results with torchvision's.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from caco.data.views.draws import between

_XYZ_OF_LINEAR_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)  # white point of D65 for the 2 degree observer
_YDBDR = ((0.299, 0.587, 0.114), (-0.45, -0.883, 1.333), (-1.333, 1.116, 0.217))
_YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))


def _times(pixels: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    return pixels @ torch.tensor(matrix, dtype=pixels.dtype, device=pixels.device).T


def to_lab(rgb: Tensor) -> Tensor:
    """sRGB to CIE L*a*b*: L in 0..100, a and b roughly in -110..110."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = _times(linear, _XYZ_OF_LINEAR_RGB) / torch.tensor(_WHITE, dtype=rgb.dtype, device=rgb.device)
    root = torch.where(xyz > 0.008856, xyz.clamp_min(0) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def to_ydbdr(rgb: Tensor) -> Tensor:
    """sRGB to YDbDr: Y in 0..1, Db and Dr in -1.333..1.333."""
    return _times(rgb, _YDBDR)


def to_ycbcr(rgb: Tensor) -> Tensor:
    """sRGB to YCbCr: Y in 16..235, Cb and Cr in 16..240."""
    return _times(rgb, _YCBCR) + torch.tensor([16, 128, 128], dtype=rgb.dtype, device=rgb.device)


# Every space but the first has lightness as its first channel; caco/config/views_needed.py relies on that.
CONVERSIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "rgb": None,
    "lab": to_lab,
    "ydbdr": to_ydbdr,
    "ycbcr": to_ycbcr,
}


def change_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Blend with black: a factor of 0 gives black, 1 the image itself, and more than 1 a brighter image."""
    return Image.blend(Image.new("RGB", image.size), image, factor)


def change_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the image's mean grey: a factor of 0 gives that grey, 1 the image itself, and more than 1 more
    contrast.
    """
    mean = int(np.asarray(image.convert("L")).mean() + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def change_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the grayscale image: a factor of 0 gives grayscale, 1 the image itself, and more than 1 stronger
    colours.
    """
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def turn_hue(image: Image.Image, turns: float) -> Image.Image:
    """Turn the hue by this share of the colour circle, -0.5..0.5."""
    hue, saturation, value = image.convert("HSV").split()
    hue = ImageChops.add_modulo(hue, Image.new("L", image.size, int(turns * 255) % 256))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def colour_jitter(
    image: Image.Image, strengths: Sequence[float], u_order: Sequence[float], u_factor: Sequence[float]
) -> Image.Image:
    """Change brightness, contrast and saturation by factors drawn from 1 +- strength, and hue by a shift drawn from
    +- strength, in the order drawn.
    """
    for op in sorted(range(4), key=u_order.__getitem__):
        strength = strengths[op]
        if strength == 0:
            continue
        if op == 3:
            image = turn_hue(image, between(-strength, strength, u_factor[op]))
        else:
            enhance = (change_brightness, change_contrast, change_saturation)[op]
            image = enhance(image, between(max(0.0, 1 - strength), 1 + strength, u_factor[op]))
    return image
