"""Refuses images that a method cannot learn from, judged by the first images of a set or by its labels."""

import contextlib

import numpy as np

from caco.data.sets.sources import Source, UnreadableImage
from caco.errors import UserError

SMALLEST_SIDE = 24  # shortest side of an image that is cut into patches; a third of it has 8 pixels
_NUM_LOOKED_AT = 64


def refuse_too_small_for_patches(source: Source) -> None:
    """Raises UserError if the first readable image is smaller than SMALLEST_SIDE on a side."""
    for pixels in _first(source, 1):
        height, width = pixels.shape[:2]
        if min(height, width) < SMALLEST_SIDE:
            raise UserError(
                f"data: images of {source.name} are too small for patches: the first has {width} x {height} pixels, a"
                f" third of which is {min(height, width) // 3}; this method needs images of {SMALLEST_SIDE} pixels a"
                " side or more"
            )


def refuse_grey(source: Source) -> None:
    """Raises UserError if the first images have no colour at all."""
    images = _first(source, _NUM_LOOKED_AT)
    if images and all((pixels == pixels[..., :1]).all() for pixels in images):
        raise UserError(
            f"data: the first {len(images)} images of {source.name} are grey; this method contrasts lightness with"
            " colour, and needs images that have some"
        )


def _first(source: Source, count: int) -> list[np.ndarray]:
    images = []
    for index in range(min(count, len(source))):
        with contextlib.suppress(UnreadableImage):
            images.append(source.pixels(index))
    return images


def refuse_other_labels(source: Source, classes: int) -> None:
    """Check that each image has a label, for a method that looks at labels.

    Raises:
        UserError: images have no label, or one of `classes` or above.
    """
    labels = source.labels
    if labels is None or labels.ndim != 1:
        got = "images without labels" if labels is None else "images with several labels each"
    elif len(labels) and (labels.min() < 0 or labels.max() >= classes):
        got = f"labels from {labels.min()} to {labels.max()}"
    else:
        return
    raise UserError(
        f"method.positives: expected a label from 0 to {classes - 1} for each training image, got {got}. Set"
        " method.positives.classes to the number of classes, or choose another pn, which needs no labels"
    )
