"""Augmented views of one image, as the published recipes draw them."""

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

# Where each random number of a view lies in its one vector of uniforms. Every number has a fixed place, so a change of
# one setting (say blur_p) leaves all other draws of the same seed as they were. (random.h has the same places.)
CROP_TRIES = 10
CROP = slice(0, 2 * CROP_TRIES)
CROP_TOP, CROP_LEFT, JITTER, GRAY, BLUR, SIGMA, SOLARIZE, FLIP, ANGLE, SHIFT_X, SHIFT_Y = range(20, 31)
ORDER = slice(31, 35)
FACTOR = slice(35, 39)
assert FACTOR.stop == NUM_UNIFORMS

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Square windows of a view, in a grid.

    Args:
        grid: windows a side.
        size: pixels a side of a window.
        stride: pixels from a cell's corner to its neighbour's; below `size` the windows overlap.
        jitter: a window's corner lies 0 to so many pixels down and right of its cell's, drawn for each.
        shuffled: whether the windows come in an order drawn at random, else row by row.
        each: what is done to each window, as to an image of its own; None: nothing. Its `scale` and `ratio` of [1.0,
            1.0] keep it whole.
    Raises:
        ValueError: a value out of its range.
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
                "patches each: expected a view without patches, count and size of its own, for the windows have theirs"
            )

    @property
    def extent(self) -> int:
        """Pixels a side that the windows may reach over."""
        return (self.grid - 1) * self.stride + self.jitter + self.size

    @property
    def numbers(self) -> int:
        """Random numbers of an image: where each window lies, down and across, and when it comes."""
        return 3 * self.grid**2


