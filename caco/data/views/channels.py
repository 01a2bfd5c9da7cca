"""Views of images with any number of channels (data.channels=N), made with NumPy and Pillow's images of floats. The
images are used as they are stored.

The draws are the same as for photographs (augmentation.py): the same random numbers at the same positions, so a view
depends on (seed, epoch, image, view) alone. Two things differ. Pixels are float32 and are never clipped. A step that is
relative to a range of values uses the range of the view itself. Unsigned integers are scaled to 0..1; all other numbers
keep their values.

Shapes: [H, W, C] of an image, [B, H, W, C] of a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from caco.data.views.augmentation import View, Views
from caco.data.views.draws import (
    BLUR,
    CROP,
    CROP_LEFT,
    CROP_TOP,
    FACTOR,
    FLIP,
    GRAY,
    JITTER,
    ORDER,
    SIGMA,
    SOLARIZE,
    between,
    uniforms,
)
from caco.data.views.geometry import crop_box, plain_box, resize, rotation
from caco.data.views.kinds import Kinds
from caco.errors import UserError

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # weights of red, green and blue in grey, ITU-R 601-2


class ChannelViews(Views):
    """All views of a recipe, for images of any number of channels.

    Args:
        like: the recipe. Its mean and std are not used, because they are of photographs.
        mean, std: mean and standard deviation of each channel, in the units that the function `numbers` gives; their
            length is the number of channels.
    Raises:
        UserError: the recipe uses something that only RGB has: another colour space, or operations in `then`.
    """

    def __init__(self, like: Views, *, mean: Sequence[float], std: Sequence[float]):
        assert len(mean) == len(std)
        if like.colours != "rgb":
            raise UserError(
                f"augmentation.colours={like.colours}: this colour space needs red, green and blue, but the images have"
                f" data.channels={len(mean)}. Use augmentation.colours=rgb."
            )
        self._like, self.channels = like, len(mean)
        self.size, self.plain_crop, self.plain_interpolation = like.size, like.plain_crop, like.plain_interpolation
        self.colours, self.mean, self.std = "rgb", [float(value) for value in mean], [float(value) for value in std]
        self._views, self.sizes, self.num_views, self.patches = like._views, like.sizes, like.num_views, like.patches
        self.kinds = ChannelKinds(like.kinds.kinds, self.channels)
        self._mean, self._std = np.array(self.mean, np.float32), np.array(self.std, np.float32)

    compiled_alone = False
    plain_is_compiled = False
    dtype: np.dtype = np.dtype(np.float32)

    def with_views(self, views: dict[str, View]) -> "ChannelViews":
        return ChannelViews(self._like.with_views(views), mean=self.mean, std=self.std)

    def view_pixels(self, image: Any, v: int, u: Sequence[float]) -> np.ndarray:
        """View number v before normalisation, float32 [H, W, C]."""
        view, size = self.kinds.kinds[v]
        return draw(view, numbers(image), size, u)

    def plain_pixels(self, image: Any) -> np.ndarray:
        """The plain view before normalisation, float32 [H, W, C]."""
        pixels = numbers(image)
        (width, height), box = plain_box(pixels.shape[1], pixels.shape[0], self.size, self.plain_crop)
        left, top, right, bottom = box
        return _each_channel(
            pixels, lambda c: resize(c, width, height, self.plain_interpolation).crop((left, top, right, bottom))
        )

    def normalise(
        self, pixels: torch.Tensor, take: Callable[[tuple[int, ...]], torch.Tensor] = torch.empty
    ) -> torch.Tensor:
        """Normalise float32 [..., H, W, C] to float32 [..., C, H, W] with channels_last strides, on the same device."""
        mean, std = (torch.from_numpy(values).to(pixels.device) for values in (self._mean, self._std))
        return ((pixels - mean) / std).movedim(-1, -3)


class ChannelKinds(Kinds):
    """Kinds of view for images of any number of channels, as float32.

    Raises:
        UserError: a view has operations in `then`, which are for 8-bit RGB.
    """

    dtype: np.dtype = np.dtype(np.float32)

    def __init__(self, kinds: Sequence[tuple[Any, int]], channels: int):
        self.channels = channels
        for view, _ in kinds:
            if view.then:
                raise UserError(
                    f"augmentation: the operations {', '.join(view.then)} of a view's `then` work only on 8-bit RGB,"
                    f" but the images have data.channels={channels}. Leave the operations out"
                    " ('~augmentation.views.NAME.then'), or choose another augmentation."
                )
        super().__init__(kinds)

    def of(self, kinds: Sequence[tuple[Any, int]]) -> "ChannelKinds":
        return ChannelKinds(kinds, self.channels)

    def draw(self, images: Sequence[np.ndarray], samples: np.ndarray, stream: int, drawn: Sequence[np.ndarray]) -> None:
        for v, (view, size) in enumerate(self.kinds):
            for row, (image, u) in enumerate(zip(images, uniforms(stream, samples, v).tolist(), strict=True)):
                drawn[v][row] = draw(view, numbers(image), size, u)


def numbers(pixels: Any) -> np.ndarray:
    """An image's pixels as float32. Unsigned integers are divided by the largest value of their type, which gives 0..1;
    all other numbers keep their values.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype.kind == "u":
        return (pixels / np.iinfo(pixels.dtype).max).astype(np.float32)
    return pixels.astype(np.float32)


