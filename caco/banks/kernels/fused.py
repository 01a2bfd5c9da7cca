"""The bank's fused CPU kernel (kernel.cpp), called through ctypes. Where it was not built, scoring.py, nearest.py
and motion.py in caco/banks stream over the bank in PyTorch.

The kernel uses the best instruction set of the processor, or the one that CACO_INSTRUCTIONS names
(caco/instructions.py). Its precision depends on the set:

On AMX tiles, loss and motion represent a number as the sum of two bfloat16 if `bf16` is False (errors of cosines up to
2^-14, mostly about 1e-5), and as one bfloat16 if `bf16` is True (errors of cosines up to 2^-7, mostly about 1e-3;
errors of exponentials up to 0.7 %, without bias). Sums are float32. The search for positives takes one bfloat16,
whatever `bf16` says, and two for the keys for which one leaves too many rows undecided.

Every other set computes loss and motion in float32. Its search for positives uses integers with a proven error bound
(integers.h): 16 bits on AVX2; 8 bits and then 16 bits on AVX-512, if the processor sums their products in one
instruction (AVX512_VNNI). Float32 then decides among the rows that the bound leaves undecided.

On CUDA, Triton kernels make the same passes (triton_passes.py) where they work and CACO_INSTRUCTIONS is not "torch".

Shapes: G queries, R rows, D width, N queries of all terms of a step, T candidates.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caco import instructions

SIGNATURES = {  # a letter for each argument: p pointer, n int64, f float, i int
    "caco_kept": "nnni",
    "caco_forward": "pnpnnffffpppppiii",
    "caco_nearest": "pnpnnpppii",
    "caco_update": "ppppnppnnffffffipppiii",
}


def library() -> ctypes.CDLL | None:
    """The compiled kernel. None where it is turned off, or where it was not built, which one message reports.

    Raises:
        ValueError: the kernel cannot use the instructions that CACO_INSTRUCTIONS names.
    """
    return None if instructions.LEVEL == "torch" else _loaded()


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    kernel = instructions.compiled(instructions.BANK)
    if kernel is None:
        print(
            "caco: the bank's fused kernel was not built here; PyTorch streams the bank instead, which is slower",
            file=sys.stderr,
        )
        return None
    wanted, used = instructions.LEVEL, instructions.used(instructions.BANK)
    # The compiled views give the same bits at every level, but the kernel's sums differ by rounding, so a lower level
    # must not stand in silently.
    if wanted is not None and used != wanted:
        raise ValueError(
            f"{instructions.VARIABLE}={wanted}: the bank's kernel can use at most {used} here. The compiler that built"
            " it knew no better instructions (AMX needs GCC 11), or the system does not let this process use AMX tiles"
        )
    kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
    for name, arguments in SIGNATURES.items():
        getattr(kernel, name).argtypes = [kinds[kind] for kind in arguments]
    kernel.caco_kept.restype = ctypes.c_int64
    return kernel


def supports(*tensors: Tensor) -> bool:
    """Whether a kernel can work on these tensors. No kernel can leave a row out of a query's sums, so
    caco/banks/reweighted.py does not come here when it has to do that.
    """
    if instructions.LEVEL == "torch" or any(x.device != tensors[0].device or x.dtype != torch.float32 for x in tensors):
        return False
    if tensors[0].is_cuda:
        return on_cuda(tensors[0].device, tensors[0].shape[1]) is not None
    return tensors[0].device.type == "cpu" and library() is not None


@functools.cache
def on_cuda(device: torch.device, width: int) -> ModuleType | None:
    """The Triton kernels, after a trial on this GPU for rows of this width. None where the trial fails, which one
    message reports.
    """
    try:
        from caco.banks.kernels import triton_passes

        triton_passes.trial(device, width)
    except Exception as error:  # of any type: there may be no Triton, no compiler, or an unknown or too small GPU
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        print(
            f"caco: the bank's Triton kernels cannot be used here ({why}); PyTorch streams the bank instead, which is"
            " slower",
            file=sys.stderr,
        )
        return None
    return triton_passes


def or_on_cuda(work: Callable) -> Callable:
    """Decorate a pass so that tensors on a GPU go to the function of the same name in triton_passes.py."""

    @functools.wraps(work)
    def chosen(x: Tensor, *arguments: Any, **options: Any) -> Any:
        if x.is_cuda:
            return getattr(on_cuda(x.device, x.shape[1]), work.__name__)(x, *arguments, **options)
        return work(x, *arguments, **options)

    return chosen


class Kept(NamedTuple):
    """What a forward pass kept for `update`, with the kernel's own layout: exp(q.m_j / tau - shift) for each query and
    row.
    """

    exponentials: Tensor
    num_queries: int
    shift: float


def numbers_kept(q_GD: Tensor, w_RD: Tensor) -> int:
    """How many numbers `forward` keeps for these queries and rows, and 0 where it can keep none: without a kernel, and
    on a GPU and on AMX tiles, which compute a product about as fast as memory could return its result.
    """
    kernel = library() if w_RD.device.type == "cpu" and supports(q_GD, w_RD) else None
    return kernel.caco_kept(len(q_GD), *w_RD.shape, instructions.number()) if kernel is not None else 0


@or_on_cuda
def forward(
    q_GD: Tensor,
    w_RD: Tensor,
    taus: list[float],
    shifts: list[float],
    *,
    with_sums: bool,
    bf16: bool,
    kept: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """For each tau the sum over the rows of exp(q.m_j / tau - shift), float64 [G]; each query's largest cosine, [G];
    and, with `with_sums`, for the first tau the sum of exp(q.m_j / tau - shift) m_j, [G, D].

    Args:
        q_GD: unit queries.
        w_RD: rows of any norm but zero; m_j is row j scaled to norm 1.
        taus: one or two temperatures.
        shifts: one number for each temperature.
        bf16: whether factors may be rounded to bfloat16.
        kept: takes the exponentials at the last temperature; it has as many numbers as `numbers_kept` says.
    """
    G, D = q_GD.shape
    z = [torch.empty(G, dtype=torch.float64) for _ in taus]
    peak_G = torch.empty(G)
    sums_GD = torch.empty(G, D) if with_sums else None
    second = len(taus) > 1
    _call(
        "caco_forward",
        q_GD.contiguous(), G, w_RD, len(w_RD), D, 1 / taus[0], shifts[0], 1 / taus[-1], shifts[-1],
        z[0], z[1] if second else None, peak_G, sums_GD, kept, bf16,
    )  # fmt: skip
    return z, peak_G, sums_GD


@or_on_cuda
def nearest_row(k_GD: Tensor, w_RD: Tensor) -> Tensor | None:
    """Each key's nearest row, int64 [G], compared in float64; the first row among equals. A GPU finds it without the
    host's help. On a CPU this returns None: `nearest` then gives candidates, and the caller decides between them.

    Args:
        k_GD: unit keys.
        w_RD: rows of any norm but zero.
    """
    return None


def nearest(k_GD: Tensor, w_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates for the nearest row of each key: their cosines and their rows, [G, T] each, the largest cosine first
    and equal ones by row; and for each key a bound on the errors of these cosines, [G]. Rows that cannot be the nearest
    may be left out, in which case a row is -1."""
    kernel = library()
    assert kernel is not None, "see `supports`"
    shape = len(k_GD), kernel.caco_top(instructions.number())
    value_GT, row_GT, error_G = torch.empty(shape), torch.empty(shape, dtype=torch.int64), torch.empty(len(k_GD))
    _call("caco_nearest", k_GD.contiguous(), len(k_GD), w_RD, len(w_RD), w_RD.shape[1], value_GT, row_GT, error_G)
    return value_GT, row_GT, error_G


