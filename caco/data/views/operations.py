"""Further operations on a view, for its `then`: each takes an image to another of its size, by the random numbers that
it is given.

Written with Pillow, as the published code is. The numbers that say whether and how stand in fixed places, so that a
changed setting leaves the other draws as they were. Magnitudes of RandAugment are those of the implementation that
InfoMin's code has taken over.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Annotated, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from caco.errors import UserError
from caco.ranges import Colour, Count, Length, NonNegative, PositiveInterval, Range, Several, Share, held

MEAN_COLOUR = (124, 116, 104)  # of ImageNet
_LARGEST = 10.0  # magnitude
_NUMBERS_EACH = 5  # of an operation of RandAugment: which, whether, how much, which way, how it is resampled


class RandAugment:
    """Some operations drawn with replacement from fifteen, each applied with a probability and at a magnitude drawn
    about one value.

    At magnitude L of 0..10: rotation by +-30 L/10 degrees; shear by +-0.3 L/10; translation by +-0.45 L/10 of the side;
    enhancement (colour, contrast, brightness, sharpness) by a factor of 1 +- 0.9 L/10; posterization keeps bits from
    posterize_bits[0] at 0 to posterize_bits[1] at 10; solarization inverts from the value 256 L/10 on, so that it does
    nothing at 10; 110 L/10 is added to values below 128. What a rotation, shear or translation uncovers gets the colour
    `fill`; they resample bilinearly or bicubically, as drawn.

    Source: arXiv 1909.13719, as in PyContrast's datasets/RandAugment.py (timm's), whose enhancement factors are
    one-sided: 0.1 + 1.8 L/10, never below 1 at the magnitudes that InfoMin draws. `enhancement="one_sided"` is that.

    Args:
        operations: how many are drawn.
        magnitude, spread: mean and standard deviation of L, which is cut to 0..10; without a spread (None) it is drawn
            evenly from 0 to `magnitude`.
        p: probability of each operation that was drawn.
        names: the operations to draw from; None for all but identity.
    Raises:
        UserError: a value out of its range, or an operation that is not known.
    """

    @held
    def __init__(
        self,
        *,
        operations: Count = 2,
        magnitude: Annotated[float, Range(least=0, most=10)] = 10.0,
        spread: NonNegative | None = 0.5,
        p: Share = 0.5,
        names: list[str] | None = None,
        enhancement: Literal["two_sided", "one_sided"] = "two_sided",
        posterize_bits: Annotated[Sequence[Annotated[int, Range(least=0, most=8)]], Length(least=2, most=2)] = (0, 4),
        fill: Colour = MEAN_COLOUR,
    ):
        if posterize_bits[0] > posterize_bits[1]:
            raise UserError(f"RandAugment posterize_bits: expected [low, high] within 0..8, got {list(posterize_bits)}")
        self.names = list(ALL_OPERATIONS[1:]) if names is None else list(names)
        unknown = [name for name in self.names if name not in ALL_OPERATIONS] if self.names else ["none"]
        if unknown:
            raise UserError(
                f"RandAugment names: expected some of {', '.join(ALL_OPERATIONS)}, got {', '.join(unknown)}"
            )
        self.operations, self.magnitude, self.spread, self.p = operations, magnitude, spread, p
        self.enhancement, self.posterize_bits, self.fill = enhancement, list(posterize_bits), tuple(fill)
        self.numbers = _NUMBERS_EACH * operations

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Image.Image:
        for which, whether, how_much, which_way, resampling in zip(
            *(u[i::_NUMBERS_EACH] for i in range(_NUMBERS_EACH)), strict=True
        ):
            if whether < self.p:
                name = self.names[int(which * len(self.names))]
                image = self.apply(
                    image, name, self.level(how_much), negative=which_way < 0.5, bicubic=resampling < 0.5
                )
        return image

    def level(self, u: float) -> float:
        """The magnitude that a random number stands for."""
        if self.spread is None:
            return self.magnitude * u
        if self.spread == 0:
            return self.magnitude
        drawn = NormalDist(self.magnitude, self.spread).inv_cdf(max(u, 2.0**-54))
        return min(max(drawn, 0.0), _LARGEST)

    def apply(self, image: Image.Image, name: str, level: float, *, negative: bool, bicubic: bool) -> Image.Image:
        """An operation by its name, at a magnitude; in its other direction where it has two and `negative` is set."""
        share = level / _LARGEST
        signed = -share if negative else share
        if name in _PLAIN:
            return _PLAIN[name](image)
        if name in _ENHANCERS:
            factor = 0.1 + 1.8 * share if self.enhancement == "one_sided" else 1 + 0.9 * signed
            return _ENHANCERS[name](image).enhance(factor)
        if name == "posterize":
            low, high = self.posterize_bits
            bits = low + int((high - low) * share)
            return posterize(image, bits)
        if name == "solarize":
            return solarize(image, int(256 * share))
        if name == "solarize_add":
            pixels = np.asarray(image)
            return Image.fromarray(pixels + np.where(pixels < 128, int(110 * share), 0).astype(np.uint8))
        how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        if name == "rotate":
            return image.rotate(30 * signed, how, fillcolor=self.fill)
        width, height = image.size
        matrix = {
            "shear_x": (1, 0.3 * signed, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, 0.3 * signed, 1, 0),
            "translate_x": (1, 0, 0.45 * signed * width, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, 0.45 * signed * height),
        }[name]
        return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=self.fill)


# Pillow's ImageOps give the same, from tables of 768 values that it makes anew for each image: most of the time of a
# small one.
def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Only the highest bits of each channel; black where that is none."""
    return Image.fromarray(np.asarray(image) & np.uint8(256 - 2 ** (8 - bits)))