def draw(view: View, pixels: np.ndarray, size: int, u: Sequence[float]) -> np.ndarray:
    """Crop and augment an image, float32 [H, W, C], into a view, float32 [size, size, C].

    Saturation, hue and grey apply only to images of three channels, which are taken as red, green and blue. With any
    other number of channels these steps do nothing.

    Args:
        u: the view's random numbers, at the positions listed in draws.py.
    """
    height, width, channels = pixels.shape
    box = crop_box(width, height, view.scale, view.ratio, u[CROP], u[CROP_TOP], u[CROP_LEFT])
    pixels = pixels[box[1] : box[3], box[0] : box[2]]
    turn = rotation(view.rotate, view.shift, size, u)
    pixels = _each_channel(pixels, lambda c: turn(resize(c, size, size, view.interpolation)))
    if u[JITTER] < view.jitter_p:
        pixels = _jitter(pixels, view.jitter, u[ORDER], u[FACTOR])
    if u[GRAY] < view.gray_p and channels == 3:
        pixels = np.repeat(_grey(pixels), 3, 2)
    if u[BLUR] < view.blur_p:
        sigma = between(view.blur[0], view.blur[1], u[SIGMA])
        pixels = ndimage.gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest", truncate=3.0)
    if u[SOLARIZE] < view.solarize_p:
        least, most = pixels.min((0, 1)), pixels.max((0, 1))
        pixels = np.where(
            pixels >= (least + most) / 2, least + most - pixels, pixels
        )  # inverts the upper half of each channel's range
    return pixels[:, ::-1] if u[FLIP] < view.flip_p else pixels


def _each_channel(pixels: np.ndarray, change: Any) -> np.ndarray:
    """Apply `change` to each channel separately, because Pillow resamples floats only in images of one channel."""
    images = (Image.fromarray(np.ascontiguousarray(pixels[:, :, channel])) for channel in range(pixels.shape[2]))
    return np.stack([np.asarray(change(image)) for image in images], 2)


def _jitter(
    pixels: np.ndarray, strengths: Sequence[float], u_order: Sequence[float], u_factor: Sequence[float]
) -> np.ndarray:
    """The jitter of photographs, in the order drawn, but without clipping. Brightness multiplies; contrast moves
    towards or away from each channel's mean; saturation moves towards or away from grey; hue turns where values lie in
    0..1.
    """
    colour = pixels.shape[2] == 3
    for op in sorted(range(4), key=u_order.__getitem__):
        strength = strengths[op]
        if strength == 0 or (op >= 2 and not colour):
            continue
        if op == 3:
            pixels = _turn_hue(pixels, between(-strength, strength, u_factor[op]))
            continue
        factor = np.float32(between(max(0.0, 1 - strength), 1 + strength, u_factor[op]))
        if op == 0:
            pixels = pixels * factor
            continue
        towards = pixels.mean((0, 1), dtype=np.float64).astype(np.float32) if op == 1 else _grey(pixels)
        pixels = towards + factor * (pixels - towards)
    return pixels


def _grey(pixels: np.ndarray) -> np.ndarray:
    return (pixels * _LUMA).sum(2, keepdims=True)


def _turn_hue(pixels: np.ndarray, turns: float) -> np.ndarray:
    """Turn the hue by this share of the colour circle. Values outside 0..1 are clipped for this, and their excess is
    added again."""
    from torchvision.transforms.v2.functional import adjust_hue

    inside = pixels.clip(0, 1)
    turned = adjust_hue(torch.from_numpy(inside.transpose(2, 0, 1).copy()), turns).numpy().transpose(1, 2, 0)
    return turned + (pixels - inside)
