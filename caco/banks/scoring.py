"""Score queries against a bank without ever holding a B x K matrix. One streamed pass over the rows gives the loss and
the queries' gradient; a second pass, in the bank's update (caco/banks/motion.py), gives the rows' gradient.

The bank's rows may be sharded over ranks. The queries, which are small, are gathered; each rank scores its own rows;
sums, maxima and the queries' gradients are reduced. Nothing of size K x D travels. `caco/equations.py` is the oracle.
On a CPU a fused kernel makes the passes where it was built (caco/banks/kernels/fused.py), on CUDA a Triton kernel where
Triton works; elsewhere they stream in blocks of PyTorch.

The cosine of unit vectors is at most 1, so a logit is at most 1 / tau. Therefore a fixed shift of the logits takes the
place of the running maximum of an online softmax.

Shapes: B this rank's queries, G all ranks' queries, R this rank's rows, S rows in one block, D width, E extra columns,
N the queries of all terms of a step.
"""

import functools
import sys
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from caco import devices, distributed
from caco.banks.kernels import fused
from caco.banks.unusable import held_to

BLOCK_ELEMENTS = 1 << 20  # numbers in one G x S block: 4 MiB in float32, so that it stays in the cache
# The exponents used in float32: a sum of 10^11 terms of e^60 is still finite, and e^-87 is not yet zero.
HIGHEST, LOWEST = 60.0, -87.0


class Score(NamedTuple):
    loss_B: Tensor  # -log p at the positive; its backward pass gives the gradients of queries and extra columns
    max_probability_B: Tensor  # max_j p_ij over the bank's rows; the paper's Figure 4 shows its mean; no gradient


class Anchors(NamedTuple):
    """The queries that pull and push the rows, and with which weights. The backward pass notes them, and the bank's
    update (caco/banks/motion.py) computes the rows' gradient from them.

    A loss other than InfoNCE (caco/banks/reweighted.py) notes one such entry for each of its exponents t, with tau / t
    as the temperature.
    """

    q_ND: Tensor
    positive_N: Tensor  # int64, the positive's index over the whole bank; an index beyond it is no row
    log_sum_N: Tensor  # log sum_j exp(q.m_j / tau) at the bank's temperature, extra columns included
    weight_N: Tensor  # of each query's loss in the mean over the batch
    tau: float
    bf16: bool  # whether factors may be rounded to bfloat16: see `low_precision`
    share_N: Tensor | None = None  # a factor on the query's pushes, of any sign; None: 1
    # Weight of the positive's pull where its row is not a negative; None: 1 - p, for a row that is.
    pull_N: Tensor | None = None
    kept: tuple[fused.Kept, ...] = ()  # the queries' exponentials, in order; empty: they are computed again

    @classmethod
    def joined(cls, several: list["Anchors"]) -> list["Anchors"]:
        """The entries of all terms and micro-batches of a step, joined into one for each temperature."""
        assert len({anchors.bf16 for anchors in several}) == 1
        return [
            cls._of_one_temperature([anchors for anchors in several if anchors.tau == tau])
            for tau in dict.fromkeys(anchors.tau for anchors in several)
        ]

    @classmethod
    def _of_one_temperature(cls, several: list["Anchors"]) -> "Anchors":
        if len(several) == 1:
            return several[0]
        q, positive, log_sum, weight = (
            torch.cat(parts) for parts in zip(*(anchors[:4] for anchors in several), strict=True)
        )
        shares = [anchors.share_N for anchors in several if anchors.share_N is not None]
        pulls = [anchors.pull_N for anchors in several if anchors.pull_N is not None]
        assert len(shares) in (0, len(several)) and len(pulls) in (0, len(several)), (
            "a step has one loss, and one kind of positives"
        )
        share, pull = (torch.cat(parts) if parts else None for parts in (shares, pulls))
        assert len({bool(anchors.kept) for anchors in several}) == 1, (
            "a bank keeps the exponentials of all terms or none"
        )
        kept = tuple(one for anchors in several for one in anchors.kept)
        return cls(q, positive, log_sum, weight, several[0].tau, several[0].bf16, share, pull, kept)


def low_precision(device: torch.device) -> bool:
    """Whether products may round their factors to bfloat16: whether bfloat16 autocast is on, which governs PyTorch's
    own products too.
    """
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16


