"""Checks class labels that come from files and programs of others."""

from typing import Any

import numpy as np

from caco.errors import UserError

MOST_CLASSES = 1_000_000  # a classifier has a row for each, so a larger label is a slip, an identity say


def whole_labels(labels: Any, where: str) -> np.ndarray:
    """Labels that somebody supplies, as int64 [N].

    Args:
        where: what the error calls the set.
    Raises:
        UserError: they are no class's whole number for each image; names the first one that is not.
    """
    try:
        given = np.asarray(labels)
    except ValueError:  # of lists of different lengths
        given = np.empty((0, 0), object)
    if given.ndim != 1 or given.dtype.kind not in "iuf":
        raise UserError(
            f"{where}: expected labels that are one whole number for each image, got {given.dtype} {list(given.shape)}"
        )
    with np.errstate(invalid="ignore"):
        fits = (given >= 0) & (given < MOST_CLASSES) & (given == np.floor(given))
    if not fits.all():
        first = int(np.flatnonzero(~fits)[0])
        raise UserError(
            f"{where}: expected labels that are whole numbers from 0 to {MOST_CLASSES - 1:,}, got {given[first]} for"
            f" image {first}"
        )
    return given.astype(np.int64)
