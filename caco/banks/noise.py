"""Losses that contrast a query with a few randomly drawn rows of a bank instead of all rows: noise-contrastive
estimation (InstDisc, PIRL, CMC), and a softmax over the drawn rows.

The rows may be sharded over ranks: the queries are gathered, each rank scores the drawn rows that it holds, and the
sums and the queries' gradients are reduced. Neither a drawn row nor its score is sent to another rank. The rows are
drawn and read for a part of the queries at a time.

Shapes: B this rank's queries, G all ranks' queries, R this rank's rows, M rows drawn for a query, C drawn rows that
this rank holds, b queries of one part, D width.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from caco import distributed
from caco.banks import splitmix

PART_ELEMENTS = 1 << 22  # numbers in the drawn rows of one part, b x M x D: 16 MiB in float32


class Contrast(NamedTuple):
    loss_B: Tensor  # its backward pass gives the queries' gradients
    probability_B: Tensor  # the loss's probability that the positive row is the query's own and not noise; no gradient


def noise_rows(stream: int, image_B: Tensor, count: int, size: int) -> Tensor:
    """For each image the indices of `count` rows out of `size`, drawn uniformly with replacement, int64 [B, count].

    Args:
        stream: 64 bits; with the image it determines the draws, see `splitmix.uniform`.
        image_B: int64, the images' indices.
    """
    return (splitmix.uniform(stream, image_B, count) * size).long()


class Draw(NamedTuple):
    """Which rows are drawn for the queries, and how they are scored.

    first_row: the index of this rank's first row in the whole bank. size: rows of the whole bank. tau: temperature.
    num_noise: rows drawn for a query. stream: what the draws depend on besides the image, see `noise_rows`.
    """

    first_row: int
    size: int
    tau: float
    num_noise: int
    stream: int


def contrast(
    q_BD: Tensor,
    w_RD: Tensor,
    image_B: Tensor,
    draw: Draw,
    *,
    form: Literal["nce", "softmax"],
    normaliser: float = 1.0,
    epsilon: float = 1e-7,
) -> Contrast:
    """The loss of each query against its image's row and the rows drawn for it, which are taken as they are stored. A
    collective.

    Let P_j = exp(q.w_j / tau) / normaliser, c = num_noise / size and i the query's image. The sums go over the rows
    drawn for the image, among which may be row i itself.
        "nce":     -log P_i / (P_i + c + epsilon) - sum_j log c / (P_j + c + epsilon)
        "softmax": -log P_i / (P_i + sum_j P_j)

    Args:
        q_BD: unit queries of this rank, float32 or float64.
        w_RD: this rank's rows.
        image_B: int64, the index of each query's image, which is also that of the image's row in the whole bank.
        draw: which rows are drawn.
        form: the loss.
        normaliser, epsilon: as in the formula; "softmax" does not use them.
    Source: scores and losses as in InstDisc's published code, lib/NCEAverage.py and lib/NCECriterion.py.
    """
    return Contrast(*_Contrast.apply(q_BD, w_RD, image_B, draw, form, normaliser, epsilon))


@torch.no_grad()
def mean_exponential(q_BD: Tensor, w_RD: Tensor, image_B: Tensor, draw: Draw) -> float:
    """The mean of exp(q.w_j / tau) over all ranks' queries, each with its own image's row and its drawn rows. Times
    `size` it estimates the normaliser Z. The arguments are those of `contrast`. A collective."""
    with torch.autocast(q_BD.device.type, enabled=False):
        q_GD, image_G = distributed.gather(q_BD), distributed.gather(image_B)
        own_GD = _rows_of(image_G, w_RD, draw.first_row)
        total = q_GD.new_zeros((), dtype=torch.float64)
        for part, w_bCD, there_bC in _drawn(image_G, w_RD, draw):
            e_bC = (torch.einsum("bcd,bd->bc", w_bCD, q_GD[part]) / draw.tau).exp()
            total += (e_bC * there_bC).sum(dtype=torch.float64)
        own_G = distributed.sum_((q_GD * own_GD).sum(1).double())
        total = distributed.sum_(total) + (own_G / draw.tau).exp().sum()
    return total.item() / (len(q_GD) * (draw.num_noise + 1))


def _rows_of(image_G: Tensor, w_RD: Tensor, first_row: int) -> Tensor:
    """Each image's row if this rank holds it, else zeros, [G, D]."""
    own_G = (image_G >= first_row) & (image_G < first_row + len(w_RD))
    return w_RD[(image_G - first_row).masked_fill(~own_G, 0)].masked_fill(~own_G[:, None], 0.0)


