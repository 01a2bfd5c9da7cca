"""What methods with prototypes share: fair assignments over all ranks, prediction across views, and how prototypes are used.

Shapes: B this rank's images, K prototypes, V views, T of them with a target.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from caco import distributed
from caco.errors import UserError

SMALLEST_EPSILON = 0.004  # exp(-2 / epsilon), of the farthest prototype, is a float64 down to 0.0029


@torch.no_grad()
def balanced(score_BK: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """`equations.sinkhorn` of the images of all ranks together: soft codes [B, K] of this rank's, without gradient.

    Only the sums over images travel, K numbers an iteration.

    Args:
        score_BK: cosines; the ranks may have different numbers of images.
    """
    # In float64, because users take an epsilon of 0.01, where exp(1 / epsilon) is no float32. The sum over everything and the
    # factors 1/K and 1/G of the equation cancel in what follows them.
    q_BK = ((score_BK.double() - 1) / epsilon).exp()
    for _ in range(iterations):
        q_BK = q_BK / distributed.sum_(q_BK.sum(0))
        q_BK = q_BK / q_BK.sum(1, keepdim=True)
    return q_BK.to(score_BK.dtype)


def cross_view_loss(targets: list[Tensor], scores: list[Tensor], temperature: float) -> Tensor:
    """`equations.cross_view_loss`, with one softmax and one sum for each predicting view; a scalar.

    Args:
        targets: of the first T views [B, K] each, without gradient; rows sum to 1. scores: of all V views [B, K] each.
    """
    if len(scores) < 2:
        raise UserError("this method predicts one view's assignment from another's; expected at least 2 views of an image, got 1")
    total = scores[0].new_zeros(())
    for v, s_BK in enumerate(scores):
        aim_BK = sum(q_BK for t, q_BK in enumerate(targets) if t != v)
        total = total - (aim_BK * F.log_softmax(s_BK / temperature, 1)).sum(1).mean()
    return total / (len(targets) * (len(scores) - 1))


def entropy(p_BK: Tensor) -> Tensor:
    """Of each row in nats, averaged; a scalar. log K where nothing is told apart."""
    return torch.special.entr(p_BK).sum(1).mean()


@torch.no_grad()
def nearest_counts(score_BK: Tensor) -> Tensor:
    """How many of all ranks' images have each prototype as their nearest, int64 [K]."""
    return distributed.sum_(torch.bincount(score_BK.argmax(1), minlength=score_BK.shape[1]))


def use_statistics(uses_K: Tensor) -> dict[str, float]:
    """How evenly the prototypes were used, from counts of `nearest_counts`.

    prototypes/used: percent that were some image's nearest. prototypes/use_perplexity: exp of the entropy of the use, the number of
    evenly used prototypes that would have it; 1 is collapse. prototypes/use_entropy: that entropy as a share of even use's, percent.
    """
    total = uses_K.sum().item()
    if not total:
        return {}
    entropy_of_use = torch.special.entr(uses_K.double() / total).sum().item()
    return {
        "prototypes/used": 100 * (uses_K > 0).double().mean().item(),
        "prototypes/use_perplexity": math.exp(entropy_of_use),
        "prototypes/use_entropy": 100 * entropy_of_use / math.log(len(uses_K)),
    }


def collapse(statistics: Mapping[str, Any]) -> str | None:
    """What an epoch's statistics say of the prototypes' use; None where nothing is wrong."""
    perplexity = statistics.get("prototypes/use_perplexity")
    if perplexity is None or perplexity > 1.5:
        return None
    return f"almost all images have the same nearest prototype (prototypes/use_perplexity {perplexity:.2f}, 1 is collapse)"
