"""The paper's equations, one pure function each: dense, slow, and easy to check by reading.

This file is the oracle against which every faster implementation is tested. Equation numbers are those of arXiv
2203.14370.

Shapes: B queries, K bank rows, D embedding width, E extra columns (logits of vectors that are no bank rows).
Symbols: q query, k momentum key, m unit bank row, w stored bank row (any norm), p probability, tau temperature.
Everywhere `positive_B` is int64: a value below K names a bank row, K + e names extra column e.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(q_BD: Tensor, k_BD: Tensor, m_KD: Tensor, tau: float) -> Tensor:
    """Contrastive loss of a query, its other view and the bank's rows as negatives, mean over the batch.

    -(1/B) sum_i log [ exp(q_i.k_i/tau) / (exp(q_i.k_i/tau) + sum_j exp(q_i.m_j/tau)) ]

    Source: Eq. 1. All vectors are of unit norm. Returns a scalar.
    """
    positive_B = (q_BD * k_BD).sum(-1) / tau
    logits_BK = q_BD @ m_KD.T / tau
    return (torch.logsumexp(torch.cat([positive_B[:, None], logits_BK], 1), 1) - positive_B).mean()


def probabilities(q_BD: Tensor, m_KD: Tensor, tau: float, extra_BE: Tensor | None = None) -> Tensor:
    """p_ij: the probability that row j is the positive of query i; softmax over the bank (and extra columns, if any).

    Source: Eq. 5, which has no extra columns; AdCo's denominator has the batch's keys besides the bank.
    Args:
        extra_BE: cosines (not yet divided by tau) of columns that are no bank rows.
    Returns:
        [B, K + E], rows sum to 1.
    """
    cosines = q_BD @ m_KD.T
    if extra_BE is not None:
        cosines = torch.cat([cosines, extra_BE], 1)
    return torch.softmax(cosines / tau, 1)


def contrastive_loss(
    q_BD: Tensor, m_KD: Tensor, positive_B: Tensor, tau: float, extra_BE: Tensor | None = None
) -> Tensor:
    """-log p at each query's positive, not yet averaged over the batch.

    Source: Eq. 3 (positives and negatives from one bank). With the positive in an extra column it is Eq. 1.
    Returns:
        [B]; the paper's L is its mean.
    """
    cosines = q_BD @ m_KD.T
    if extra_BE is not None:
        cosines = torch.cat([cosines, extra_BE], 1)
    return F.cross_entropy(cosines / tau, positive_B, reduction="none")


def most_probable_positive(k_BD: Tensor, m_KD: Tensor) -> Tensor:
    """The row that each anchor takes as its positive: the most probable one, ties to the lowest index.

    j+(i) = argmax_j k_i . m_j

    Source: Eq. 11. Read literally, the anchor is the query. In Figure 2 and the published code the momentum key of the
    OTHER view chooses, and caco does the same: pass keys (or queries for the literal reading).
    Returns:
        int64 [B], in [0, K).
    """
    return (k_BD @ m_KD.T).argmax(1)  # if several are equal, torch returns the first


def tangent(q_BD: Tensor, m_KD: Tensor) -> Tensor:
    """(I - m_j m_j^T) q_i for every pair: the part of q_i that is tangent to the sphere at m_j.

    Source: Eqs. 8 and 9. Returns [B, K, D], orthogonal to m_j; m of unit norm.
    """
    return q_BD[:, None, :] - (q_BD @ m_KD.T)[:, :, None] * m_KD[None, :, :]


def positive_gradient(q_BD: Tensor, m_BD: Tensor, p_B: Tensor, tau: float) -> Tensor:
    """Gradient of one query's loss at its own positive row, along the sphere: -(1 - p)(I - m m^T) q / tau.

    Source: Eq. 8 (Eq. 4 before the projection). Descending it is the cooperative pull. Returns [B, D].
    """
    along = q_BD - (q_BD * m_BD).sum(-1, keepdim=True) * m_BD
    return -(1 - p_B)[:, None] * along / tau


def negative_gradient(q_BD: Tensor, m_KD: Tensor, p_BK: Tensor, tau: float) -> Tensor:
    """Gradient of each query's loss at each negative row, along the sphere: p_ij (I - m_j m_j^T) q_i / tau.

    Source: Eq. 9. ASCENDING it is the adversarial push. Returns [B, K, D].
    """
    return p_BK[:, :, None] * tangent(q_BD, m_KD) / tau


def bank_weights(p_BK: Tensor, positive_B: Tensor, *, pull: float, push: float) -> Tensor:
    """How far each row moves towards each anchor; the cooperative and the adversarial part in one matrix.

    push * p_ij everywhere, pull * (1 - p_ij) at the positive. (1, 1) is CaCo's Eq. 6, (0, 1) AdCo's bank,
    (1, 0) cooperative only, (0, 0) a frozen bank.

    Source: Eqs. 6 and 10.
    Args:
        p_BK: probabilities of the K bank rows (the columns of `probabilities` that are rows).
        positive_B: a value of K or more is no bank row: then all K rows are negatives of that query.
    Raises:
        ValueError: positive_B is not of shape [B].
    """
    B, K = p_BK.shape
    if positive_B.shape != (B,):
        raise ValueError(f"positive_B must have shape [{B}], one positive a query; got {list(positive_B.shape)}")
    own_BK = positive_B[:, None] == torch.arange(K, device=p_BK.device)
    return torch.where(own_BK, pull * (1 - p_BK), push * p_BK)


def bank_direction(q_BD: Tensor, m_KD: Tensor, weights_BK: Tensor) -> Tensor:
    """Sum over the anchors of weight times tangent: the direction in which Eq. 10 moves each row, without eta / tau.

    Source: Eq. 10. Returns [K, D].
    """
    return torch.einsum("bk,bkd->kd", weights_BK, tangent(q_BD, m_KD))


def bank_step_equation_10(
    q_BD: Tensor, m_KD: Tensor, positive_B: Tensor, tau: float, *, eta: float, pull: float = 1.0, push: float = 1.0
) -> Tensor:
    """One literal step of Eq. 10: a sum over the batch, no momentum, no normalisation afterwards. Returns [K, D]."""
    weights_BK = bank_weights(probabilities(q_BD, m_KD, tau), positive_B, pull=pull, push=push)
    return m_KD + eta / tau * bank_direction(q_BD, m_KD, weights_BK)


def bank_gradient(
    q_BD: Tensor,
    w_KD: Tensor,
    positive_B: Tensor,
    tau: float,
    *,
    pull: float = 1.0,
    push: float = 1.0,
    extra_BE: Tensor | None = None,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Gradient that the bank's optimiser DESCENDS, at stored rows of any norm.

    g_j = -(1 / (tau |w_j|)) sum_i weight_i w_ij (I - m_j m_j^T) q_i,  m_j = w_j / |w_j|

    Equal to the exact gradient of the mean of Eq. 3 through normalised rows, with the negatives' sign flipped and
    scaled by pull and push. Departs from Eq. 10 as the published code does: a mean (weight_i = 1/B), not a sum, and
    the 1/|w_j| of the normalisation.
    Args:
        weight_B: weight of each query's loss; None is the mean over the batch.
    Returns:
        [K, D].
    """
    norm_K1 = w_KD.norm(dim=1, keepdim=True)
    m_KD = w_KD / norm_K1
    p_BK = probabilities(q_BD, m_KD, tau, extra_BE)[:, : len(w_KD)]
    weights_BK = bank_weights(p_BK, positive_B, pull=pull, push=push)
    if weight_B is None:
        weight_B = torch.full_like(q_BD[:, 0], 1 / len(q_BD))
    return -bank_direction(q_BD, m_KD, weight_B[:, None] * weights_BK) / (tau * norm_K1)


