"""The views of a recipe as transforms in a program of one's own: of one image, or of a batch of them.

two = Transform(views) # of one image two tensors [3, H, W], of a batch two of [B, 3, H, W]; other draws at each call
plain = Preprocessing(views)               # what evaluations take of an image, always the same
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
    """Images as uint8 [H, W, 3] each, or as they are, [H, W, channels]; and whether it was one alone."""
    alone = isinstance(images, Image.Image) or isinstance(images, np.ndarray) and images.ndim in (2, 3)
    batch: Sequence[Any] = [images] if alone else images
    named = [(image, f"image {number}" if not alone else "image") for number, image in enumerate(batch)]
    if channels is not None:
        return [checked(np.asarray(image), name, channels) for image, name in named], alone
    return [np.asarray(rgb(image, name)) for image, name in named], alone


class Transform:
    """All views that a recipe takes of an image, drawn anew at each call from torch's generator (a DataLoader's workers
    have their own).

    Args:
        views: of a recipe: `caco.library.views("simclr")`, or made by hand.
    """

    def __init__(self, views: Views):
        self.views = views

    def __call__(self, images: Any, *, stream: int | None = None, samples: Sequence[int] | None = None) -> list[Tensor]:
        """Each view, normalised, float32: [3, H, W] of one image, [B, 3, H, W] of a batch; patches, where a recipe has
        them, come last, [P, 3, H, W] or [B, P, 3, H, W].

        Args:
            images: a Pillow image or uint8 [H, W, 3]; or a batch: uint8 [B, H, W, 3] or a sequence of images of any
                sizes.
            stream, samples: what the draws depend on, for who wants them again: 64 bits, and a number for each image.
                The same give the same bits, whatever else is in the batch.
        Raises:
            UserError: something that is no image of 8 bits.
        """
        arrays, alone = _arrays(images, self.views.channels)
        stream = int(torch.randint(2**62, ())) if stream is None else stream
        at = np.arange(len(arrays)) if samples is None else np.asarray(samples, dtype=np.int64)
        made = [
            self.views.normalise(torch.from_numpy(pixels)) for pixels in self.views.batch_pixels(arrays, at, stream)
        ]
        return [view[0] for view in made] if alone else made


class Preprocessing:
    """What evaluations take of an image: shorter side resized, centre cropped, normalised.

    Args:
        views: of a recipe, whose plain view it is.
    """

    def __init__(self, views: Views):
        self.views = views

    def __call__(self, images: Any) -> Tensor:
        """float32 [3, H, W] of one image, [B, 3, H, W] of a batch; `images` as of `Transform`."""
        arrays, alone = _arrays(images, self.views.channels)
        taken: list[Any] = [Image.fromarray(array) for array in arrays] if self.views.channels is None else arrays
        made = torch.stack([self.views.plain(image) for image in taken])
        return made[0] if alone else made
