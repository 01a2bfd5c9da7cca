"""The bank's fused passes on CUDA, with the names and signatures of caco/banks/kernels/fused.py: they launch the Triton
kernels (triton_kernels.py).

A table, caco/banks/kernels/cards.py, holds the block sizes for each GPU.

The kernels have been checked in Triton's interpreter on a CPU and compiled ahead of time for sm_80 and sm_90
(benchmarks/kernels.py). They have never run on a GPU. So the first use on a GPU compares them with the equations there
(`trial`), and if that fails PyTorch streams the bank.

The host never waits for the GPU here: where the work depends on what the GPU has found, as many programs are launched
as could be needed, and the others end at once.

Shapes: N and G queries, R rows, D width, P shares of the rows, T candidates, A all candidates of a query.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from caco import equations as eq
from caco.banks.kernels.cards import CHUNK, WIDE, WIDEST, Card, card
from caco.banks.kernels.triton_kernels import KERNELS

TOP = 4  # candidates for each key
LOG2_E = 1.4426950408889634
# Bound on the error of a cosine of unit vectors that were rounded to bfloat16: 2^-9 for each vector, and a little for
# the sum.
ROUNDING = 1.02 * 2**-8
TIE = 1e-12  # of float64 cosines, as in caco/banks/nearest.py
EXACT_ROWS = 16  # rows that a program of `exact` holds in float64, in registers
PART = 1024  # keys whose candidates are compared at a time


def constants(name: str, D: int, *, bf16: bool, on: Card) -> tuple[dict, dict]:
    """The constants that a kernel is compiled with, and the options that it is launched with."""
    D2 = max(16, triton.next_power_of_2(D))
    if name == "exact":
        return {"D": D, "D2": D2, "BLOCK_R": EXACT_ROWS, "TIE": TIE}, {"num_warps": 4, "num_stages": 1}
    block_n, block_r, warps, stages = on.blocks[name, bf16][D2 > WIDE]
    shape = {"D": D, "D2": D2, "BLOCK_N": block_n, "BLOCK_R": block_r, "C": D2 if bf16 else min(CHUNK, D2)}
    return shape | {"PRECISION": "ieee" if bf16 else "tf32x3"}, {"num_warps": warps, "num_stages": stages}


def _launch(
    name: str, q_ND: Tensor, w_RD: Tensor, outputs: Sequence[tuple[torch.dtype, tuple[int, ...]]],
    arguments: Sequence[Any], bf16: bool, *, before: Sequence[Tensor] = (), **flags: Any,
) -> list[Tensor]:  # fmt: skip
    """Launch a kernel over blocks of queries and shares of rows; returns its outputs for every share, [P, N, ...] each.

    Args:
        outputs: for each output its dtype and the dimensions after [P, N].
        arguments: the kernel's arguments that follow its sizes.
        before: the kernel's arguments that precede its sizes.
    """
    N, (R, D) = len(q_ND), w_RD.shape
    fixed, options = constants(name, D, bf16=bf16, on=_card(w_RD.device))
    blocks, row_blocks, processors = (
        triton.cdiv(N, fixed.get("BLOCK_N", 1)),
        triton.cdiv(R, fixed["BLOCK_R"]),
        _processors(w_RD.device),
    )
    # The number of shares that leaves the fewest multiprocessors idle in the last round.
    shares = min(
        range(1, min(row_blocks, max(4, processors // blocks)) + 1),
        key=lambda P: triton.cdiv(blocks * P, processors) / P,
    )
    rows = triton.cdiv(row_blocks, shares) * fixed["BLOCK_R"]
    shares = triton.cdiv(R, rows)
    made = [torch.empty(shares, N, *shape, dtype=dtype, device=w_RD.device) for dtype, shape in outputs]
    with _on(w_RD):
        KERNELS[name][blocks, shares](
            _factors(q_ND, bf16), w_RD, *made, *before, N, R, rows, *arguments, **fixed, **flags, **options
        )
    return made


def forward(
    q_GD: Tensor, w_RD: Tensor, taus: list[float], shifts: list[float], *, with_sums: bool, bf16: bool = False,
    kept: None = None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:  # fmt: skip
    """As `fused.forward`; `fused.numbers_kept` is 0 on a GPU, so nothing is kept."""
    z, z2, peak, sums = _launch(
        "forward", q_GD, w_RD,
        [(torch.float64, ()), (torch.float64, ()), (torch.float32, ()), (torch.float32,
        (w_RD.shape[1],) if with_sums else ())],
        [LOG2_E / taus[0], LOG2_E * shifts[0], LOG2_E / taus[-1], LOG2_E * shifts[-1]], bf16, SECOND=len(taus) > 1,
        SUMS=with_sums,
    )  # fmt: skip
    return [z.sum(0), z2.sum(0)][: len(taus)], peak.amax(0), sums.sum(0) if with_sums else None


def nearest_row(k_GD: Tensor, w_RD: Tensor) -> Tensor:
    """As `fused.nearest_row`.

    The bank is searched in bfloat16, whatever the run's precision is. Keys for which rounding may have hidden the
    nearest row are searched again in float32, and those that this does not settle in float64. Candidates are compared
    in float64.
    """
    G, (R, D) = len(k_GD), w_RD.shape
    all_G = torch.arange(G, device=k_GD.device)
    row_GT, bound_G = _candidates(k_GD, w_RD, torch.full_like(all_G[:1], G, dtype=torch.int32), bf16=True)
    best_G, row_G = _best(k_GD, w_RD, row_GT)
    unsure_G = bound_G + ROUNDING >= best_G - TIE
    # The unsure keys go first, so that they fill whole blocks; only the GPU knows how many they are.
    order_G, count = unsure_G.byte().argsort(descending=True, stable=True), unsure_G.sum(dtype=torch.int32)
    more_GT, bound_G = _candidates(k_GD[order_G], w_RD, count[None], bf16=False)
    more_GT = more_GT.masked_fill((all_G >= count)[:, None], -1)  # the other keys were not searched for
    place_G = order_G.argsort()
    best_G, row_G = _best(k_GD, w_RD, torch.cat([row_GT, more_GT[place_G]], 1))
    error = (D + 8) * torch.finfo(torch.float32).eps
    unsure_G &= bound_G[place_G] + error >= best_G - TIE
    cosine_PG, row_PG = _launch(
        "exact", k_GD, w_RD, [(torch.float64, ()), (torch.int32, ())], [], False, before=[unsure_G.int()]
    )
    tied_PG = cosine_PG >= cosine_PG.amax(0) - TIE
    exact_G = row_PG.long().masked_fill(~tied_PG, torch.iinfo(torch.int64).max).amin(0)
    return torch.where(unsure_G, exact_G, row_G).clamp(0, R - 1)  # all cosines of a key may be NaN: `score` refuses it


def _candidates(k_GD: Tensor, w_RD: Tensor, count: Tensor, *, bf16: bool) -> tuple[Tensor, Tensor]:
    """Rows with large cosines, [G, T] (-1 for no row), and a bound on the cosines of all other rows, [G].

    Args:
        count: int32 [1], how many keys, from the first on, are searched for.
    """
    value, row, bound = _launch(
        "nearest", k_GD, w_RD, [(torch.float32, (TOP,)), (torch.int32, (TOP,)), (torch.float32, ())], [], bf16,
        before=[count], T=TOP,
    )  # fmt: skip
    value_GA, order_GA = value.transpose(0, 1).flatten(1).sort(dim=1, descending=True, stable=True)
    row_GA = row.transpose(0, 1).flatten(1).gather(1, order_GA).long()
    bound_G = bound.amax(0)
    return row_GA[:, :TOP], bound_G if len(value) == 1 else torch.maximum(bound_G, value_GA[:, TOP])


def _best(k_GD: Tensor, w_RD: Tensor, row_GA: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine among each key's candidates, float64 [G], and its row, the first one among equals."""
    best, rows = [], []
    for k_gD, row_gA in zip(k_GD.split(PART), row_GA.split(PART), strict=True):
        w_gAD = w_RD[row_gA.clamp(0, len(w_RD) - 1)].double()
        cosine_gA = torch.linalg.vecdot(w_gAD, k_gD[:, None].double()) / w_gAD.norm(dim=2)
        cosine_gA = cosine_gA.masked_fill_(row_gA < 0, -torch.inf)
        best.append(cosine_gA.amax(1))
        tied_gA = (cosine_gA >= best[-1][:, None] - TIE) & (row_gA >= 0)
        rows.append(row_gA.masked_fill(~tied_gA, torch.iinfo(torch.int64).max).amin(1))
    return torch.cat(best), torch.cat(rows)


