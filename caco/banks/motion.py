"""How a bank's rows move along what queries have asked of them (caco/banks/scoring.py: Anchors), a block at a time.

On a CPU the pass is fused (caco/banks/kernels/fused.py) where that was built, on CUDA where Triton works; else it
streams in blocks of PyTorch. No kernel knows of positives that are rows and no negatives (`Anchors.pull_N`).

Shapes: N the queries of all terms of a step, R this rank's rows, S rows in one block, D width.
"""

import torch
from torch import Tensor

from caco.banks.kernels import fused
from caco.banks.scoring import Anchors, blocks, unit_rows


def row_gradient(w_SD: Tensor, first_row: int, anchors: list[Anchors], *, pull: float, push: float) -> Tensor:
    """The cooperative-adversarial gradient of some rows (Eqs. 6-10; `equations.bank_gradient`), [S, D].

    Args:
        w_SD: rows of any norm, consecutive; `first_row` of the whole bank is the first of them.
        anchors: one for each temperature; their gradients add up.
    """
    gradient_SD, *others = (_of_one_temperature(w_SD, first_row, part, pull=pull, push=push) for part in anchors)
    for other_SD in others:
        gradient_SD += other_SD
    return gradient_SD


def _of_one_temperature(w_SD: Tensor, first_row: int, anchors: Anchors, *, pull: float, push: float) -> Tensor:
    m_SD, norm_S1 = unit_rows(w_SD)
    p_NS = torch.addmm(anchors.log_sum_N[:, None], anchors.q_ND, m_SD.T, beta=-1, alpha=1 / anchors.tau).exp_()
    place_N = anchors.positive_N - first_row
    inside_N1 = ((place_N >= 0) & (place_N < len(w_SD)))[:, None]
    at_N1 = place_N.clamp(0, len(w_SD) - 1)[:, None]
    # Eq. 10's weights: push * p everywhere, pull * (1 - p) at the positive.
    at_positive_N1 = pull * (1 - p_NS.gather(1, at_N1) if anchors.pull_N is None else anchors.pull_N[:, None])
    if anchors.share_N is not None:
        p_NS *= anchors.share_N[:, None]
    if push != 1.0:
        p_NS *= push
    p_NS.scatter_(1, at_N1, torch.where(inside_N1, at_positive_N1, p_NS.gather(1, at_N1)))
    toward_SD = p_NS.T @ (anchors.q_ND * anchors.weight_N[:, None])
    # sum_i w_ij (I - m m^T) q_i needs only the sum of the weighted queries: the projection is linear.
    toward_SD.addcmul_(torch.linalg.vecdot(toward_SD, m_SD)[:, None], m_SD, value=-1)
    return toward_SD.div_(-anchors.tau * norm_S1)


def move(
    w_RD: Tensor, velocity_RD: Tensor, first_row: int, anchors: list[Anchors], *, pull: float, push: float, lr: float,
    momentum: float, weight_decay: float, normalise: bool,
) -> None:  # fmt: skip
    """One step of the rows' SGD, in place, a block at a time (`equations.bank_update`); no R x D gradient is held."""
    if all(part.pull_N is None and fused.supports(w_RD, velocity_RD, part.q_ND) for part in anchors):
        for number, part in enumerate(anchors):
            # A kernel adds the gradient of one temperature to the velocity; the rows move with the last one.
            first, last = number == 0, number == len(anchors) - 1
            fused.update(
                w_RD, velocity_RD, part.q_ND, part.positive_N - first_row, part.log_sum_N,
                part.weight_N if part.share_N is None else part.weight_N * part.share_N,
                tau=part.tau, pull=pull, push=push, lr=lr if last else 0.0, momentum=momentum if first else 1.0,
                weight_decay=weight_decay if first else 0.0, normalise=normalise and last, bf16=part.bf16,
            )  # fmt: skip
        return
    for block in blocks(len(w_RD), max(len(part.q_ND) for part in anchors)):
        w_SD, velocity_SD = w_RD[block], velocity_RD[block]
        gradient_SD = row_gradient(w_SD, first_row + block.start, anchors, pull=pull, push=push)
        velocity_SD.mul_(momentum).add_(gradient_SD)
        if weight_decay:
            velocity_SD.add_(w_SD, alpha=weight_decay)
        w_SD.sub_(velocity_SD, alpha=lr)
        if normalise:
            w_SD.div_(w_SD.norm(dim=1, keepdim=True))
