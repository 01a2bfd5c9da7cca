"""The augmentation of the published recipes: random views of one image, and the plain view for evaluation."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from caco.data.views import native
from caco.data.views.colours import CONVERSIONS, change_brightness, change_contrast, change_saturation, turn_hue
from caco.data.views.draws import NUM_UNIFORMS
from caco.data.views.kinds import Kinds, Operation
from caco.errors import UserError, require_contract
from caco.ranges import (
    Channels,
    Count,
    Interval,
    Length,
    Natural,
    NonNegative,
    Pixels,
    PositiveChannels,
    PositiveInterval,
    Range,
    Several,
    Share,
    ShareAboveZero,
    ShareInterval,
    held,
    hold_fields,
)

# Each view takes one vector of uniform random numbers; these are the positions of its numbers in that vector. Every
# number has a fixed position, so changing one setting (say blur_p) leaves all other draws of the same seed unchanged.
# random.h repeats these positions for the compiled views.
CROP_TRIES = 10
CROP = slice(0, 2 * CROP_TRIES)
CROP_TOP, CROP_LEFT, JITTER, GRAY, BLUR, SIGMA, SOLARIZE, FLIP, ANGLE, SHIFT_X, SHIFT_Y = range(20, 31)
ORDER = slice(31, 35)
FACTOR = slice(35, 39)
assert FACTOR.stop == NUM_UNIFORMS

_VALUES_AT_ONCE = 2**17  # half a megabyte of float32, for normalisation on a CPU
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, kw_only=True)
class Patches:
    """A grid of square windows that are cut out of a view.

    Args:
        grid: number of windows along each side of the grid.
        size: side of a window in pixels.
        stride: distance in pixels between the corners of neighbouring grid cells; windows overlap where it is below
            `size`.
        jitter: each window is shifted down and to the right of its cell's corner, by 0 to `jitter` pixels drawn for
            each window.
        shuffled: whether the windows come in a random order; otherwise they come row by row.
        each: augmentation of each window, as if it were an image of its own; None leaves the windows as they are. An
            `each` with `scale` and `ratio` of [1.0, 1.0] does not crop the window.
    Raises:
        UserError: a value is out of its range, or `each` has patches, a count or a size of its own.
    """

    grid: Several
    size: Pixels
    stride: Pixels
    jitter: Natural = 0
    shuffled: bool = False
    each: "View | None" = None

    def __post_init__(self) -> None:
        hold_fields(self)
        if self.each is not None and (
            self.each.patches is not None or self.each.count != 1 or self.each.size is not None
        ):
            raise UserError(
                "patches.each: expected a view without patches, count or size, because the windows come from the grid"
                " and have its size"
            )

    @property
    def extent(self) -> int:
        """Side in pixels of the smallest square that holds every possible window."""
        return (self.grid - 1) * self.stride + self.jitter + self.size

    @property
    def numbers(self) -> int:
        """How many random numbers an image takes: each window's shifts down and right, and its place in the order."""
        return 3 * self.grid**2


