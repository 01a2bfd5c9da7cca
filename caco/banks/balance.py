"""A term of the queries' loss that measures how unevenly the queries use a bank's rows on average.

No G x K matrix is held: the rows are streamed in blocks, twice for the value and once more for the gradient. The rows
may be sharded over ranks: the queries are gathered, each rank goes over its own rows, and the sums are reduced.

Shapes: B this rank's queries, G all ranks' queries, S rows in one block, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from caco import distributed
from caco.banks import scoring
from caco.banks.rows import Rows


def mean_activation_divergence(q_BD: Tensor, rows: Rows, tau: float) -> Tensor:
    """KL divergence of the rows' mean probabilities, taken over all ranks' queries, from the uniform distribution over
    the K rows. A scalar from 0 to log K. A collective.

    Only the queries get a gradient; the rows count as constants.

    Source: `equations.mean_activation_divergence`.
    Args:
        q_BD: this rank's unit queries; every rank has equally many.
        rows: the bank's rows, of any norm but zero.
        tau: temperature of the probabilities.
    """
    with torch.autocast(q_BD.device.type, enabled=False):
        return _Divergence.apply(q_BD, rows.weight.detach(), rows.size, tau)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BD: Tensor, w_RD: Tensor, size: int, tau: float) -> Tensor:
        q_GD = distributed.gather(q_BD)
        sum_G = q_GD.new_zeros(len(q_GD))
        for e_GS, _ in _blocks(q_GD, w_RD, tau):
            sum_G += e_GS.sum(1)
        distributed.sum_(sum_G)
        mean_R = torch.cat([(e_GS / sum_G[:, None]).mean(0) for e_GS, _ in _blocks(q_GD, w_RD, tau)])
        divergence = distributed.sum_(torch.special.xlogy(mean_R, mean_R).sum()) + math.log(size)
        ctx.save_for_backward(q_GD, w_RD, sum_G, mean_R)
        ctx.tau, ctx.own = tau, len(q_BD)
        return divergence

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # d/dq_i = 1/(G tau) sum_j p_ij (l_j - sum_k p_ik l_k) m_j, with l_j the logarithm of row j's mean probability.
        q_GD, w_RD, sum_G, mean_R = ctx.saved_tensors
        first_GD, second_GD, mean_G = torch.zeros_like(q_GD), torch.zeros_like(q_GD), torch.zeros_like(sum_G)
        log_R = mean_R.clamp_min(torch.finfo(mean_R.dtype).tiny).log()
        start = 0
        for e_GS, m_SD in _blocks(q_GD, w_RD, ctx.tau):
            p_GS, log_S = e_GS / sum_G[:, None], log_R[start : start + len(m_SD)]
            first_GD += (p_GS * log_S) @ m_SD
            second_GD += p_GS @ m_SD
            mean_G += p_GS @ log_S
            start += len(m_SD)
        for x in (first_GD, second_GD, mean_G):
            distributed.sum_(x)
        gradient_GD = (first_GD - mean_G[:, None] * second_GD) / (len(q_GD) * ctx.tau)
        # The training averages the gradients of the ranks, and each rank's holds the share of its own queries alone:
        # hence the factor.
        return grad * distributed.world() * distributed.own(gradient_GD, ctx.own), None, None, None


def _blocks(q_GD: Tensor, w_RD: Tensor, tau: float) -> Any:
    """For one block of rows after the other: exp((cosine - 1) / tau), [G, S], and the unit rows, [S, D]. No logit of
    unit vectors exceeds 1 / tau, so no exponential exceeds 1.
    """
    for block in scoring.blocks(len(w_RD), len(q_GD)):
        m_SD = scoring.unit_rows(w_RD[block])[0]
        yield ((q_GD @ m_SD.T - 1) / tau).exp_(), m_SD
