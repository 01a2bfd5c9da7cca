"""The terms of a loss: which view of an image is compared with which other view, and the weight of each comparison."""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from caco.errors import UserError


class Term(NamedTuple):
    query: int  # the view that is encoded with gradient
    key: int  # the view whose key is the positive or chooses it
    weight: float  # of the term in the loss


def pair_terms(num_large: int, num_small: int, *, symmetric: bool, reduction: Literal["sum", "mean"]) -> list[Term]:
    """The terms of a loss on `num_large` large and `num_small` small views, which follow the large ones.

    If `symmetric`, each large view is a key and every other view queries it. If not, the second view is the only key,
    and the first view and the small ones query it. With reduction "sum" every term has weight 1 (CaCo's two directions;
    AdCo's five crops). With "mean" the average over the large views' terms and the average over the small views' terms
    are added (AdCo's two directions; CaCo's multi-crop, with 2 large and 12 small terms).
    """
    keys = range(num_large) if symmetric else [1]
    large = [(q, k) for k in keys for q in (range(num_large) if symmetric else [0]) if q != k]
    small = [(q, k) for k in keys for q in range(num_large, num_large + num_small)]
    return [Term(q, k, 1.0 if reduction == "sum" else 1 / len(pairs)) for pairs in (large, small) for q, k in pairs]


def terms_of(sizes: list[int], *, symmetric: bool = True, reduction: Literal["sum", "mean"]) -> list[Term]:
    """The terms of a loss on views of these sizes in pixels, the large views first; see `pair_terms`.

    Raises:
        UserError: fewer than 2 views.
    """
    return pair_terms(*_large_and_small(sizes), symmetric=symmetric, reduction=reduction)


def weighted_sum(terms: list[Term], values: Sequence[Tensor]) -> Tensor:
    """The sum of the terms' values, which are scalars, by the terms' weights."""
    return torch.stack([term.weight * value for term, value in zip(terms, values, strict=True)]).sum()


def pairs_of(sizes: list[int]) -> list[tuple[int, int]]:
    """Every pair of views with at least one large view, each pair once: for losses that are symmetric in two views.

    Raises:
        UserError: fewer than 2 views.
    """
    num_large, num_small = _large_and_small(sizes)
    return [(a, b) for a, b in itertools.combinations(range(num_large + num_small), 2) if a < num_large]


def _large_and_small(sizes: list[int]) -> tuple[int, int]:
    if len(sizes) < 2:
        raise UserError(f"this method compares views of an image: expected at least 2 of them, got {len(sizes)}")
    num_large = sum(size == sizes[0] for size in sizes)
    return num_large, len(sizes) - num_large