def solarize(image: Image.Image, threshold: int) -> Image.Image:
    """Values from the threshold on inverted."""
    pixels = np.asarray(image)
    return Image.fromarray(np.where(pixels < threshold, pixels, 255 - pixels))


def invert(image: Image.Image) -> Image.Image:
    return Image.fromarray(255 - np.asarray(image))


_PLAIN: dict[str, Callable[[Image.Image], Image.Image]] = {
    "identity": lambda image: image, "autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize,
    "invert": invert,
}  # fmt: skip
_ENHANCERS = {
    "color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast, "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}  # fmt: skip
ALL_OPERATIONS = (
    "identity", "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color",
    "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip


class Photometric:
    """All or none of: posterized to 4 to 8 bits, sharpened by a factor of 0.1 to 1.9, solarized from a value of 0 to
    256 on, autocontrast.

    Source: PIRL (arXiv 1912.01991), vissl's ImgPilRandomPhotometric.
    """

    numbers = 4

    @held
    def __init__(self, *, p: Share = 0.66):
        self.p = p

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Image.Image:
        whether, bits, factor, threshold = u
        if whether >= self.p:
            return image
        image = posterize(image, 4 + int(5 * bits))
        image = ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * factor)
        return ImageOps.autocontrast(solarize(image, int(257 * threshold)))


class Grayscale:
    """To grayscale, as a view's own `gray_p` does, but in the place of `then` where it stands."""

    numbers = 1

    @held
    def __init__(self, *, p: Share = 0.2):
        self.p = p

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Image.Image:
        return image.convert("L").convert("RGB") if u[0] < self.p else image


class SampledBlur:
    """A Gaussian sampled at so many taps and normalised, across and down, the image reflected at its edges.

    A view's own `blur` is Pillow's, three box passes over an image whose edge pixels are repeated.

    Source: InfoMin's 23 taps, PyContrast's datasets/util.py: GaussianBlur. That cuts off where this rounds to 8 bits.

    Args:
        sigma: standard deviation in pixels, drawn in this range with probability p.
        taps: an odd number.
    """

    numbers = 2

    @held
    def __init__(self, *, p: Share = 0.5, sigma: PositiveInterval = (0.1, 2.0), taps: Count = 23):
        if sigma[0] > sigma[1] or taps % 2 == 0:
            raise UserError(
                "SampledBlur: expected sigma as [low, high] above 0 and an odd number of taps, got"
                f" sigma={list(sigma)}, taps={taps}"
            )
        self.p, self.sigma, self.taps = p, list(sigma), taps

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Image.Image:
        if u[0] >= self.p:
            return image
        sigma = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * u[1]
        place = np.arange(self.taps) - self.taps // 2
        weight = np.exp(-(place**2) / (2 * sigma**2))
        pixels = np.asarray(image, np.float32)
        for axis in (0, 1):
            pixels = ndimage.correlate1d(pixels, weight / weight.sum(), axis, mode="mirror")
        return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))


class Elastic:
    """Sheared and elastically deformed: a coarse lattice of displacements, interpolated by cubic splines, moves the
    pixels.

    CPC v2 names both (arXiv 1905.09272, after De Fauw et al., 2018) and gives no numbers; those here are of U-Net's
    kind (arXiv 1505.04597, 3 x 3 lattice), in shares of the side, and are ours.

    Args:
        p: probability of both together.
        shear: strength of the shear, drawn in +-shear, of columns along rows.
        displacement: standard deviation of a lattice point's displacement across and down, as a share of the side.
        lattice: points a side.
    """

    @held
    def __init__(
        self, *, p: Share = 0.2, shear: NonNegative = 0.3, displacement: NonNegative = 0.04, lattice: Several = 3
    ):
        self.p, self.shear, self.displacement, self.lattice = p, shear, displacement, lattice
        self.numbers = 2 + 2 * lattice**2

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Image.Image:
        if u[0] >= self.p:
            return image
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        normal = NormalDist()
        points = np.array([normal.inv_cdf(max(number, 2.0**-54)) for number in u[2:]]).reshape(
            2, self.lattice, self.lattice
        )
        y, x = np.mgrid[:height, :width].astype(np.float64)
        on_lattice = [place * (self.lattice - 1) / max(side - 1, 1) for place, side in ((y, height), (x, width))]
        down, across = (
            self.displacement * side * ndimage.map_coordinates(part, on_lattice, order=3, mode="nearest")
            for part, side in zip(points, (height, width), strict=True)
        )
        x = x + self.shear * (2 * u[1] - 1) * (y - (height - 1) / 2)
        moved = [
            ndimage.map_coordinates(
                pixels[..., channel].astype(np.float64), [y + down, x + across], order=1, mode="mirror"
            )
            for channel in range(3)
        ]
        return Image.fromarray(np.rint(np.stack(moved, -1)).clip(0, 255).astype(np.uint8))


class DropChannels:
    """One of the three colour channels stays, the two others become even: so that no patch is found by its colours (CPC
    v2).

    Args:
        fill: what the others become, the mean colour.
    """

    numbers = 2

    @held
    def __init__(self, *, p: Share = 0.8, fill: Colour = MEAN_COLOUR):
        self.p, self.fill = p, list(fill)

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Image.Image:
        if u[0] >= self.p:
            return image
        pixels, kept = np.array(image), int(3 * u[1])
        for channel in range(3):
            if channel != kept:
                pixels[..., channel] = self.fill[channel]
        return Image.fromarray(pixels)
