"""The motion of a bank's rows, block by block. The queries noted in the backward pass (`Anchors` of
caco/banks/scoring.py) determine the rows' gradient.

On a CPU a fused kernel makes the pass where it was built (caco/banks/kernels/fused.py), on CUDA a Triton kernel where
Triton works; elsewhere the pass streams in blocks of PyTorch. No kernel can treat positives that are rows but not
negatives (`Anchors.pull_N`), so these too go through PyTorch.

Shapes: N the queries of all terms of a step, R this rank's rows, S rows in one block, D width.
"""

import torch
from torch import Tensor

from caco.banks.kernels import fused
from caco.banks.scoring import Anchors, blocks, unit_rows


def row_gradient(w_SD: Tensor, first_row: int, anchors: list[Anchors], *, pull: float, push: float) -> Tensor:
    """The cooperative-adversarial gradient of consecutive rows, [S, D], which their SGD descends.

    Source: arXiv 2203.14370, Eqs. 6-10; `equations.bank_gradient`.
    Args:
        w_SD: consecutive rows of any norm but zero.
        first_row: the index of the first of these rows in the whole bank.
        anchors: the queries of the step, one entry for each temperature; their gradients add up.
        pull: scale of the positives' motion.
        push: scale of the negatives' motion.
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
    """One step of the rows' SGD (`equations.bank_update`). It changes rows and velocities in place, block by block, so
    no R x D gradient is held.

    Args:
        w_RD: this rank's rows, any norm but zero.
        velocity_RD: the rows' velocities.
        first_row: the index of this rank's first row in the whole bank.
        anchors: the queries of the step, one entry for each temperature.
        pull, push: scales of the positives' and the negatives' motion.
        lr, momentum, weight_decay: of the rows' SGD.
        normalise: whether each row is scaled to norm 1 after the step.
    """
    if all(part.pull_N is None and fused.supports(w_RD, velocity_RD, part.q_ND) for part in anchors):
        for number, part in enumerate(anchors):
            # Each call adds the gradient of one temperature to the velocities. Momentum and weight decay belong to the
            # first call, the motion of the rows to the last.
            first, last = number == 0, number == len(anchors) - 1
            fused.update(
                w_RD, velocity_RD, part.q_ND, part.positive_N - first_row, part.log_sum_N,
                part.weight_N if part.share_N is None else part.weight_N * part.share_N,
                tau=part.tau, pull=pull, push=push, lr=lr if last else 0.0, momentum=momentum if first else 1.0,
                weight_decay=weight_decay if first else 0.0, normalise=normalise and last, bf16=part.bf16,
                kept=part.kept,
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