def bank_update(
    w_KD: Tensor, velocity_KD: Tensor, gradient_KD: Tensor, *, lr: float, momentum: float, reading: str
) -> tuple[Tensor, Tensor]:
    """SGD with momentum on the rows, in one of two readings of the paper.

    code: the stored rows have any length and are normalised only where they are read, as in the published code.
    paper: the same step, then w_j / |w_j|; the velocity is not changed (the text after Eq. 7).
    Returns:
        (rows, velocity), both [K, D].
    """
    velocity_KD = momentum * velocity_KD + gradient_KD
    w_KD = w_KD - lr * velocity_KD
    if reading == "paper":
        w_KD = w_KD / w_KD.norm(dim=1, keepdim=True)
    elif reading != "code":
        raise ValueError(f"reading must be 'paper' or 'code'; got {reading!r}")
    return w_KD, velocity_KD


# Remedies for a bank that young keys use badly. They are not in the paper; they follow later papers on CaCo's code.


def several_positives_loss(loss_CB: Tensor, weight_CB: Tensor) -> Tensor:
    """-sum_c weight_c log p_c for queries with C positives each, [B]: the loss of Eq. 3 with each positive alone,
    weighted.

    For the k rows nearest to a key, the weights are the softmax of their cosines with the key over a temperature
    (`nearest_row_weights`); for a key and its row they are 1 - a and a.
    """
    return (weight_CB * loss_CB).sum(0)


