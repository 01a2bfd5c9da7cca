"""What methods with prototypes share: fair assignments over all ranks, prediction across views, and how prototypes are
used.

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
    # In float64, because users take an epsilon of 0.01, where exp(1 / epsilon) is no float32. The sum over everything
    # and the factors 1/K and 1/G of the equation cancel in what follows them.
    q_BK = ((score_BK.double() - 1) / epsilon).exp()
    for _ in range(iterations):
        q_BK = q_BK / distributed.sum_(q_BK.sum(0))
        q_BK = q_BK / q_BK.sum(1, keepdim=True)
    return q_BK.to(score_BK.dtype)


@torch.no_grad()
def balanced_labels(log_p_NK: Tensor, *, power: float, tolerance: float) -> Tensor:
    """SeLa's labels of the images of all ranks together: int64 [N] of this rank's, so that the K labels have about as
    many images each.

    With P = p^power, c = 1/N' for N' images over all ranks: r = (1/K) / (P^T c), c' = (1/N') / (P r), again and again,
    until the sum over images of |c / c' - 1|, looked at every tenth time, the first included, is at most `tolerance`;
    then the largest r_k P_ik c_i. In float64. Only the sums over images travel, K numbers an iteration.

    Source: arXiv 1911.05371; published code, sinkhornknopp.py: cpu_sk.
    Args:
        log_p_NK: log probabilities; the ranks may have different numbers of images.
    Raises:
        UserError: some label has a probability of 0 for every image, so no balance gives it any.
    """
    p_NK = (log_p_NK.double() * power).exp_()
    num_images = distributed.sum_(p_NK.new_tensor(float(len(p_NK)))).item()
    num_labels = p_NK.shape[1]
    c_N = p_NK.new_full((len(p_NK),), 1 / num_images)
    error, count = math.inf, 0
    while error > tolerance:
        r_K = 1 / num_labels / distributed.sum_(p_NK.T @ c_N)
        if not r_K.isfinite().all():  # the same on every rank
            raise UserError(
                f"{(~r_K.isfinite()).sum()} of {num_labels} labels have no probability for any image, to the power"
                f" {power}: the network has collapsed, or method.power is too high; try a lower one, or a lower"
                " optimizer.lr"
            )
        next_N = 1 / num_images / (p_NK @ r_K)
        if count % 10 == 0:
            error = distributed.sum_((c_N / next_N - 1).abs().sum()).item()
        c_N, count = next_N, count + 1
    return p_NK.mul_(r_K).mul_(c_N[:, None]).argmax(1)


def cross_view_loss(targets: list[Tensor], scores: list[Tensor], temperature: float) -> Tensor:
    """`equations.cross_view_loss`, with one softmax and one sum for each predicting view; a scalar.

    Args:
        targets: of the first T views [B, K] each, without gradient; rows sum to 1. scores: of all V views [B, K] each.
    """
    if len(scores) < 2:
        raise UserError(
            "this method predicts one view's assignment from another's; expected at least 2 views of an image, got 1"
        )
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
    nearest_B = score_BK.argmax(1)
    counts_K = torch.zeros(score_BK.shape[1], dtype=torch.int64, device=nearest_B.device)
    return distributed.sum_(counts_K.index_add_(0, nearest_B, torch.ones_like(nearest_B)))


def use_statistics(uses_K: Tensor) -> dict[str, float]:
    """How evenly the prototypes were used, from counts of `nearest_counts`.

    prototypes/used: percent that were some image's nearest. prototypes/use_perplexity: exp of the entropy of the use,
    the number of evenly used prototypes that would have it; 1 is collapse. prototypes/use_entropy: that entropy as a
    share of even use's, percent.
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
    return (
        f"almost all images have the same nearest prototype (prototypes/use_perplexity {perplexity:.2f}, 1 is collapse)"
    )
