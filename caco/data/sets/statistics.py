"""Measures the mean and standard deviation of each channel, for images that are used as stored; once for each run."""

import numpy as np

from caco import distributed
from caco.data.sets.sources import Source, UnreadableImage
from caco.data.views.channels import numbers
from caco.errors import UserError
from caco.saying import Say, counted, silent

MOST_IMAGES = (
    4096  # images read, evenly spread over the set; more would hardly change the result, but take ever more time
)


def mean_and_std(source: Source, say: Say = silent) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels of up to MOST_IMAGES images.

    They are in the units of the views (caco/data/views/channels.py). A constant channel gets a standard deviation of 1,
    so that normalising it is harmless. A collective; the result does not depend on the number of ranks.

    Raises:
        UserError: none of the images can be read.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, min(len(source), MOST_IMAGES)).round().astype(np.int64)).tolist()
    rank, world = distributed.rank(), distributed.world()
    own = chosen[rank::world]
    what = f"images of {source.name} read for their mean and standard deviation"

    def each() -> list[tuple[int, np.ndarray, np.ndarray] | None]:
        found = []
        with counted(say, what, len(own)) as count:
            for index in own:
                found.append(_of_one(source, index))
                count(1)
        return found

    parts = distributed.together(each)
    ordered = [parts[place % world][place // world] for place in range(len(chosen))]  # as one rank would order them
    known = [one for one in ordered if one is not None]
    if not known:
        raise UserError(
            f"{source.name}: expected readable images to measure mean and standard deviation, but none of"
            f" {len(chosen)} images can be read"
        )
    weight_N = np.array([number for number, _, _ in known], np.float64)
    weight_N /= weight_N.sum()
    mean_NC, variance_NC = (
        np.stack(values) for values in zip(*((mean, variance) for _, mean, variance in known), strict=True)
    )
    mean_C = (weight_N[:, None] * mean_NC).sum(0)
    variance_C = (weight_N[:, None] * (variance_NC + (mean_NC - mean_C) ** 2)).sum(0)
    std_C = np.sqrt(variance_C)
    is_constant = std_C <= 1e-7 * np.maximum(1, np.abs(mean_C))
    return _rounded(mean_C), _rounded(np.where(is_constant, 1.0, std_C))


def _of_one(source: Source, index: int) -> tuple[int, np.ndarray, np.ndarray] | None:
    """Number of pixels, and each channel's mean and variance in float64. None for an unreadable image, which the loader
    will report.
    """
    try:
        pixels = numbers(source.pixels(index)).astype(np.float64)
    except UnreadableImage:
        return None
    return pixels.shape[0] * pixels.shape[1], pixels.mean((0, 1)), pixels.var((0, 1))


def _rounded(values: np.ndarray) -> list[float]:
    """Round to seven digits, so that the result does not depend on the order in which a processor adds."""
    return [float(f"{value:.7g}") for value in values]