def nearest_row_weights(k_BD: Tensor, m_KD: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The `count` rows nearest to each key, int64 [B, C], and the softmax of their cosines with the key, [B, C]."""
    cosine_BC, row_BC = (k_BD @ m_KD.T).topk(count, dim=1)
    return row_BC, torch.softmax(cosine_BC / temperature, 1)


def mean_activation_divergence(q_BD: Tensor, m_KD: Tensor, tau: float) -> Tensor:
    """KL(p || 1/K) = sum_j p_j log(K p_j) with p_j = mean_i p_ij: 0 if all rows are equally probable on average, log K
    if one row has all the probability.
    """
    mean_K = probabilities(q_BD, m_KD, tau).mean(0)
    return torch.special.xlogy(mean_K, mean_K * len(m_KD)).sum()


# Other losses over the same positives and negatives. If a query's positive is a bank row, that row is not among the
# query's negatives; N is the number of negatives.


def _positive_and_negatives(
    q_BD: Tensor, m_KD: Tensor, positive_B: Tensor, extra_BE: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines with the positive [B]; cosines with all columns [B, K + E], with -inf for the positive; and N [B]."""
    cosines = q_BD @ m_KD.T
    if extra_BE is not None:
        cosines = torch.cat([cosines, extra_BE], 1)
    others = cosines.scatter(1, positive_B[:, None], -torch.inf)
    return cosines.gather(1, positive_B[:, None])[:, 0], others, others.isfinite().sum(1).to(q_BD.dtype)


def reweighted_loss(
    q_BD: Tensor, m_KD: Tensor, positive_B: Tensor, tau: float, extra_BE: Tensor | None = None, *,
    positive_share: float,
    concentration: float,
) -> Tensor:  # fmt: skip
    """Debiased hard negatives: -log pos / (pos + Ng), [B]. With neg_j = exp(q.m_j / tau), tau+ the positive_share, beta
    the concentration:

    R = sum_j w_j neg_j, w_j = neg_j^beta / mean_j neg_j^beta, Ng = max((R - tau+ N pos) / (1 - tau+), N exp(-1 / tau)).

    Source: arXiv 2010.04592; with beta = 0 arXiv 2007.00224 (debiased). There the negatives are those of a batch.
    """
    positive, others, count = _positive_and_negatives(q_BD, m_KD, positive_B, extra_BE)
    positive, negatives, there = (positive / tau).exp(), (others / tau).exp(), others.isfinite()
    weights = torch.where(there, (concentration * others.where(there, 0.0) / tau).exp(), 0.0)
    total = (weights / (weights.sum(1) / count)[:, None] * negatives).sum(1)
    lowest = count * torch.exp(torch.tensor(-1 / tau, dtype=q_BD.dtype))
    left = torch.maximum((total - positive_share * count * positive) / (1 - positive_share), lowest)
    return -(positive / (positive + left)).log()


def margin_loss(
    q_BD: Tensor,
    m_KD: Tensor,
    positive_B: Tensor,
    tau: float,
    extra_BE: Tensor | None = None,
    *,
    epsilon: float,
    alpha: float | None,
) -> Tensor:
    """(CE(cosines) + alpha CE(cosines moved by epsilon: the positive's down, the negatives' up)) / (1 + alpha), [B];
    with alpha None only the second CE.

    Source: arXiv 2106.11230, implicit feature modification.
    """
    positive, others, _ = _positive_and_negatives(q_BD, m_KD, positive_B, extra_BE)

    def cross_entropy(positive: Tensor, others: Tensor) -> Tensor:
        return torch.logsumexp(torch.cat([positive[:, None], others], 1) / tau, 1) - positive / tau

    moved = cross_entropy(positive - epsilon, others + epsilon)
    return moved if alpha is None else (cross_entropy(positive, others) + alpha * moved) / (1 + alpha)


# Methods with prototypes: SwAV (arXiv 2006.09882) and DINO (arXiv 2104.14294). K is the number of prototypes, tau the
# student's temperature.


def sinkhorn(score_BK: Tensor, epsilon: float, iterations: int = 3) -> Tensor:
    """Soft codes that use every prototype equally often: SwAV's assignment of a batch, as its code computes it.

    Q = exp(s / epsilon) over its sum. Then, in turn: each prototype's column is divided by K times its sum, each
    image's row by B times its sum. At the end Q is multiplied by B.

    Source: SwAV, Eqs. 3 to 5 and its distributed_sinkhorn. Returns [B, K], rows sum to 1.
    """
    B, K = score_BK.shape
    q_BK = torch.exp(score_BK / epsilon)
    q_BK = q_BK / q_BK.sum()
    for _ in range(iterations):
        q_BK = q_BK / q_BK.sum(0, keepdim=True) / K
        q_BK = q_BK / q_BK.sum(1, keepdim=True) / B
    return q_BK * B


def cross_view_loss(targets: list[Tensor], scores: list[Tensor], tau: float) -> Tensor:
    """Cross-entropy between the target distribution of one view and the softmax of another's scores, over all pairs of
    two views.

    1 / (T (V - 1)) sum_t sum_{v != t} -(1/B) sum_i sum_k q_tik log softmax(s_vi / tau)_k

    Source: SwAV, Eqs. 1 and 6; DINO, Eq. 3 (averaged over the pairs, as its code does).
    Args:
        targets: one for each of the first T views, [B, K]. scores: one for each of all V views, [B, K].
    Returns:
        a scalar.
    """
    terms = [
        F.cross_entropy(s_BK / tau, q_BK) for t, q_BK in enumerate(targets) for v, s_BK in enumerate(scores) if v != t
    ]
    return torch.stack(terms).mean()


def dino_targets(teacher_BK: Tensor, centre_K: Tensor, tau: float) -> Tensor:
    """The target distribution from the teacher's scores of a view: centred, then sharpened by tau. Returns [B, K]."""
    return torch.softmax((teacher_BK - centre_K) / tau, 1)


# For the features of any method.


def rank_me(x_ND: Tensor) -> Tensor:
    """The number of directions that N vectors fill: exp of the entropy of their singular values as shares of the sum. A
    scalar from 1 to min(N, D).

    Source: RankMe (arXiv 2210.02885), Eq. 1; for the vectors as they are, neither centred nor normalised.
    """
    share_R = torch.linalg.svdvals(x_ND)
    share_R = share_R / share_R.sum() + 1e-7
    return torch.exp(-(share_R * share_R.log()).sum())