@or_on_cuda
def update(
    w_RD: Tensor, velocity_RD: Tensor, q_ND: Tensor, positive_N: Tensor, log_sum_N: Tensor, weight_N: Tensor, *,
    tau: float, pull: float, push: float, lr: float, momentum: float, weight_decay: float, normalise: bool, bf16: bool,
    kept: Sequence[Kept] = (),
) -> None:  # fmt: skip
    """One SGD step of rows and velocities, in place: gradient, velocity and rows of a block are computed in one visit.

    The arguments are as in `caco.banks.motion.move`; the queries' tensors are those of `caco.banks.scoring.Anchors`,
    with positives counted from the first of these rows, where a number that is none of them means no row. `kept` is
    empty, or what the forward passes of all these queries kept, in order; then the probabilities are read from there.
    """
    found: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = None, None, None
    if kept:
        at, queries = (
            torch.tensor(x) for x in ([x.exponentials.data_ptr() for x in kept], [x.num_queries for x in kept])
        )
        shift_N = torch.cat([torch.full((x.num_queries,), x.shift, dtype=torch.float64) for x in kept])
        found = at, queries, (shift_N - log_sum_N).exp().float()
    _call(
        "caco_update",
        q_ND.contiguous(), positive_N.contiguous(), log_sum_N.contiguous(), weight_N.contiguous(), len(q_ND),
        w_RD, velocity_RD, len(w_RD), w_RD.shape[1], 1 / tau, pull, push, lr, momentum, weight_decay,
        normalise, *found, bf16,
    )  # fmt: skip


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    assert all(x.is_contiguous() for x in arguments if isinstance(x, Tensor))
    passed = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    if getattr(library(), name)(*passed, torch.get_num_threads(), instructions.number()):
        raise MemoryError(f"the bank's kernel found no memory for its blocks ({name})")
