"""The augmentation of the published recipes: random views of one image, and the plain view for evaluation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from caco.data.views import native
from caco.data.views.colours import CONVERSIONS, colour_jitter
from caco.data.views.draws import (
    BLUR,
    CROP,
    CROP_LEFT,
    CROP_TOP,
    FACTOR,
    FLIP,
    GRAY,
    JITTER,
    NUM_UNIFORMS,
    ORDER,
    SIGMA,
    SOLARIZE,
    between,
)
from caco.data.views.geometry import crop_box, plain_box, resize, rotation
from caco.data.views.kinds import Kinds, Operation
from caco.data.views.normalisation import scale_and_offset, scaled, standardised
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
        image = rotation(self.rotate, self.shift, size, u)(resize(image.crop(box), size, size, self.interpolation))
        if u[JITTER] < self.jitter_p:
            image = colour_jitter(image, self.jitter, u[ORDER], u[FACTOR])
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
        self._scale, self._offset = scale_and_offset(mean, std)

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
            return standardised(convert(pixels.float() / 255), self.mean, self.std)
        return scaled(pixels, self._scale, self._offset, take)
