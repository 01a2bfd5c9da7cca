"""Seeded choice of some images of a set, with regard to their classes."""

import numpy as np

from caco.errors import UserError


def choose(labels: np.ndarray | None, count: int, total: int, *, seed: int, balanced: bool) -> np.ndarray:
    """Draw `count` of the positions 0..total - 1; they are returned in ascending order. With the same seed, a smaller
    count gives a subset of a larger one.

    Args:
        labels: int64 [total]; None draws without regard to classes.
        balanced: draw equally many of each class, as far as the classes reach; otherwise in proportion to their sizes.
    Raises:
        UserError: count is not in 1..total.
    """
    if not 1 <= count <= total:
        raise UserError(f"expected a number of images in 1..{total}, got {count}")
    draw = np.random.default_rng(seed).permutation(total)
    if labels is None:
        return np.sort(draw[:count])
    by_class = draw[np.argsort(labels[draw], kind="stable")]
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(total) - np.repeat(starts, sizes)
    # The draw's order breaks ties between the r-th images of all classes, so no class always gets the odd image.
    turn = np.empty(total)
    turn[by_class] = rank if balanced else (rank + 0.5) / np.repeat(sizes, sizes)
    return np.sort(draw[np.argsort(turn[draw], kind="stable")][:count])
