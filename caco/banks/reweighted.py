"""Losses that weight their negatives differently from InfoNCE, over a bank that is streamed as in
caco/banks/scoring.py.

Such a loss L_i of query i depends on three things: the logit s_i = q_i.m_+ / tau of its positive m_+, the number of its
negatives, and a few sums over the negatives, A_ti = log sum_j exp(t q_i.m_j / tau), one for each exponent t. The loss
with a margin and the debiased loss have the exponent 1; the loss that gives hard negatives more weight has 1 + beta and
beta. With a_ti = dL_i / dA_ti and b_i = -dL_i / ds_i, the derivatives with respect to the cosines are

    tau dL_i / d(q_i.m_j) = c_ij = sum_t t a_ti exp(t q_i.m_j / tau - A_ti)      for a negative j
    tau dL_i / d(q_i.m_+) = -b_i                                                  for the positive

The cooperative-adversarial gradient of a bank's rows (Eqs. 6 to 10) is that of InfoNCE with c_ij in place of p_ij and
b_i in place of 1 - p_i+:

    g_j = -1 / (tau |w_j|) sum_i weight_i w_ij (I - m_j m_j^T) q_i,
    w_ij = push c_ij for a negative, pull b_i for the positive.

(InfoNCE has a_1i = 1 - p_i+, so c_ij = p_ij.) c_ij can be negative: a loss that gives hard negatives more weight falls
when an easy negative comes nearer, and then the push has the opposite direction. Autograd gives a and b from a few
numbers for each query; the sums, and the weighted sums of rows, are streamed.

A positive that is a row of the bank (CaCo) is not a negative and has to be left out of the sums. Subtracting its term
afterwards would cancel all significant digits where that term is the largest. No kernel can leave a row out, so the
passes then run in blocks of PyTorch. Where the positive is no row (MoCo, AdCo, Table VII's Negative), the kernels make
one pass for each exponent.

Shapes: as in caco/banks/scoring.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from caco import distributed
from caco.banks import scoring
from caco.banks.scoring import Anchors, Score, Sums
from caco.banks.unusable import held_to


class Objective(Protocol):
    """A loss that is a function of the positive's logit and of sums over the negatives.

    exponents: the t of the sums, all above 0, the largest first.
    """

    @property
    def exponents(self) -> tuple[float, ...]: ...

    def __call__(self, positive_B: Tensor, log_sums: Sequence[Tensor], count_B: Tensor, tau: float) -> Tensor:
        """The loss of each query, [B], which autograd can differentiate with respect to `positive_B` and `log_sums`.

        Args:
            positive_B: s, the positive's cosine divided by tau.
            log_sums: A for each exponent, [B] each.
            count_B: each query's number of negatives.
            tau: the temperature.
        """
        ...


class OfPositives:
    """An objective, and whether some of the positives that `score` is given are rows of the bank: where nobody says so,
    it has to look, and waits for a GPU.
    """

    def __init__(self, objective: Objective, *, rows: bool):
        self.objective, self.exponents, self.rows_are_positives = objective, objective.exponents, rows

    def __call__(self, positive_B: Tensor, log_sums: Sequence[Tensor], count_B: Tensor, tau: float) -> Tensor:
        return self.objective(positive_B, log_sums, count_B, tau)


class _Derivatives(NamedTuple):
    loss_B: Tensor
    by_positive_B: Tensor  # derivative with respect to the positive's logit, -b
    by_sums: list[Tensor]  # for each exponent the derivative with respect to its sum, a, [B]


def _derivatives(
    objective: Objective, cosine_B: Tensor, log_sums: list[Tensor], count_B: Tensor, tau: float
) -> _Derivatives:
    leaves = [x_B.detach().clone().requires_grad_() for x_B in (cosine_B / tau, *log_sums)]
    with torch.enable_grad():
        loss_B = objective(leaves[0], leaves[1:], count_B, tau)
        by_positive_B, *by_sums = torch.autograd.grad(loss_B.sum(), leaves)
    return _Derivatives(loss_B.detach(), by_positive_B, by_sums)


def _sums_without_a_row(
    q_GD: Tensor, w_RD: Tensor, taus: list[float], exponents: tuple[float, ...], left_out_G: Tensor, *, with_sums: bool
) -> list[Sums]:
    """For each exponent t the sums at temperatures tau / t over these rows, without one row for each query. The scores
    are computed once for all exponents.

    Args:
        left_out_G: int64, for each query the row that its sums leave out; a number outside these rows leaves out none.
    """

    def scores_of(block: slice, m_SD: Tensor) -> Tensor:
        cosine_GS = q_GD @ m_SD.T
        inside_G = (left_out_G >= block.start) & (left_out_G < block.stop)
        at_G1 = (left_out_G - block.start).clamp(0, cosine_GS.shape[1] - 1)[:, None]
        kept_G1 = cosine_GS.gather(1, at_G1).masked_fill_(inside_G[:, None], -torch.inf)
        return cosine_GS.scatter_(1, at_G1, kept_G1)

    blocks = scoring.blocks(len(w_RD), len(q_GD))
    peak_G = q_GD.new_full((len(q_GD),), -torch.inf)
    shifts: list[list[float | Tensor]] = [[max(0.0, t / tau - scoring.HIGHEST) for tau in taus] for t in exponents]
    if q_GD.dtype == torch.float32 and 2 * max(exponents) / min(taus) > scoring.HIGHEST - scoring.LOWEST:
        for block in blocks:  # float32 cannot hold the whole range of exponentials: find the largest cosine first
            peak_G = torch.maximum(peak_G, scores_of(block, scoring.unit_rows(w_RD[block])[0]).amax(1))
        top_G1 = distributed.max_(peak_G.clone())[:, None]
        shifts = [[t / tau * top_G1 for tau in taus] for t in exponents]
    z = [[torch.zeros(len(q_GD), dtype=torch.float64, device=q_GD.device) for _ in taus] for _ in exponents]
    sums = [torch.zeros_like(q_GD) if with_sums else None for _ in exponents]
    for block in blocks:
        m_SD = scoring.unit_rows(w_RD[block])[0]
        cosine_GS = scores_of(block, m_SD)
        peak_G = torch.maximum(peak_G, cosine_GS.amax(1))
        for e, t in enumerate(exponents):
            for n, tau in enumerate(taus):
                e_GS = (cosine_GS * (t / tau)).sub_(shifts[e][n]).exp_()
                z[e][n] += e_GS.sum(1)
                if n == 0 and (sums_GD := sums[e]) is not None:
                    sums_GD.addmm_(e_GS, m_SD)
    of_query = [[x[:, 0] if isinstance(x, Tensor) else x for x in part] for part in shifts]
    return [Sums(of_query[e], z[e], peak_G, sums[e]) for e in range(len(exponents))]


class _ReweightedScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BD, w_RD, extra_BE, positive_B, first_row, size, taus, anchors, objective):
        B, bf16, exponents = len(q_BD), scoring.low_precision(q_BD.device), objective.exponents
        with torch.autocast(q_BD.device.type, enabled=False):
            q_GD, positive_G = distributed.gather(q_BD), distributed.gather(positive_B)
            local_G = positive_G - first_row
            own_shard_G = (local_G >= 0) & (local_G < len(w_RD)) & (positive_G < size)
            rows_are_positives = getattr(objective, "rows_are_positives", None)
            if rows_are_positives is None:
                rows_are_positives = bool((positive_G < size).any())  # the same on every rank
            with_sums = ctx.needs_input_grad[0]
            if rows_are_positives:
                left_out_G = local_G.masked_fill(~own_shard_G, -1)
                sums = _sums_without_a_row(q_GD, w_RD, taus, exponents, left_out_G, with_sums=with_sums)
            else:
                sums = [
                    scoring.sums_over_rows(q_GD, w_RD, [tau / t for tau in taus], with_sums=with_sums, bf16=bf16)
                    for t in exponents
                ]
            top_G = distributed.max_(sums[0].peak_G.clone())
            m_GD = scoring.unit_rows(w_RD[local_G.masked_fill(~own_shard_G, 0)])[0]
            m_GD = m_GD.masked_fill(~own_shard_G[:, None], 0.0)
            reduced = distributed.sum_(
                torch.stack([*(z_G for part in sums for z_G in part.z), (q_GD * m_GD).sum(1).double()])
            )
            usable = torch.isfinite(reduced).all() & (top_G < 1.01).all()  # the same on every rank
            *z, cosine_G = held_to(usable, list(reduced), q_GD, w_RD, first_row)
            cosine_B, in_extra_B = distributed.own(cosine_G, B), positive_B >= size
            count_B, others_BE = size - (~in_extra_B).long(), None
            if extra_BE is not None:
                column_B = (positive_B - size).clamp(min=0)[:, None]
                cosine_B = torch.where(in_extra_B, extra_BE.gather(1, column_B)[:, 0].double(), cosine_B)
                kept_B = extra_BE.gather(1, column_B).masked_fill(in_extra_B[:, None], -torch.inf)
                others_BE = extra_BE.scatter(1, column_B, kept_B)  # without the positive
                count_B = count_B + others_BE.isfinite().sum(1)
            log_sums: list[list[Tensor]] = []  # for each temperature of each exponent, [B]
            for n, tau in enumerate(taus):
                of_rows = [z[e * len(taus) + n].log() + part.shifts[n] for e, part in enumerate(sums)]
                log_sums.append([distributed.own(x_G, B) for x_G in of_rows])
                if others_BE is not None:
                    log_sums[n] = [
                        torch.logaddexp(x_B, torch.logsumexp(t / tau * others_BE, 1).double())
                        for t, x_B in zip(exponents, log_sums[n], strict=True)
                    ]
            result = [_derivatives(objective, cosine_B, log_sums[n], count_B, tau) for n, tau in enumerate(taus)]
            # Every rank needs each query's sums and derivatives: those of the loss for the queries' gradient, those at
            # the bank's temperature for the motion of its rows.
            told = [torch.stack([part.by_positive_B, *log_sums[n], *part.by_sums], 1) for n, part in enumerate(result)]
            told_to_all = [distributed.gather(x_BX).T for x_BX in told]
            of_loss, of_bank = told_to_all[0], told_to_all[-1]
            toward_BD = None
            if with_sums:
                # sum_j c_ij m_j - b_i m_+. The query's gradient is this, times the incoming gradient, over tau.
                toward_GD = m_GD * of_loss[0][:, None].to(q_GD.dtype)
                log_sum, share = of_loss[1:].chunk(2)
                for e, part in enumerate(sums):
                    factor_G = exponents[e] * share[e] * (part.shifts[0] - log_sum[e]).exp()
                    toward_GD += part.sums_GD * factor_G[:, None].to(q_GD.dtype)
                toward_BD = distributed.own(distributed.sum_(toward_GD), B)
            toward_BE = None
            if others_BE is not None and ctx.needs_input_grad[2]:
                toward_BE = torch.zeros_like(others_BE)
                for t, log_sum_B, share_B in zip(exponents, log_sums[0], result[0].by_sums, strict=True):
                    weight_BE = (t / taus[0] * others_BE - log_sum_B[:, None].to(others_BE.dtype)).exp_()
                    toward_BE += weight_BE * (t * share_B)[:, None].to(others_BE.dtype)
                own_BE = torch.where(
                    in_extra_B, result[0].by_positive_B.to(others_BE.dtype), toward_BE.gather(1, column_B)[:, 0]
                )
                toward_BE.scatter_(1, column_B, own_BE[:, None])
            # The largest probability of the softmax at the largest exponent, over all rows including the positive's.
            top_B = distributed.own(top_G, B).double()
            top_B = torch.where(in_extra_B, top_B, torch.maximum(top_B, cosine_B))
            scale = exponents[0] / taus[0]
            max_probability_B = (scale * top_B - torch.logaddexp(log_sums[0][0], scale * cosine_B)).exp().to(q_BD.dtype)

        ctx.save_for_backward(toward_BD, toward_BE)
        ctx.asking = (anchors, q_GD, positive_G, of_bank.to(q_GD.dtype), rows_are_positives)
        ctx.settings = taus, exponents, bf16
        ctx.mark_non_differentiable(max_probability_B)
        return result[0].loss_B.to(q_BD.dtype), max_probability_B

    @staticmethod
    def backward(ctx, grad_B, _):
        toward_BD, toward_BE = ctx.saved_tensors
        taus, exponents, bf16 = ctx.settings
        anchors, q_GD, positive_G, of_bank, rows_are_positives = ctx.asking
        with torch.autocast(grad_B.device.type, enabled=False):
            if anchors is not None:
                # Each rank's loss is the mean over its own part of the batch, hence the division by the world size.
                weight_G = distributed.gather(grad_B) / distributed.world()
                log_sum, share = of_bank[1:].chunk(2)
                for e, t in enumerate(exponents):
                    pull_G = (
                        -of_bank[0] / t if e == 0 else torch.zeros_like(weight_G)
                    )  # the positive pulls once, so only the first exponent's entry carries the pull
                    left_out = pull_G if rows_are_positives else None
                    anchors.append(
                        Anchors(q_GD, positive_G, log_sum[e], weight_G, taus[-1] / t, bf16, share[e], left_out)
                    )
            scale_B1 = (grad_B / taus[0])[:, None]
            grad_q_BD = None if toward_BD is None else toward_BD * scale_B1
            grad_extra_BE = None if toward_BE is None else toward_BE * scale_B1
        return grad_q_BD, None, grad_extra_BE, None, None, None, None, None, None


def score(
    q_BD: Tensor,
    w_RD: Tensor,
    positive_B: Tensor,
    *,
    objective: Objective,
    first_row: int,
    size: int,
    tau: float,
    bank_tau: float | None = None,
    extra_BE: Tensor | None = None,
    anchors: list[Anchors] | None = None,
) -> Score:
    """As `scoring.score`, with a loss other than InfoNCE. The negatives are all rows and extra columns except the
    positive and the masked columns.

    The backward pass gives the queries and the extra columns the gradient of the loss. It adds to `anchors` what the
    rows' gradient is computed from, for the loss at temperature `bank_tau`.

    Args:
        objective: the loss. The other arguments are those of `scoring.score`.
    Returns:
        the losses, [B]; and the largest probability, [B], of the softmax at the temperature tau / (largest exponent),
        in place of InfoNCE's.
    Raises:
        ValueError, UnusableError: as `scoring.score`.
    """
    scoring.check_shapes(q_BD, w_RD, positive_B)
    taus = [tau] if anchors is None or bank_tau is None or bank_tau == tau else [tau, bank_tau]
    return Score(*_ReweightedScore.apply(q_BD, w_RD, extra_BE, positive_B, first_row, size, taus, anchors, objective))


def score_of(objective: Objective | None) -> Callable[..., Score]:
    """The function that scores queries for this loss; None stands for InfoNCE and gives `scoring.score`."""
    return scoring.score if objective is None else functools.partial(score, objective=objective)
