"""What methods with prototypes share: balanced assignments over all ranks, the loss that predicts one view's assignment
from another view, and statistics of how the prototypes are used.

Shapes: B this rank's images, N this rank's images of the whole training set, K prototypes or labels, V views, T views
that have a target.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from caco import distributed
from caco.errors import UserError

SMALLEST_EPSILON = 0.004  # float64 can represent exp(-2 / epsilon), of the farthest prototype, down to epsilon 0.0029


@torch.no_grad()
def balanced(score_BK: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """SwAV's soft assignments of the images of all ranks together (`equations.sinkhorn`): returns those of this rank's
    images, [B, K], without gradient. Each row sums to 1. A collective, in which each iteration sends K numbers.

    Source: arXiv 2006.09882, Eqs. 3 to 5.
    Args:
        score_BK: cosines of embeddings and prototypes; the ranks may have different numbers of images.
        epsilon: the smaller, the harder the assignments.
        iterations: of the Sinkhorn algorithm.
    """
    # In float64, because float32 cannot hold exp(1 / epsilon) for an epsilon of 0.01, which users take. The equation's
    # division by the total, and its factors 1/K and 1/B, cancel in the divisions that follow them.
    q_BK = ((score_BK.double() - 1) / epsilon).exp()
    for _ in range(iterations):
        q_BK = q_BK / distributed.sum_(q_BK.sum(0))
        q_BK = q_BK / q_BK.sum(1, keepdim=True)
    return q_BK.to(score_BK.dtype)


@torch.no_grad()
def balanced_labels(log_p_NK: Tensor, *, power: float, tolerance: float) -> Tensor:
    """SeLa's labels of the images of all ranks together, chosen so that each of the K labels has about equally many
    images: returns those of this rank's images, int64 [N]. A collective, in which each iteration sends K numbers.

    Let P = p^power, N' the number of images over all ranks, and c = 1/N' at first. Each iteration computes
    r = (1/K) / (P^T c) and then c' = (1/N') / (P r). The iterations end when the sum over all images of |c / c' - 1|,
    which is computed in the first and then in every tenth iteration, is at most `tolerance`. The label of image i is
    the k with the largest r_k P_ik c_i. The arithmetic is float64.

    Source: arXiv 1911.05371; published code, sinkhornknopp.py: cpu_sk.
    Args:
        log_p_NK: log probabilities; the ranks may have different numbers of images.
        power: the power of the probabilities; higher is nearer to each image's own most probable label.
        tolerance: of the balance.
    Raises:
        UserError: some label has a probability of 0 for every image, so it cannot be given to any.
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
                f"{(~r_K.isfinite()).sum()} of {num_labels} labels have a probability of 0 for every image, once raised"
                f" to the power {power}: the network has collapsed, or method.power is too high; try a lower"
                " method.power, or a lower optimizer.lr"
            )
        next_N = 1 / num_images / (p_NK @ r_K)
        if count % 10 == 0:
            error = distributed.sum_((c_N / next_N - 1).abs().sum()).item()
        c_N, count = next_N, count + 1
    return p_NK.mul_(r_K).mul_(c_N[:, None]).argmax(1)


def cross_view_loss(targets: list[Tensor], scores: list[Tensor], temperature: float) -> Tensor:
    """`equations.cross_view_loss`, a scalar, computed with only one softmax and one sum for each predicting view.

    Source: SwAV (arXiv 2006.09882), Eqs. 1 and 6; DINO (arXiv 2104.14294), Eq. 3.
    Args:
        targets: the targets of the first T views, [B, K] each, without gradient; their rows sum to 1.
        scores: the scores of all V views, [B, K] each.
        temperature: that the scores are divided by.
    Raises:
        UserError: fewer than 2 views.
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
    """The mean over the rows of their entropy in nats, a scalar. It is log K if all rows are uniform.

    Args:
        p_BK: probabilities, whose rows sum to 1.
    """
    return torch.special.entr(p_BK).sum(1).mean()


@torch.no_grad()
def nearest_counts(score_BK: Tensor) -> Tensor:
    """For each prototype the number of all ranks' images whose nearest prototype it is, int64 [K]. A collective.

    Args:
        score_BK: scores of this rank's images; the largest one's prototype is the nearest.
    """
    nearest_B = score_BK.argmax(1)
    counts_K = torch.zeros(score_BK.shape[1], dtype=torch.int64, device=nearest_B.device)
    return distributed.sum_(counts_K.index_add_(0, nearest_B, torch.ones_like(nearest_B)))


def use_statistics(uses_K: Tensor) -> dict[str, float]:
    """How evenly the prototypes were used, from int64 counts [K] as of `nearest_counts`; empty if all counts are 0.

    prototypes/used: percent of the prototypes that were the nearest of some image. prototypes/use_perplexity: exp of
    the entropy of the counts' distribution, which is the number of evenly used prototypes with the same entropy; 1
    means collapse. prototypes/use_entropy: that entropy in percent of log K, its largest possible value.
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
    """A warning, as a part of a sentence, if an epoch's statistics show that almost all images have the same nearest
    prototype; else None.
    """
    perplexity = statistics.get("prototypes/use_perplexity")
    if perplexity is None or perplexity > 1.5:
        return None
    return (
        f"almost all images have the same nearest prototype (prototypes/use_perplexity {perplexity:.2f}, 1 is collapse)"
    )