def update(
    w_RD: Tensor, velocity_RD: Tensor, q_ND: Tensor, positive_N: Tensor, log_sum_N: Tensor, weight_N: Tensor, *,
    tau: float, pull: float, push: float, lr: float, momentum: float, weight_decay: float, normalise: bool,
    bf16: bool = False, kept: tuple[()] = (),
) -> None:  # fmt: skip
    """As `fused.update`; nothing is kept on a GPU."""
    assert w_RD.is_contiguous() and velocity_RD.is_contiguous()
    R, D = w_RD.shape
    fixed, options = constants("update", D, bf16=bf16, on=_card(w_RD.device))
    with _on(w_RD):  # the numbers as floats: Triton would compile the kernel anew for integers
        KERNELS["update"][triton.cdiv(R, fixed["BLOCK_R"]),](
            _factors(q_ND, bf16), positive_N.clamp(-1, R).int(), log_sum_N * LOG2_E, weight_N.contiguous(), w_RD,
            velocity_RD,
            len(q_ND), R, 1 / tau, LOG2_E / tau, *map(float, (pull, push, lr, momentum, weight_decay)),
            NORMALISE=normalise,
            **fixed, **options,
        )  # fmt: skip


def _factors(q_ND: Tensor, bf16: bool) -> Tensor:
    return (q_ND.bfloat16() if bf16 else q_ND).contiguous()


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 5