def _drawn(image_G: Tensor, w_RD: Tensor, draw: Draw) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For one part of the queries after the other: the slice of the queries, their drawn rows that this rank holds
    [b, C, D], and which of these places hold a drawn row, bool [b, C]."""
    rows = max(1, PART_ELEMENTS // (draw.num_noise * w_RD.shape[1]))
    for start in range(0, len(image_G), rows):
        part = slice(start, start + rows)
        local_bM = noise_rows(draw.stream, image_G[part], draw.num_noise, draw.size) - draw.first_row
        there_bM = (local_bM >= 0) & (local_bM < len(w_RD))
        if len(w_RD) < draw.size:  # leave out the rows of other ranks, which would be read and multiplied for nothing
            most = int(there_bM.sum(1).amax())  # the host waits for a GPU here
            order_bC = there_bM.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
            local_bM, there_bM = local_bM.gather(1, order_bC), there_bM.gather(1, order_bC)
        yield part, w_RD[local_bM.masked_fill(~there_bM, 0)], there_bM


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BD, w_RD, image_B, draw, form, normaliser, epsilon):
        with torch.autocast(q_BD.device.type, enabled=False):
            q_GD, image_G = distributed.gather(q_BD), distributed.gather(image_B)
            own_GD = _rows_of(image_G, w_RD, draw.first_row)
            own_G = distributed.sum_((q_GD * own_GD).sum(1).double()) / draw.tau
            shift: float | Tensor = 0.0
            if form == "softmax":  # float32 holds a sum of 10^11 terms that are e^60 each
                longest = distributed.max_(w_RD.norm(dim=1).amax())
                shift = (longest.double() / draw.tau - 60).clamp(min=0.0)
            c = draw.num_noise / draw.size
            total_G = torch.zeros_like(own_G)
            toward_GD = torch.zeros_like(q_GD)
            for part, w_bCD, there_bC in _drawn(image_G, w_RD, draw):
                logit_bC = torch.einsum("bcd,bd->bc", w_bCD, q_GD[part]) / draw.tau
                if form == "nce":
                    p_bC = logit_bC.exp() / normaliser
                    total_G[part] = (torch.log1p((p_bC + epsilon) / c) * there_bC).sum(1, dtype=torch.float64)
                    weight_bC = p_bC / (p_bC + c + epsilon) * there_bC
                else:
                    weight_bC = (logit_bC - shift).exp() * there_bC
                    total_G[part] = weight_bC.sum(1, dtype=torch.float64)
                toward_GD[part] = torch.einsum("bc,bcd->bd", weight_bC, w_bCD)
            total_G = distributed.sum_(total_G)
            if form == "nce":
                odds_G = (own_G.exp() / normaliser) / (c + epsilon)
                probability_G = odds_G / (1 + odds_G)
                loss_G = total_G - probability_G.log()
            else:
                own_e_G = (own_G - shift).exp()
                probability_G = own_e_G / (total_G + own_e_G)
                loss_G = -probability_G.log()
                toward_GD /= (total_G + own_e_G)[:, None].to(toward_GD.dtype)
            toward_GD += (probability_G - 1)[:, None].to(q_GD.dtype) * own_GD
            toward_BD = distributed.own(distributed.sum_(toward_GD), len(q_BD)) / draw.tau
        ctx.save_for_backward(toward_BD)
        loss_B, probability_B = (distributed.own(x_G, len(q_BD)).to(q_BD.dtype) for x_G in (loss_G, probability_G))
        ctx.mark_non_differentiable(probability_B)
        return loss_B, probability_B

    @staticmethod
    def backward(ctx, grad_B, _):
        (toward_BD,) = ctx.saved_tensors
        return toward_BD * grad_B[:, None], None, None, None, None, None, None
