"""Score queries against a bank without ever holding a B x K matrix: streamed forward, recomputed backward.

The bank's rows may be sharded over ranks. Queries (small) are gathered, each rank scores its own rows, and sums, maxima
and query gradients are reduced; nothing of size K x D travels. `caco/equations.py` is the oracle.

Shapes: B this rank's queries, G all ranks' queries, R this rank's rows, S rows in one block, D width, E extra columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from caco import distributed

BLOCK_ELEMENTS = 1 << 22  # of one G x S block: 16 MiB in float32, small enough to stay near the cache


class Score(NamedTuple):
    loss_B: Tensor  # -log p at the positive; its backward gives the gradients of queries, extra columns and rows
    max_probability_B: Tensor  # max_j p_ij over the bank's rows, of the mean in the paper's Figure 4; no gradient


def unit_rows(w_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and their norms: [S, D] of unit length, [S, 1]."""
    norm_R1 = w_RD.norm(dim=1, keepdim=True)
    return w_RD / norm_R1, norm_R1


def blocks(num_rows: int, num_queries: int) -> list[slice]:
    rows = max(1, min(num_rows, BLOCK_ELEMENTS // max(num_queries, 1)))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def most_probable_row(k_BD: Tensor, w_RD: Tensor, first_row: int) -> Tensor:
    """Index, over the whole bank, of the row with the largest cosine; ties to the lowest index.

    Source: Eq. 11, chosen by the key as in Figure 2.
    Args:
        k_BD: this rank's keys, unit norm, float32.
        w_RD: this rank's rows, any norm; the first of them is row `first_row` of the bank.
    Returns:
        int64 [B].
    """
    with torch.no_grad(), torch.autocast(k_BD.device.type, enabled=False):
        k_GD = distributed.gather(k_BD)
        best_G = k_GD.new_full((len(k_GD),), -torch.inf)
        row_G = torch.zeros(len(k_GD), dtype=torch.int64, device=k_GD.device)
        for block in blocks(len(w_RD), len(k_GD)):
            value_G, index_G = (k_GD @ unit_rows(w_RD[block])[0].T).max(dim=1)
            better_G = value_G > best_G
            best_G = torch.where(better_G, value_G, best_G)
            row_G = torch.where(better_G, index_G + (first_row + block.start), row_G)
        top_G = distributed.max_(best_G.clone())
        # A rank without the maximum bids -index of "beyond the bank", so the lowest index wins among equals.
        bid_G = torch.where(best_G == top_G, -row_G, torch.iinfo(torch.int64).min)
        return distributed.own(-distributed.max_(bid_G), len(k_BD))


class _StreamedScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BD, w_RD, extra_BE, positive_B, first_row, size, tau, bank_tau, pull, push):
        with torch.autocast(q_BD.device.type, enabled=False):
            q_GD, positive_G = distributed.gather(q_BD), distributed.gather(positive_B)
            local_G = positive_G - first_row
            here_G = (local_G >= 0) & (local_G < len(w_RD)) & (positive_G < size)
            peak_G = q_GD.new_full((len(q_GD),), -torch.inf)
            total_G = {t: torch.zeros_like(peak_G) for t in {tau, bank_tau}}
            for block in blocks(len(w_RD), len(q_GD)):
                cosine_GS = q_GD @ unit_rows(w_RD[block])[0].T
                new_G = torch.maximum(peak_G, cosine_GS.amax(1))
                for t, sum_G in total_G.items():
                    sum_G.mul_(((peak_G - new_G) / t).exp()).add_(((cosine_GS - new_G[:, None]) / t).exp_().sum(1))
                peak_G = new_G
            top_G = distributed.max_(peak_G.clone())
            log_sum_G = {
                t: top_G / t + distributed.sum_(sum_G * ((peak_G - top_G) / t).exp()).log()
                for t, sum_G in sorted(total_G.items())
            }
            m_GD = unit_rows(w_RD[torch.where(here_G, local_G, 0)])[0]
            positive_cosine_G = distributed.sum_(torch.where(here_G, (q_GD * m_GD).sum(1), 0.0))

            B = len(q_BD)
            top_B, positive_cosine_B = distributed.own(top_G, B), distributed.own(positive_cosine_G, B)
            log_sum_B = {t: distributed.own(value, B) for t, value in log_sum_G.items()}
            if extra_BE is not None:
                log_sum_B = {
                    t: torch.logaddexp(value, torch.logsumexp(extra_BE / t, 1)) for t, value in log_sum_B.items()
                }
                column_B = (positive_B - size).clamp(min=0)
                in_extra_B = positive_B >= size
                picked_B = extra_BE.gather(1, column_B[:, None])[:, 0]
                positive_cosine_B = torch.where(in_extra_B, picked_B, positive_cosine_B)

        ctx.save_for_backward(q_GD, w_RD, extra_BE, positive_B, positive_G, log_sum_B[tau], log_sum_B[bank_tau])
        ctx.settings = first_row, size, tau, bank_tau, pull, push
        max_probability_B = (top_B / tau - log_sum_B[tau]).exp()
        ctx.mark_non_differentiable(max_probability_B)
        return log_sum_B[tau] - positive_cosine_B / tau, max_probability_B

    @staticmethod
    def backward(ctx, grad_B, _):
        q_GD, w_RD, extra_BE, positive_B, positive_G, log_sum_B, bank_log_sum_B = ctx.saved_tensors
        first_row, size, tau, bank_tau, pull, push = ctx.settings
        B = len(grad_B)
        rows_need_gradient = ctx.needs_input_grad[1]

        with torch.autocast(grad_B.device.type, enabled=False):
            grad_G = distributed.gather(grad_B)
            log_sum_G, bank_log_sum_G = distributed.gather(log_sum_B), distributed.gather(bank_log_sum_B)
            local_G = positive_G - first_row
            here_G = (local_G >= 0) & (local_G < len(w_RD)) & (positive_G < size)
            grad_q_GD = torch.zeros_like(q_GD)
            grad_w_RD = torch.empty_like(w_RD) if rows_need_gradient else None
            for block in blocks(len(w_RD), len(q_GD)):
                m_SD, norm_S1 = unit_rows(w_RD[block])
                cosine_GS = q_GD @ m_SD.T
                p_GS = (cosine_GS / tau - log_sum_G[:, None]).exp_()
                grad_q_GD.addmm_(p_GS * (grad_G / tau)[:, None], m_SD)
                if not rows_need_gradient:
                    continue
                if bank_tau != tau:
                    p_GS = (cosine_GS / bank_tau - bank_log_sum_G[:, None]).exp_()
                inside_G = here_G & (local_G >= block.start) & (local_G < block.stop)
                chosen = inside_G.nonzero()[:, 0]
                at = local_G[chosen] - block.start
                # Eq. 10's weights: push * p everywhere, pull * (1 - p) at the positive.
                weight_GS = p_GS * push
                weight_GS[chosen, at] = pull * (1 - p_GS[chosen, at])
                toward_SD = weight_GS.mul_(grad_G[:, None]).T @ q_GD
                # sum_i w_ij (I - m m^T) q_i needs only the sum of the weighted queries: the projection is linear.
                toward_SD -= (toward_SD * m_SD).sum(1, keepdim=True) * m_SD
                # Each rank's loss is the mean over its own part of the batch, hence the division by the ranks.
                grad_w_RD[block] = toward_SD / (-bank_tau * distributed.world() * norm_S1)
            m_GD = unit_rows(w_RD[torch.where(here_G, local_G, 0)])[0]
            grad_q_GD -= torch.where(here_G, grad_G / tau, 0.0)[:, None] * m_GD
            grad_q_BD = distributed.own(distributed.sum_(grad_q_GD), B)

            grad_extra_BE = None
            if extra_BE is not None and ctx.needs_input_grad[2]:
                grad_extra_BE = (extra_BE / tau - log_sum_B[:, None]).exp_()
                in_extra = (positive_B >= size).nonzero()[:, 0]
                grad_extra_BE[in_extra, positive_B[in_extra] - size] -= 1
                grad_extra_BE *= (grad_B / tau)[:, None]
        return grad_q_BD, grad_w_RD, grad_extra_BE, None, None, None, None, None, None, None


def score(
    q_BD: Tensor,
    w_RD: Tensor,
    positive_B: Tensor,
    *,
    first_row: int,
    size: int,
    tau: float,
    bank_tau: float | None = None,
    pull: float = 0.0,
    push: float = 0.0,
    extra_BE: Tensor | None = None,
) -> Score:
    """Contrastive loss of every query over the bank and any extra columns (Eq. 3), with the bank's own gradient.

    Backward gives queries and extra columns the gradient of the loss, and rows that require a gradient the
    cooperative-adversarial one (Eqs. 6-10; `equations.bank_gradient`), at temperature `bank_tau`.

    Args:
        q_BD: unit queries of this rank, float32.
        w_RD: this rank's rows, any norm but zero, float32; the bank has `size` rows, `first_row` is where these begin.
        positive_B: int64; below `size` a row of the whole bank, `size + e` extra column e.
        extra_BE: cosines, not divided by tau, of columns that are no rows; -inf masks one out.
        pull, push: scales of the cooperative and the adversarial motion.
    Raises:
        ValueError: shapes that do not fit.
    """
    if q_BD.shape[1] != w_RD.shape[1]:
        raise ValueError(f"queries must be as wide as the bank's rows, {w_RD.shape[1]}; got {q_BD.shape[1]}")
    if positive_B.shape != q_BD.shape[:1]:
        raise ValueError(f"expected one positive for each of {len(q_BD)} queries; got shape {list(positive_B.shape)}")
    return Score(
        *_StreamedScore.apply(
            q_BD, w_RD, extra_BE, positive_B, first_row, size, tau, bank_tau or tau, float(pull), float(push)
        )
    )