@functools.cache
def _card(device: torch.device) -> Card:
    """The entry of the table of cards for this device."""
    if device.type != "cuda":
        return card((0, 0), 0)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
    return card((properties.major, properties.minor), shared / 1024)


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def trial(device: torch.device, D: int) -> None:
    """Run every kernel once for width D and compare it with the equations in float64.

    Raises:
        ValueError: D is larger than the kernels are made for.
        ArithmeticError: a kernel's result differs from the equations on this device.
        Exception: whatever Triton's compiler and the driver raise.
    """
    if D > WIDEST:
        raise ValueError(f"the kernels are made for widths up to {WIDEST}; got {D}")
    N, R, tau, bank_tau = 70, 300, 0.3, 0.2
    settings: dict[str, Any] = {"lr": 3.0, "momentum": 0.9}
    generator = torch.Generator().manual_seed(0)
    q, k, w, v = (F.normalize(torch.randn(rows, D, generator=generator), dim=1).to(device) for rows in (N, N, R, R))
    w[100:110], k[0] = w[7], w[7]  # equal rows, more of them than there are candidates
    w, v, positive, weight = (
        2 * w,
        v / 100,
        torch.arange(N, device=device) * 5 % 11,
        torch.full((N,), 1 / N, device=device),
    )
    m, exact_q = w.double() / 2, q.double()
    e = (exact_q @ m.T / tau).exp()
    second = (exact_q @ m.T / bank_tau).exp().sum(1)
    gradient = eq.bank_gradient(exact_q, w.double(), positive, bank_tau)
    moved = eq.bank_update(w.double(), v.double(), gradient, reading="paper", **settings)
    expected = [e.sum(1), second, (exact_q @ m.T).amax(1), e @ m, (k.double() @ m.T).amax(1), *moved]
    for bf16, tolerance in ((True, 0.1), (False, 1e-4)):
        z, peak, sums = forward(q, w, [tau, bank_tau], [0.0, 0.0], with_sums=True, bf16=bf16)
        assert sums is not None
        row = nearest_row(k, w)
        if row[0] != 7:
            raise ArithmeticError(f"the first of the equal rows is row 7; the kernels found row {int(row[0])}")
        nearest_m = m[row]
        new_w, new_v = w.clone(), v.clone()
        update(
            new_w, new_v, q, positive, second.log().float(), weight,
            tau=bank_tau, pull=1.0, push=1.0, weight_decay=0.0, normalise=True, bf16=bf16, **settings,
        )  # fmt: skip
        for got, exact in zip([*z, peak, sums, (k * nearest_m).sum(1), new_w, new_v], expected, strict=True):
            off = ((got - exact).norm() / exact.norm()).item()
            if not off < tolerance:
                raise ArithmeticError(
                    f"a kernel's result is off by {off:.1e} of its size in {'bfloat16' if bf16 else 'float32'}"
                )