@dataclass(frozen=True, kw_only=True)
class View:
    """One kind of view: crop, rotate and shift, jitter, grayscale, blur, solarize, flip, in this order; then the
    operations in `then`.

    This code defines what a view is. It uses Pillow, as the published code does, and the tests compare it with
    torchvision's results. views.cpp makes the same bits several times faster; the tests compare it with this code.

    Args:
        count: number of views of this kind for each image.
        size: side of the view in pixels; None takes the size of the `Views`.
        scale: range [low, high] of the random crop's area, as a share of the image's area.
        ratio: range [low, high] of the random crop's aspect ratio, width over height.
        interpolation: filter that resizes the crop.
        rotate: the angle in degrees is drawn from -rotate to rotate.
        shift: the shift across and the shift down are drawn from -shift to shift, as shares of the view's side.
        jitter: strengths of brightness, contrast, saturation and hue, applied in random order with probability
            `jitter_p`.
        jitter_p: probability of the jitter.
        gray_p: probability of grayscale.
        blur: range [low, high] of the Gaussian blur's standard deviation in pixels.
        blur_p: probability of the blur.
        solarize_p: probability that all values of 128 and above are inverted.
        flip_p: probability of the horizontal flip.
        then: further operations, applied in order; the names are free. They run in Python, not in the compiled views.
        patches: windows to cut the view into. The method then receives the windows instead of the view itself.
    Raises:
        UserError: a value is out of its range, an operation in `then` lacks a member of `Operation`, or `patches` do
            not fit into the view.
    """

    count: Count = 1
    size: Pixels | None = None
    scale: ShareInterval = field(default_factory=lambda: [0.2, 1.0])
    ratio: PositiveInterval = field(default_factory=lambda: [3 / 4, 4 / 3])
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    rotate: Annotated[float, Range(least=0, most=180)] = 0.0
    shift: Share = 0.0
    jitter: Annotated[Sequence[NonNegative], Length(least=4, most=4)] = field(
        default_factory=lambda: [0.4, 0.4, 0.4, 0.1]
    )
    jitter_p: Share = 0.8
    gray_p: Share = 0.2
    blur: Interval = field(default_factory=lambda: [0.1, 2.0])
    blur_p: Share = 0.0
    solarize_p: Share = 0.0
    flip_p: Share = 0.5
    then: dict[str, Operation] = field(default_factory=dict)
    patches: Patches | None = None

    def __post_init__(self) -> None:
        if isinstance(self.patches, Mapping):  # A YAML file gives a mapping.
            each = self.patches.get("each")
            each = View(**each) if isinstance(each, Mapping) else each
            object.__setattr__(self, "patches", Patches(**{**self.patches, "each": each}))
        hold_fields(self)
        for name, operation in self.then.items():
            require_contract(f"view then.{name}", operation, Operation)
        if self.patches is not None and (self.count != 1 or self.size is None or self.patches.extent > self.size):
            raise UserError(
                "view patches: expected a view of count 1 with a size of its own that its patches fit into, got "
                f"count={self.count}, size={self.size}, and patches that reach over {self.patches.extent} pixels"
            )
        for name, (low, high) in {"scale": self.scale, "ratio": self.ratio, "blur": self.blur}.items():
            if low > high:
                raise UserError(f"view {name}: expected [low, high], got {[low, high]}")
        if self.jitter[3] > 0.5:
            raise UserError(
                f"view jitter: expected [brightness, contrast, saturation, hue], hue up to 0.5, got {self.jitter}"
            )

    @property
    def numbers(self) -> int:
        """How many random numbers an image takes: first those of `draw`, then those of each operation in `then`, then
        those of the patches."""
        further = sum(operation.numbers for operation in self.then.values())
        return NUM_UNIFORMS + further + (self.patches.numbers if self.patches else 0)

    def further(self, image: Image.Image, u: Sequence[float]) -> Image.Image:
        """Apply the operations in `then` to a drawn view; u holds all of the view's random numbers."""
        first = NUM_UNIFORMS
        for operation in self.then.values():
            image = operation(image, u[first : first + operation.numbers])
            first += operation.numbers
        return image

    def draw(self, image: Image.Image, size: int, u: Sequence[float]) -> Image.Image:
        """Crop and augment an image into a view of size x size pixels, without the operations in `then`.

        Args:
            u: the view's random numbers (see `draws.uniforms`).
        """
        box = crop_box(image.width, image.height, self.scale, self.ratio, u[CROP], u[CROP_TOP], u[CROP_LEFT])
        image = rotation(self, size, u)(resize(image.crop(box), size, size, self.interpolation))
        if u[JITTER] < self.jitter_p:
            image = _jitter(image, self.jitter, u[ORDER], u[FACTOR])
        if u[GRAY] < self.gray_p:
            image = image.convert("L").convert("RGB")
        if u[BLUR] < self.blur_p:
            image = image.filter(ImageFilter.GaussianBlur(between(self.blur[0], self.blur[1], u[SIGMA])))
        if u[SOLARIZE] < self.solarize_p:
            image = ImageOps.solarize(image, 128)
        if u[FLIP] < self.flip_p:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


