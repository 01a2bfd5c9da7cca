"""The bank's fused CPU kernel (kernel.cpp), through ctypes. Where it was not built, caco/banks/scoring.py streams.

It uses the best instruction set of the processor, or the one that CACO_INSTRUCTIONS asks for (caco/instructions.py). On
AMX tiles, for loss and motion, a vector is the sum of two bfloat16 where `bf16` is False (cosines to 2^-14, mostly to
1e-5), and one bfloat16 where `bf16` is True (cosines to 2^-7, mostly to 1e-3; exponentials to 0.7 %, without bias);
sums are float32. Positives are looked for with one, whatever `bf16` says, and with two where one leaves too many rows
in question. Every other set is float32 throughout, but for the search: AVX2 looks for positives in 16 bits, AVX-512 in
8 and then 16 bits where the processor adds up their products in one instruction (AVX512_VNNI), with a proven bound
(integers.h), and float32 for the rows in question.

On CUDA the same passes are Triton's (triton_kernels.py), where they work and CACO_INSTRUCTIONS is not torch.

Shapes: G queries, R rows, D width, N queries of all terms of a step, T candidates.
"""

import ctypes
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from caco import instructions

SIGNATURES = {  # pointer, int64, float, int
    "caco_forward": "pnpnnffffppppiii",
    "caco_nearest": "pnpnnpppii",
    "caco_update": "ppppnppnnffffffiiii",
}


def library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it is turned off or, said once, was not built.

    Raises:
        ValueError: it has not the instructions that CACO_INSTRUCTIONS asks for.
    """
    return None if instructions.LEVEL == "torch" else _loaded()


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    kernel = instructions.compiled(instructions.BANK)
    if kernel is None:
        print(
            "caco: the bank's fused kernel was not built here; PyTorch streams the bank instead, slower",
            file=sys.stderr,
        )
        return None
    wanted, used = instructions.LEVEL, instructions.used(instructions.BANK)
    if wanted is not None and used != wanted:  # the views make the same bits at any level, the kernel does not
        raise ValueError(
            f"{instructions.VARIABLE}={wanted}: the bank's kernel has no more than {used} here. The compiler that built"
            " it knew no more (AMX needs GCC 11), or the system keeps AMX tiles from this process"
        )
    kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
    for name, arguments in SIGNATURES.items():
        getattr(kernel, name).argtypes = [kinds[kind] for kind in arguments]
    return kernel


def supports(*tensors: Tensor) -> bool:
    """Whether a kernel takes these. None leaves a row out of a query's sums: what has to (caco/banks/reweighted.py)
    does not ask.
    """
    if instructions.LEVEL == "torch" or any(x.device != tensors[0].device or x.dtype != torch.float32 for x in tensors):
        return False
    if tensors[0].is_cuda:
        return on_cuda(tensors[0].device, tensors[0].shape[1]) is not None
    return tensors[0].device.type == "cpu" and library() is not None


@functools.cache
def on_cuda(device: torch.device, width: int) -> ModuleType | None:
    """The Triton kernels, tried on this card for rows of this width, or None, said once."""
    try:
        from caco.banks.kernels import triton_kernels

        triton_kernels.trial(device, width)
    except Exception as error:  # of any kind: no Triton, no compiler, a card that it does not know or that is too small
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        print(
            f"caco: the bank's Triton kernels do not serve here ({why}); PyTorch streams the bank instead, slower",
            file=sys.stderr,
        )
        return None
    return triton_kernels


def or_on_cuda(work: Callable) -> Callable:
    """The pass of the same name in triton_kernels.py, for tensors that lie on a card."""

    @functools.wraps(work)
    def chosen(x: Tensor, *arguments: Any, **options: Any) -> Any:
        if x.is_cuda:
            return getattr(on_cuda(x.device, x.shape[1]), work.__name__)(x, *arguments, **options)
        return work(x, *arguments, **options)

    return chosen


@or_on_cuda
def forward(
    q_GD: Tensor, w_RD: Tensor, taus: list[float], shifts: list[float], *, with_sums: bool, bf16: bool
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """For each tau sum_j exp(q.m_j / tau - shift), float64 [G]; the largest cosine [G]; and, for the first tau, the sum
    of exp(...) m_j, [G, D]."""
    G, D = q_GD.shape
    z = [torch.empty(G, dtype=torch.float64) for _ in taus]
    peak_G = torch.empty(G)
    sums_GD = torch.empty(G, D) if with_sums else None
    second = len(taus) > 1
    _call(
        "caco_forward",
        q_GD.contiguous(), G, w_RD, len(w_RD), D, 1 / taus[0], shifts[0], 1 / taus[-1], shifts[-1],
        z[0], z[1] if second else None, peak_G, sums_GD, bf16,
    )  # fmt: skip
    return z, peak_G, sums_GD


@or_on_cuda
def nearest_row(k_GD: Tensor, w_RD: Tensor) -> Tensor | None:
    """Each key's nearest row in float64, the first of equals, int64 [G], where the device finds it without the host's
    help; None on a CPU, where `nearest` says what is in doubt.
    """
    return None


def nearest(k_GD: Tensor, w_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest cosines of each key, best first, and their rows; equal ones by row: [G, T] each. Each key's cosines
    are within a bound of the exact ones, [G]; rows that cannot be the nearest may be left out (-1)."""
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
) -> None:  # fmt: skip
    """Rows and velocity one step on, in place: gradient, velocity and rows of a block in one visit."""
    _call(
        "caco_update",
        q_ND.contiguous(), positive_N.contiguous(), log_sum_N.contiguous(), weight_N.contiguous(), len(q_ND),
        w_RD, velocity_RD, len(w_RD), w_RD.shape[1], 1 / tau, pull, push, lr, momentum, weight_decay,
        normalise, bf16,
    )  # fmt: skip


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    assert all(x.is_contiguous() for x in arguments if isinstance(x, Tensor))
    passed = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    if getattr(library(), name)(*passed, torch.get_num_threads(), instructions.number()):
        raise MemoryError(f"the bank's kernel found no memory for its blocks ({name})")
