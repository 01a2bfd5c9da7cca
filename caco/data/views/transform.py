"""A recipe's views as transforms for your own program; they take one image or a batch of images.

two = Transform(views)  # of one image two tensors [3, H, W], of a batch two of [B, 3, H, W]; each call draws anew
plain = Preprocessing(views)  # the view for evaluation, always the same
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from caco.data.sets.anyones import rgb
from caco.data.sets.stored import checked
from caco.data.views.augmentation import Views


def _arrays(images: Any, channels: int | None) -> tuple[list[np.ndarray], bool]:
    """The images as a list of arrays, uint8 [H, W, 3], or [H, W, channels] of any type if `channels` is given; and
    whether `images` was a single image."""
    alone = isinstance(images, Image.Image) or isinstance(images, np.ndarray) and images.ndim in (2, 3)
    batch: Sequence[Any] = [images] if alone else images
    named = [(image, f"image {number}" if not alone else "image") for number, image in enumerate(batch)]
    if channels is not None:
        return [checked(np.asarray(image), name, channels) for image, name in named], alone
    return [np.asarray(rgb(image, name)) for image, name in named], alone


class Transform:
    """Makes all views of a recipe. Each call draws new ones with torch's generator, of which each DataLoader worker has
    its own.

    Args:
        views: the views of a recipe, as `caco.library.views("simclr")` gives them, or your own `Views`.
    """

    def __init__(self, views: Views):
        self.views = views

    def __call__(self, images: Any, *, stream: int | None = None, samples: Sequence[int] | None = None) -> list[Tensor]:
        """Make every view, normalised, float32: [3, H, W] for one image, [B, 3, H, W] for a batch. If the recipe has
        patches, they come last, [P, 3, H, W] or [B, P, 3, H, W].

        Args:
            images: one image, a Pillow image or uint8 [H, W, 3]; or a batch, uint8 [B, H, W, 3] or a sequence of images
                of any sizes. For a recipe with `channels`, arrays with that many channels.
            stream, samples: set these to repeat draws: a 64-bit number, and a number for each image. The same pair
                gives the same bits for an image, whatever else is in the batch.
        Raises:
            UserError: an image is of an unsuitable type or shape.
        """
        arrays, alone = _arrays(images, self.views.channels)
        stream = int(torch.randint(2**62, ())) if stream is None else stream
        at = np.arange(len(arrays)) if samples is None else np.asarray(samples, dtype=np.int64)
        made = [
            self.views.normalise(torch.from_numpy(pixels)) for pixels in self.views.batch_pixels(arrays, at, stream)
        ]
        return [view[0] for view in made] if alone else made


class Preprocessing:
    """Makes the plain view for evaluation: shorter side resized, centre cropped, normalised.

    Args:
        views: the recipe whose plain view to make.
    """

    def __init__(self, views: Views):
        self.views = views

    def __call__(self, images: Any) -> Tensor:
        """float32 [3, H, W] for one image, [B, 3, H, W] for a batch; `images` are as for `Transform`."""
        arrays, alone = _arrays(images, self.views.channels)
        taken: list[Any] = [Image.fromarray(array) for array in arrays] if self.views.channels is None else arrays
        made = torch.stack([self.views.plain(image) for image in taken])
        return made[0] if alone else made