@dataclass(frozen=True, kw_only=True)
class View:
    """One kind of view: crop, rotate and shift, jitter, grayscale, blur, solarize, flip, in this order; then what
    `then` says.

    Written with Pillow, as the published code is, and held to torchvision's results by the tests. This is what a view
    is; views.cpp makes the same bits several times faster, and is held to this.

    Args:
        count: how many views of this kind.
        size: pixels; None takes the size of the `Views`.
        scale, ratio: share of the area and aspect ratio of the random crop, each a [low, high] pair.
        rotate: degrees, drawn in +-rotate. shift: share of the side, drawn in +-shift.
        jitter: strengths of brightness, contrast, saturation, hue, applied in random order with probability `jitter_p`.
        blur: standard deviation in pixels, drawn in this range with probability `blur_p`.
        then: further operations by any name, in order. They are not compiled.
        patches: the view is no image of its own but cut into these.
    Raises:
        ValueError: a value out of its range.
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
        if isinstance(self.patches, Mapping):  # as it stands in a YAML
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
        """Random numbers of an image: those of `draw`, of each further operation in turn, and of the patches."""
        further = sum(operation.numbers for operation in self.then.values())
        return NUM_UNIFORMS + further + (self.patches.numbers if self.patches else 0)

    def further(self, image: Image.Image, u: Sequence[float]) -> Image.Image:
        """What `then` makes of the view as drawn; u are all of its random numbers."""
        first = NUM_UNIFORMS
        for operation in self.then.values():
            image = operation(image, u[first : first + operation.numbers])
            first += operation.numbers
        return image

    def draw(self, image: Image.Image, size: int, u: Sequence[float]) -> Image.Image:
        """The view, size x size, that these random numbers (see `uniforms`) make of an image, up to what `then`
        says.
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
    """All views that a recipe takes of an image, and the plain one that evaluations take.

    Args:
        size: pixels of the plain view, and of every view that names none.
        views: the kinds of view by any name, in order; a kind of count n gives n views in a row. At most one is cut
            into patches.
        plain_crop: share of the shorter side that the plain view keeps (224 of 256: 0.875).
        plain_interpolation: by which the plain view is resized.
        colours: what every view, the plain one too, is converted into: "rgb" is none, the others have their lightness
            first (colours.py).
        mean, std: of each channel, for pixels in 0..1, or of the colour space's channels as it has them.
    Raises:
        ValueError: a value out of its range.
    channels: None of photographs; else as of the images, see caco/data/views/channels.py. dtype: of pixels before
    normalisation.
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
        # A YAML's views arrive as mappings: a named kind of view is a value of the command line, a `_target_` is not.
        kinds = [view if isinstance(view, View) else View(**view) for view in views.values()]
        if sum(view.patches is not None for view in kinds) > 1:
            raise UserError("views: expected at most one kind that is cut into patches, got more")
        self._views = [view for view in kinds for _ in range(view.count)]
        self.kinds = Kinds([(view, view.size or size) for view in self._views])
        self.patches = self.kinds.patches  # None where no view is cut
        self.sizes = [view.size or size for view in self._views if view.patches is None]  # of those that stay whole
        self.num_views = len(self.sizes)
        self._scale = 1 / (255 * torch.tensor(list(std)))
        self._offset = -torch.tensor(list(mean)) / torch.tensor(list(std))

    def with_views(self, views: dict[str, View]) -> "Views":
        """Other views of images that are normalised as here, with the same plain one but for its interpolation."""
        return Views(
            size=self.size, views=views, mean=self.mean, std=self.std, plain_crop=self.plain_crop, colours=self.colours
        )  # fmt: skip

    @property
    def compiled_alone(self) -> bool:
        """Whether the compiled views can go as far as normalised floats: nothing else is done to the pixels."""
        return not self.kinds.needs_finish and self.colours == "rgb"

    def view(self, image: Image.Image, v: int, u: Sequence[float]) -> torch.Tensor:
        """View v as drawn, before its `then`, normalised, float32 [3, H, W]."""
        return self.normalise(torch.from_numpy(self.view_pixels(image, v, u))[None])[0]

    def plain(self, image: Image.Image) -> torch.Tensor:
        """The view for evaluation: shorter side resized, centre cropped, normalised, float32 [3, H, W]."""
        return self.normalise(torch.from_numpy(self.plain_pixels(image))[None])[0]

    def view_pixels(self, image: Image.Image, v: int, u: Sequence[float]) -> np.ndarray:
        """View v as drawn, before its `then` and normalisation, uint8 [H, W, 3]."""
        return np.array(self._views[v].draw(image, self.kinds.kinds[v][1], u))

    def batch_pixels(self, images: Sequence[np.ndarray], samples: np.ndarray, stream: int) -> list[np.ndarray]:
        """All views of some images (uint8 [h, w, 3] each) before normalisation: a view's are uint8 [B, H, W, 3];
        patches, where there are any, come last, [B, P, H, W, 3].

        Args:
            samples, stream: what the random numbers depend on, see `draws.uniforms`.
        """
        whole, patches = self.kinds.make(images, samples, stream)
        return whole if patches is None else [*whole, patches]

    def plain_batch(self, images: np.ndarray, *, num_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Plain views, uint8 [B, H, W, 3], of rows of `native.table`, and which of them could not be decoded; compiled,
        and so for bilinear ones alone (`plain_is_compiled`)."""
        assert self.plain_is_compiled
        made = np.empty((len(images), self.size, self.size, 3), np.uint8)
        settings = native.settings([(View(), self.size)], self._scale, self._offset)
        shorter = round(self.size / self.plain_crop)
        unreadable = native.make_views(
            settings, images, np.zeros(len(images)), 0, [made], plain=shorter, num_threads=num_threads
        )
        return made, unreadable

    @property
    def plain_is_compiled(self) -> bool:
        """Whether `plain_batch` makes the plain view here."""
        return native.library() is not None and self.plain_interpolation == "bilinear"

    def settings(self) -> native.Settings:
        """All views' settings as the compiled views take them."""
        return self.kinds.settings(self._scale.tolist(), self._offset.tolist())

    def plain_pixels(self, image: Any) -> np.ndarray:
        """The plain view of an image of Pillow's before normalisation, uint8 [H, W, 3]; rounded as torchvision's Resize
        and CenterCrop do.
        """
        (width, height), box = plain_box(image.width, image.height, self.size, self.plain_crop)
        if (width, height) != image.size:
            image = resize(image, width, height, self.plain_interpolation)
        return np.array(image.crop(box))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [..., H, W, 3] to float32 [..., 3, H, W] in channels_last strides, on the pixels' device; floats are
        done.
        """
        if pixels.is_floating_point():
            return pixels.movedim(-1, -3)
        convert = CONVERSIONS[self.colours]
        if convert is not None:
            mean, std = (_on(tuple(values), pixels.device) for values in (self.mean, self.std))
            return convert(pixels.float() / 255).sub_(mean).div_(std).movedim(-1, -3)
        scale, offset = (_on(tuple(x.tolist()), pixels.device) for x in (self._scale, self._offset))
        return pixels.float().mul_(scale).add_(offset).movedim(-1, -3)


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

    The first of ten tries that fits inside the image counts; if none does, the largest centred box of an allowed ratio.
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
    """To which width and height an image is resized for its plain view, and which box of that the view is."""
    short, shorter = round(size / plain_crop), min(width, height)
    width, height = short * width // shorter, short * height // shorter
    left, top = round((width - size) / 2), round((height - size) / 2)
    return (width, height), (left, top, left + size, top + size)


def resize(image: Image.Image, width: int, height: int, interpolation: str) -> Image.Image:
    """Across, then down, rounded between: what Pillow does at once, except that from 13 on it turns the order for
    some.
    """
    how = _RESAMPLING[interpolation]
    return image.resize((width, image.height), how).resize((width, height), how)


def _jitter(
    image: Image.Image, strengths: Sequence[float], u_order: Sequence[float], u_factor: Sequence[float]
) -> Image.Image:
    """Brightness, contrast, saturation by factors in 1 +- strength, hue by a shift in +- strength, in the order
    drawn.
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


# The four below are Pillow's ImageEnhance and torchvision's adjust_hue (the tests hold them equal) without their
# detours.
def rotation(view: View, size: int, u: Sequence[float]) -> Callable[[Image.Image], Image.Image]:
    """What turns and shifts the view of this size as these random numbers say."""
    if not view.rotate and not view.shift:
        return lambda image: image
    degrees = between(-view.rotate, view.rotate, u[ANGLE])
    right, down = (between(-view.shift, view.shift, number) * size for number in (u[SHIFT_X], u[SHIFT_Y]))
    return lambda image: image.rotate(degrees, Image.Resampling.BILINEAR, translate=(right, down))  # type: ignore[arg-type] # Pillow takes floats


def between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u