class Views:
    """All views that a recipe makes of an image: the random views for training and the plain view for evaluation.

    Args:
        size: side in pixels of the plain view, and of every view that names no size.
        views: the kinds of view, in order; their names are free. A kind of count n gives n consecutive views. At most
            one kind may have patches.
        plain_crop: share of the shorter side that the plain view keeps; 224 pixels of 256 are 0.875.
        plain_interpolation: filter that resizes the image for the plain view.
        colours: colour space that every view, the plain one too, is converted to. "rgb" converts nothing; the other
            spaces have lightness as their first channel (colours.py).
        mean, std: mean and standard deviation of each channel. For "rgb" they are of pixels scaled to 0..1; for another
            colour space they are of its channels, in that space's own units.
    Attributes:
        channels: None for photographs; for images of any number of channels, that number (see
            caco/data/views/channels.py).
        dtype: type of the pixels before normalisation.
    Raises:
        UserError: a value is out of its range, or several kinds have patches.
    """

    channels: int | None = None
    dtype: np.dtype = np.dtype(np.uint8)

    @held
    def __init__(
        self,
        *,
        size: Pixels,
        views: Annotated[dict[str, View], Length(least=1)],
        mean: Channels,
        std: PositiveChannels,
        plain_crop: ShareAboveZero = 0.875,
        plain_interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        colours: Literal["rgb", "lab", "ydbdr", "ycbcr"] = "rgb",
    ):
        self.size = size
        self.plain_crop, self.plain_interpolation = plain_crop, plain_interpolation
        self.colours, self.mean, self.std = colours, list(mean), list(std)
        # The views of a YAML file arrive as mappings, not as objects: a setting inside a plain mapping can be changed
        # on the command line by the view's name.
        kinds = [view if isinstance(view, View) else View(**view) for view in views.values()]
        if sum(view.patches is not None for view in kinds) > 1:
            raise UserError("views: expected at most one kind that is cut into patches, got more")
        self._views = [view for view in kinds for _ in range(view.count)]
        self.kinds = Kinds([(view, view.size or size) for view in self._views])
        self.patches = self.kinds.patches  # None if no view has patches
        self.sizes = [view.size or size for view in self._views if view.patches is None]  # of the views without patches
        self.num_views = len(self.sizes)
        # NumPy, because a plan builds the views on PyTorch's meta device, where tensors have no values.
        mean_C, std_C = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        self._scale, self._offset = tuple((1 / (255 * std_C)).tolist()), tuple((-mean_C / std_C).tolist())

    def with_views(self, views: dict[str, View]) -> "Views":
        """A recipe with other random views, but with this recipe's normalisation, colours and plain view. Only the
        plain view's interpolation is reset to the default."""
        return Views(
            size=self.size, views=views, mean=self.mean, std=self.std, plain_crop=self.plain_crop, colours=self.colours
        )  # fmt: skip

    @property
    def compiled_alone(self) -> bool:
        """Whether the compiled views can make the final normalised floats, because no Python step follows them."""
        return not self.kinds.needs_finish and self.colours == "rgb"

    def view(self, image: Image.Image, v: int, u: Sequence[float]) -> torch.Tensor:
        """View number v of an image, without the operations in `then`; normalised, float32 [3, H, W]."""
        return self.normalise(torch.from_numpy(self.view_pixels(image, v, u))[None])[0]

    def plain(self, image: Image.Image) -> torch.Tensor:
        """The plain view: shorter side resized, centre cropped, normalised; float32 [3, H, W]."""
        return self.normalise(torch.from_numpy(self.plain_pixels(image))[None])[0]

    def view_pixels(self, image: Image.Image, v: int, u: Sequence[float]) -> np.ndarray:
        """View number v of an image, without the operations in `then` and before normalisation; uint8 [H, W, 3]."""
        return np.array(self._views[v].draw(image, self.kinds.kinds[v][1], u))

    def batch_pixels(self, images: Sequence[np.ndarray], samples: np.ndarray, stream: int) -> list[np.ndarray]:
        """All views of a batch before normalisation: one array uint8 [B, H, W, 3] for each view. If a kind has patches,
        the last array holds them, uint8 [B, P, H, W, 3].

        Args:
            images: uint8 [h, w, 3] each.
            samples, stream: the random numbers follow from these two, see `draws.uniforms`.
        """
        whole, patches = self.kinds.make(images, samples, stream)
        return whole if patches is None else [*whole, patches]

    def plain_batch(self, images: np.ndarray, out: np.ndarray, *, num_threads: int = 1) -> np.ndarray:
        """Make plain views with the compiled code, if there is any (`plain_is_compiled`).

        Args:
            images: rows of `native.table` or `native.encoded_table`, [B].
            out: [B, H, W, 3], which is filled: uint8 with pixels, float32 with normalised values, for which `colours`
                has to be "rgb".
        Returns:
            bool [B]: which encoded images were not decoded, see `native.make_views`.
        """
        assert self.plain_is_compiled and (out.dtype == np.uint8 or self.colours == "rgb")
        view = View(interpolation=self.plain_interpolation)
        settings = native.settings([(view, self.size)], self._scale, self._offset)
        shorter = round(self.size / self.plain_crop)
        return native.make_views(
            settings, images, np.zeros(len(images)), 0, [out], plain=shorter, num_threads=num_threads
        )

    @property
    def plain_is_compiled(self) -> bool:
        """Whether `plain_batch` can make the plain view: the compiled code was built."""
        return native.library() is not None

    def settings(self) -> native.Settings:
        """The settings of all views in the form that the compiled code takes."""
        return self.kinds.settings(self._scale, self._offset)

    def plain_pixels(self, image: Any) -> np.ndarray:
        """The plain view of a Pillow image before normalisation, uint8 [H, W, 3]. Sizes and offsets are rounded as in
        torchvision's Resize and CenterCrop.
        """
        (width, height), box = plain_box(image.width, image.height, self.size, self.plain_crop)
        if (width, height) != image.size:
            image = resize(image, width, height, self.plain_interpolation)
        return np.array(image.crop(box))

    def normalise(
        self, pixels: torch.Tensor, take: Callable[[tuple[int, ...]], torch.Tensor] = torch.empty
    ) -> torch.Tensor:
        """Normalise pixels, uint8 [..., H, W, 3], to float32 [..., 3, H, W] with channels_last strides, on the pixels'
        device. Floating-point pixels count as normalised already: only their axes are moved.

        Args:
            take: shape -> a float32 tensor on the CPU, whose memory becomes that of the result if `colours` is "rgb".
                Memory that was used before saves most of the time.
        """
        if pixels.is_floating_point():
            return pixels.movedim(-1, -3)
        convert = CONVERSIONS[self.colours]
        if convert is not None:
            mean, std = (_on(tuple(values), pixels.device) for values in (self.mean, self.std))
            return convert(pixels.float() / 255).sub_(mean).div_(std).movedim(-1, -3)
        if pixels.device.type != "cpu":
            scale, offset = _on(self._scale, pixels.device), _on(self._offset, pixels.device)
            return pixels.float().mul_(scale).add_(offset).movedim(-1, -3)
        # Several times as fast on a CPU: whole rows of W * 3 values, and few enough at a time to stay in the cache.
        width = 3 * pixels.shape[-2]
        scale, offset = (_on(values * pixels.shape[-2], pixels.device) for values in (self._scale, self._offset))
        made, rows = take(pixels.shape), pixels.reshape(-1, width)
        step = max(1, _VALUES_AT_ONCE // width)
        for some, theirs in zip(made.view(-1, width).split(step), rows.split(step), strict=True):
            some.copy_(theirs).mul_(scale).add_(offset)
        return made.movedim(-1, -3)


@functools.lru_cache(maxsize=64)
def _on(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Numbers on a device, sent there once."""
    return torch.tensor(values, device=device)


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


def _jitter(
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


def rotation(view: View, size: int, u: Sequence[float]) -> Callable[[Image.Image], Image.Image]:
    """A function that rotates and shifts a view of this size by the drawn angle and shifts."""
    if not view.rotate and not view.shift:
        return lambda image: image
    degrees = between(-view.rotate, view.rotate, u[ANGLE])
    right, down = (between(-view.shift, view.shift, number) * size for number in (u[SHIFT_X], u[SHIFT_Y]))
    return lambda image: image.rotate(degrees, Image.Resampling.BILINEAR, translate=(right, down))  # type: ignore[arg-type] # Pillow takes floats


def between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u
