"""Which view of an image is compared with which other, and how much each comparison counts."""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from caco.errors import UserError


class Term(NamedTuple):
    query: int  # view that is encoded with gradient
    key: int  # view whose key chooses (or is) the positive
    weight: float


def pair_terms(num_large: int, num_small: int, *, symmetric: bool, reduction: Literal["sum", "mean"]) -> list[Term]:
    """Which view queries which key, and with what weight.

    Keys are the large views (symmetric) or the second of them (else); every other view queries each key. "sum" adds
    the terms (CaCo's two directions; AdCo's five crops). "mean" averages the large views' terms and adds the average of
    the small ones' (AdCo's two directions; CaCo's multi-crop: 2 large and 12 small terms).
    """
    keys = range(num_large) if symmetric else [1]
    large = [(q, k) for k in keys for q in (range(num_large) if symmetric else [0]) if q != k]
    small = [(q, k) for k in keys for q in range(num_large, num_large + num_small)]
    return [Term(q, k, 1.0 if reduction == "sum" else 1 / len(pairs)) for pairs in (large, small) for q, k in pairs]


def terms_of(sizes: list[int], *, symmetric: bool = True, reduction: Literal["sum", "mean"]) -> list[Term]:
    """The terms of views of these sizes in pixels; the large ones come first."""
    return pair_terms(*_large_and_small(sizes), symmetric=symmetric, reduction=reduction)


def weighted_sum(terms: list[Term], values: Sequence[Tensor]) -> Tensor:
    """Of each term's scalar."""
    return torch.stack([term.weight * value for term, value in zip(terms, values, strict=True)]).sum()


def pairs_of(sizes: list[int]) -> list[tuple[int, int]]:
    """Each pair of views once of which at least one is large, for losses that take two views alike."""
    num_large, num_small = _large_and_small(sizes)
    return [(a, b) for a, b in itertools.combinations(range(num_large + num_small), 2) if a < num_large]


def _large_and_small(sizes: list[int]) -> tuple[int, int]:
    if len(sizes) < 2:
        raise UserError(f"this method compares views of an image: expected at least 2 of them, got {len(sizes)}")
    num_large = sum(size == sizes[0] for size in sizes)
    return num_large, len(sizes) - num_large