def unit_rows(w_RD: Tensor) -> tuple[Tensor, Tensor]:
    """The rows scaled to norm 1, [R, D], and their norms, [R, 1]."""
    norm_R1 = w_RD.norm(dim=1, keepdim=True)
    return w_RD / norm_R1, norm_R1


def rows_scored(w_SD: Tensor, *, as_stored: bool) -> Tensor:
    """The rows that queries are multiplied with: scaled to norm 1, or as they are stored."""
    return w_SD if as_stored else unit_rows(w_SD)[0]


def blocks(num_rows: int, num_queries: int) -> list[slice]:
    rows = max(1, min(num_rows, BLOCK_ELEMENTS // max(num_queries, 1)))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _shifts(
    q_GD: Tensor, w_RD: Tensor, taus: list[float], longest: float | Tensor, *, as_stored: bool
) -> Sequence[float | Tensor]:
    """For each temperature what is subtracted from the logits so that their exponentials can be summed: one number, or
    one for each query, [G].

    `longest` is the largest norm of a row, so logits lie between -longest / tau and longest / tau. If float32 can hold
    the exponentials of that whole range, one number serves. At lower temperatures, or if the host does not know the
    largest norm (a Tensor), the largest product of each query is found first, in a pass of its own.
    """
    known = isinstance(longest, float)
    if known and (q_GD.dtype == torch.float64 or 2 * longest / min(taus) <= HIGHEST - LOWEST):
        return [max(0.0, longest / tau - HIGHEST) for tau in taus]
    peak_G = q_GD.new_full((len(q_GD),), -torch.inf)
    for block in blocks(len(w_RD), len(q_GD)):
        peak_G = torch.maximum(peak_G, (q_GD @ rows_scored(w_RD[block], as_stored=as_stored).T).amax(1))
    peak_G = distributed.max_(peak_G)
    return [peak_G / tau for tau in taus]


def _sums(
    q_GD: Tensor, w_RD: Tensor, taus: list[float], shifts: Sequence[float | Tensor], *, with_sums: bool, bf16: bool,
    as_stored: bool, kept: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:  # fmt: skip
    """As `fused.forward`; where no kernel can be used, in blocks of PyTorch."""
    if fused.supports(q_GD, w_RD) and not isinstance(shifts[0], Tensor) and not as_stored:
        return fused.forward(q_GD, w_RD, taus, shifts, with_sums=with_sums, bf16=bf16, kept=kept)
    z = [torch.zeros(len(q_GD), dtype=torch.float64, device=q_GD.device) for _ in taus]
    peak_G = q_GD.new_full((len(q_GD),), -torch.inf)
    sums_GD = torch.zeros_like(q_GD) if with_sums else None
    scaled_GD = q_GD / taus[-1]  # the queries are few: dividing each block's logits instead would take time
    for block in blocks(len(w_RD), len(q_GD)):
        m_SD = rows_scored(w_RD[block], as_stored=as_stored)
        logit_GS = scaled_GD @ m_SD.T
        peak_G = torch.maximum(peak_G, logit_GS.amax(1))
        for number, (tau, shift) in enumerate(zip(taus, shifts, strict=True)):
            e_GS = logit_GS if number == len(taus) - 1 else logit_GS * (taus[-1] / tau)
            if isinstance(shift, Tensor):
                e_GS -= shift[:, None]
            elif shift:
                e_GS -= shift
            z[number] += e_GS.exp_().sum(1)
            if number == 0 and sums_GD is not None:
                sums_GD.addmm_(e_GS, m_SD)
    return z, peak_G * taus[-1], sums_GD


class Sums(NamedTuple):
    """Sums over this rank's rows j of the exponentials exp(q.m_j / tau - shift)."""

    shifts: Sequence[float | Tensor]  # for each tau one number, or one for each query
    z: list[Tensor]  # for each tau the sum of the exponentials, float64 [G]
    peak_G: Tensor  # each query's largest cosine
    sums_GD: Tensor | None  # for the first tau the sum of the unit rows, each weighted by its exponential


def sums_over_rows(q_GD: Tensor, w_RD: Tensor, taus: list[float], *, with_sums: bool, bf16: bool) -> Sums:
    """The `Sums` of unit queries over this rank's rows at the given temperatures. No collective, except where the
    temperatures are so low that the largest cosine over all ranks is needed.
    """
    shifts = _shifts(q_GD, w_RD, taus, 1.0, as_stored=False)
    return Sums(shifts, *_sums(q_GD, w_RD, taus, shifts, with_sums=with_sums, bf16=bf16, as_stored=False))


class Room:
    """Memory for the exponentials that the scoring pass keeps for the rows' update. It is used again in the next step:
    filling memory that is new to the process takes longer than the product that keeping saves.
    """

    def __init__(self) -> None:
        self.free: list[Tensor] = []

    def for_sums(self, q_GD: Tensor, w_RD: Tensor) -> Tensor | None:
        """Room for the exponentials of these queries and rows, which is free again as soon as nothing refers to it.
        None where they cannot be kept, which one message reports.
        """
        numbers = fused.numbers_kept(q_GD, w_RD)
        if not numbers:
            _say_that_nothing_is_kept()
            return None
        place = next((place for place, whole in enumerate(self.free) if len(whole) >= numbers), None)
        whole = torch.empty(numbers) if place is None else self.free.pop(place)
        taken = whole[:numbers]
        weakref.finalize(taken, self.free.append, whole).atexit = False
        return taken


@functools.cache
def _say_that_nothing_is_kept() -> None:
    if distributed.is_main():
        print(
            "caco: bank.keep_probabilities has no effect here; only the bank's compiled kernel keeps probabilities, on"
            " a CPU without AMX tiles",
            file=sys.stderr,
        )


class _StreamedScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BD, w_RD, extra_BE, positive_B, first_row, size, taus, anchors, as_stored, room):
        tau, B, bf16 = taus[0], len(q_BD), low_precision(q_BD.device)
        with torch.autocast(q_BD.device.type, enabled=False):
            q_GD, positive_G = distributed.gather(q_BD), distributed.gather(positive_B)
            local_G = positive_G - first_row
            own_shard_G = (local_G >= 0) & (local_G < len(w_RD)) & (positive_G < size)
            longest: float | Tensor = distributed.max_(w_RD.norm(dim=1).amax()) if as_stored else 1.0
            if isinstance(longest, Tensor) and not devices.runs_ahead(q_BD.device):
                longest = longest.item()
            shifts = _shifts(q_GD, w_RD, taus, longest, as_stored=as_stored)
            kept = None if room is None or isinstance(shifts[-1], Tensor) else room.for_sums(q_GD, w_RD)
            z, peak_G, sums_GD = _sums(
                q_GD, w_RD, taus, shifts, with_sums=ctx.needs_input_grad[0], bf16=bf16, as_stored=as_stored, kept=kept
            )
            top_G = distributed.max_(peak_G)
            m_GD = rows_scored(w_RD[local_G.masked_fill(~own_shard_G, 0)], as_stored=as_stored)
            m_GD = m_GD.masked_fill(~own_shard_G[:, None], 0.0)
            *z, positive_cosine_G = distributed.sum_(torch.stack([*z, (q_GD * m_GD).sum(1).double()]))
            usable = torch.isfinite(torch.stack(z)).all() & (top_G < 1.01 * longest).all()  # the same on every rank
            z = held_to(usable, z, q_GD, w_RD, first_row)
            log_sum_G = [(x.log() + shift).to(q_GD.dtype) for x, shift in zip(z, shifts, strict=True)]
            log_sum_B = [distributed.own(x, B) for x in log_sum_G]
            positive_cosine_B = distributed.own(positive_cosine_G, B).to(q_BD.dtype)
            if extra_BE is not None:
                log_sum_B = [
                    torch.logaddexp(x, torch.logsumexp(extra_BE / t, 1)) for x, t in zip(log_sum_B, taus, strict=True)
                ]
                column_B = (positive_B - size).clamp(min=0)
                picked_B = extra_BE.gather(1, column_B[:, None])[:, 0]
                positive_cosine_B = torch.where(positive_B >= size, picked_B, positive_cosine_B)
                log_sum_G = [distributed.gather(x) for x in log_sum_B]
            toward_BD = None
            if sums_GD is not None:
                # sum_j p_ij m_j - m_positive. The query's gradient is this, times the incoming gradient, over tau.
                shift = shifts[0][:, None] if isinstance(shifts[0], Tensor) else shifts[0]
                toward_GD = sums_GD.mul_((shift - log_sum_G[0][:, None]).exp()).sub_(m_GD)
                toward_BD = distributed.own(distributed.sum_(toward_GD), B)

        ctx.save_for_backward(extra_BE, positive_B, log_sum_B[0], toward_BD)
        ctx.asking = (anchors, q_GD, positive_G, log_sum_G[-1])
        ctx.kept = () if kept is None else (fused.Kept(kept, len(q_GD), float(shifts[-1])),)
        ctx.settings = size, taus, bf16
        max_probability_B = (distributed.own(top_G, B) / tau - log_sum_B[0]).exp()
        ctx.mark_non_differentiable(max_probability_B)
        return log_sum_B[0] - positive_cosine_B / tau, max_probability_B

    @staticmethod
    def backward(ctx, grad_B, _):
        extra_BE, positive_B, log_sum_B, toward_BD = ctx.saved_tensors
        size, taus, bf16 = ctx.settings
        tau = taus[0]
        anchors, q_GD, positive_G, log_sum_G = ctx.asking
        with torch.autocast(grad_B.device.type, enabled=False):
            if anchors is not None:
                # Each rank's loss is the mean over its own part of the batch, hence the division by the world size.
                weight_G = distributed.gather(grad_B) / distributed.world()
                anchors.append(Anchors(q_GD, positive_G, log_sum_G, weight_G, taus[-1], bf16, kept=ctx.kept))
            grad_q_BD = None if toward_BD is None else toward_BD * (grad_B / tau)[:, None]
            grad_extra_BE = None
            if extra_BE is not None and ctx.needs_input_grad[2]:
                grad_extra_BE = (extra_BE / tau - log_sum_B[:, None]).exp_()
                in_extra_B = (positive_B >= size).to(grad_extra_BE.dtype)
                grad_extra_BE.scatter_add_(1, (positive_B - size).clamp(min=0)[:, None], -in_extra_B[:, None])
                grad_extra_BE *= (grad_B / tau)[:, None]
        return grad_q_BD, None, grad_extra_BE, None, None, None, None, None, None, None


def check_shapes(q_BD: Tensor, w_RD: Tensor, positive_B: Tensor) -> None:
    if q_BD.shape[1] != w_RD.shape[1]:
        raise ValueError(f"queries must be as wide as the bank's rows, {w_RD.shape[1]}; got {q_BD.shape[1]}")
    if positive_B.shape != q_BD.shape[:1]:
        raise ValueError(f"expected one positive for each of {len(q_BD)} queries; got shape {list(positive_B.shape)}")


def score(
    q_BD: Tensor,
    w_RD: Tensor,
    positive_B: Tensor,
    *,
    first_row: int,
    size: int,
    tau: float,
    bank_tau: float | None = None,
    extra_BE: Tensor | None = None,
    anchors: list[Anchors] | None = None,
    as_stored: bool = False,
    room: Room | None = None,
) -> Score:
    """The contrastive loss -log p of every query over the bank and any extra columns (Eq. 3). A collective.

    The backward pass gives the queries and the extra columns the gradient of the loss. It adds to `anchors` what the
    rows' gradient at temperature `bank_tau` is computed from (caco/banks/motion.py).

    Args:
        q_BD: unit queries of this rank, float32; every rank has equally many.
        w_RD: this rank's rows, float32, of any norm but zero. They must not change before `anchors` is used.
        positive_B: int64, each query's positive: a value below `size` is a row of the whole bank, `size + e` is extra
            column e.
        first_row: the index of this rank's first row in the whole bank.
        size: rows of the whole bank.
        tau: temperature of the queries' loss.
        bank_tau: temperature of the rows' gradient; None: tau.
        extra_BE: cosines, not divided by tau, of columns that are no rows; -inf masks one out.
        anchors: the list to which the backward pass adds; None where the rows do not learn.
        as_stored: whether the rows are taken with their norms instead of being normalised (InstDisc, until all its rows
            have been written). Such rows do not learn.
        room: where the exponentials are kept for the rows' update, if the kernel can do that; None: they are computed
            again.
    Returns:
        the losses, [B], and each query's largest probability, [B].
    Raises:
        ValueError: the shapes do not fit.
        UnusableError: queries that are not finite unit vectors, or rows without a direction.
    """
    check_shapes(q_BD, w_RD, positive_B)
    taus = [tau] if anchors is None or bank_tau is None or bank_tau == tau else [tau, bank_tau]
    return Score(
        *_StreamedScore.apply(q_BD, w_RD, extra_BE, positive_B, first_row, size, taus, anchors, as_stored, room)
    )
