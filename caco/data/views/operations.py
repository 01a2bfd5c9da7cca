"""Further operations for a view's `then`. Each changes an image, keeps its size, and takes all its randomness from the
numbers that it is given.

They use Pillow, as the published code does. Each of the random numbers has one fixed meaning, so that changing a
setting leaves the other draws unchanged. RandAugment's magnitudes are those of the implementation that InfoMin's code
uses.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Annotated, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from caco.errors import UserError
from caco.ranges import Colour, Count, Length, NonNegative, PositiveInterval, Range, Several, Share, held

MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean colour: red, green, blue in 0..255
_LARGEST = 10.0  # largest magnitude
_NUMBERS_EACH = 5  # random numbers of one RandAugment operation: which, whether, magnitude, direction, resampling


class RandAugment:
    """Draws some of fifteen operations with replacement. Each one drawn is applied with a probability, at a magnitude
    drawn around a mean.

    At magnitude L in 0..10: rotation by +-30 L/10 degrees; shear by +-0.3 L/10; translation by +-0.45 L/10 of the side;
    enhancement (colour, contrast, brightness, sharpness) by a factor of 1 +- 0.9 L/10; posterization keeps
    posterize_bits[0] bits at L = 0, posterize_bits[1] bits at L = 10, and a number between in between; solarization
    inverts values of 256 L/10 and above, so it does nothing at L = 10; solarize_add adds 110 L/10 to values below 128.
    Rotations, shears and translations resample bilinearly or bicubically, as drawn, and fill uncovered pixels with the
    colour `fill`.

    Source: arXiv 1909.13719, as implemented in PyContrast's datasets/RandAugment.py, which comes from timm. The
    enhancement factors there are one-sided: 0.1 + 1.8 L/10, never below 1 at the magnitudes that InfoMin draws.
    `enhancement="one_sided"` follows that implementation.

    Args:
        operations: how many operations are drawn for each image.
        magnitude, spread: mean and standard deviation of L, which is clipped to 0..10. With a spread of None, L is
            uniform between 0 and `magnitude`.
        p: probability that an operation that was drawn is applied.
        names: the operations to draw from; None draws from all but identity.
        enhancement: whether enhancement factors lie on both sides of 1 or follow the published code (see above).
        posterize_bits: bits that posterization keeps at magnitude 0 and at magnitude 10.
        fill: red, green and blue of uncovered pixels, 0..255.
    Raises:
        UserError: a value is out of its range, or an operation is unknown.
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
        """The magnitude that a uniform random number u in [0, 1) gives."""
        if self.spread is None:
            return self.magnitude * u
        if self.spread == 0:
            return self.magnitude
        drawn = NormalDist(self.magnitude, self.spread).inv_cdf(max(u, 2.0**-54))
        return min(max(drawn, 0.0), _LARGEST)

    def apply(self, image: Image.Image, name: str, level: float, *, negative: bool, bicubic: bool) -> Image.Image:
        """Apply the operation of this name at a magnitude of 0..10. `negative` chooses the opposite direction of an
        operation that has two; `bicubic` chooses the resampling of a geometric one."""
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


# The three functions below give what Pillow's ImageOps gives. Pillow builds tables of 768 values for each image, which
# takes most of the time for a small image.
def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keep only the highest `bits` bits of each channel; 0 bits give black."""
    return Image.fromarray(np.asarray(image) & np.uint8(256 - 2 ** (8 - bits)))


def solarize(image: Image.Image, threshold: int) -> Image.Image:
    """Invert all values of `threshold` and above."""
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
    """Applies all of these or none: posterize to 4 to 8 bits, sharpen by a factor of 0.1 to 1.9, solarize from a
    threshold of 0 to 256 on, autocontrast.

    Args:
        p: probability that they are applied.
    Source: PIRL (arXiv 1912.01991), ImgPilRandomPhotometric in vissl.
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
    """Converts to grayscale, as a view's own `gray_p` does, but at its own position among the operations of `then`.

    Args:
        p: probability of the conversion.
    """

    numbers = 1

    @held
    def __init__(self, *, p: Share = 0.2):
        self.p = p

    def __call__(self, image: Image.Image, u: Sequence[float]) -> Image.Image:
        return image.convert("L").convert("RGB") if u[0] < self.p else image


class SampledBlur:
    """Blurs with a Gaussian that is sampled at `taps` points and normalised, across and then down. The image is
    mirrored at its edges.

    A view's own `blur` differs: it is Pillow's, three box blurs of an image whose edge pixels are repeated.

    Source: InfoMin, with 23 taps: GaussianBlur in PyContrast's datasets/util.py. That code truncates to 8 bits; this
    one rounds.

    Args:
        p: probability of the blur.
        sigma: range [low, high] of the standard deviation in pixels.
        taps: number of samples of the Gaussian, odd.
    Raises:
        UserError: low is above high, or `taps` is even.
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
    """Shears the image and deforms it elastically: displacements drawn on a coarse lattice, and interpolated between
    its points by cubic splines, move the pixels.

    CPC v2 (arXiv 1905.09272, after De Fauw et al., 2018) names both steps but gives no numbers. The numbers here are
    this project's own: a 3 x 3 lattice as in U-Net (arXiv 1505.04597), with displacements as shares of the side.

    Args:
        p: probability that both steps are applied.
        shear: range of the shear, drawn from -shear to shear: the shift across, in pixels, for each pixel further down.
        displacement: standard deviation of a lattice point's displacement, both across and down, as a share of the
            side.
        lattice: number of lattice points along each side.
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
    """Keeps one of the three colour channels, drawn at random, and sets the two others to a constant, so that a network
    cannot recognise a patch by its colours (CPC v2).

    Args:
        p: probability that channels are dropped.
        fill: the constants of red, green and blue, 0..255.
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
