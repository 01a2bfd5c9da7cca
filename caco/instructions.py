"""The processor instructions that are used: in caco's compiled parts, in PyTorch, and in oneDNN and MKL under PyTorch.

By default each uses the best that the processor has. The environment variable CACO_INSTRUCTIONS=plain, avx2, avx512 or
amx limits all of them to that level. CACO_INSTRUCTIONS=torch turns off caco's compiled parts and the Triton kernels,
and leaves PyTorch at its best. PyTorch and its libraries read their own variables when they are loaded, so `import
caco` sets these, and must come before `import torch`. Child processes inherit them: loader workers, ranks, the jobs of
a sweep.

Imports only fast modules.
"""

import ctypes
import difflib
import functools
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

VARIABLE = "CACO_INSTRUCTIONS"
LEVELS = ("plain", "avx2", "avx512", "amx")  # each level includes those before it
BANK, VIEWS = "caco.banks.kernels._kernel", "caco.data.views._views"  # the compiled parts

LEVEL: str | None = None  # the level asked for: one of LEVELS, "torch", or None for the best; set by `apply`

# The numbers of the levels in kernel.cpp and views.cpp. wide: the kernel's AVX-512 tile in AVX2 instructions; only
# tests use it.
_NUMBERS = {name: number for number, name in enumerate((*LEVELS, "wide"))}

# The flags in /proc/cpuinfo that a level needs beyond those of the level before.
_FLAGS = {
    "plain": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "amx": {"amx_tile", "amx_bf16", "avx512_bf16", "avx512vbmi"},
}

# MKL obeys MKL_ENABLE_INSTRUCTIONS on Intel processors only. On others it uses AVX2 if available; there, only
# MKL_CBWR=COMPATIBLE, the mode with the same results on every processor, prevents that. Level amx limits MKL nowhere.
_OF_TORCH = {
    "plain": {
        "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16",
    "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "amx": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
}  # fmt: skip


class Refused(ValueError):
    """The level asked for by CACO_INSTRUCTIONS is not possible; raised by `import caco`."""


def apply() -> None:
    """Apply CACO_INSTRUCTIONS. Called once, by `import caco`.

    Raises:
        Refused: there is no such level; the processor lacks it; torch is imported already, without it; or another
            variable contradicts it. If nobody catches the error, as in every command, only its sentence is shown, and
            the exit code is 2.
    """
    global LEVEL
    try:
        LEVEL = _wanted()
    except Refused:
        if os.environ.get("CACO_TRACEBACK") != "1":
            sys.excepthook = functools.partial(_shown, sys.excepthook)
        raise


def _wanted() -> str | None:
    level = os.environ.get(VARIABLE)
    if not level:
        return None
    if level == "torch":
        return level
    if level not in LEVELS:
        near = difflib.get_close_matches(level.lower().replace("-", ""), (*LEVELS, "torch"), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise Refused(f"{VARIABLE}={level}: expected {', '.join(LEVELS)} or torch{hint}")
    if level not in (has := processor()):
        raise Refused(
            f"{VARIABLE}={level}: this processor has {', '.join(has)}; choose one of them, or unset it for the best"
        )
    wanted = _OF_TORCH[level]
    for name, value in wanted.items():
        if (found := os.environ.get(name, value)) != value:
            raise Refused(
                f"{VARIABLE}={level} sets {name}={value}, but the environment has {name}={found}; unset one of the two"
            )
    if "torch" in sys.modules and any(name not in os.environ for name in wanted):
        raise Refused(
            f"{VARIABLE}={level} came too late for torch, which is imported already; import caco before torch"
        )
    os.environ.update(wanted)
    return level


def _shown(
    otherwise: Callable[..., None], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A sys.excepthook that shows a Refused as one sentence, and any other error as `otherwise` does."""
    if kind is not Refused:
        otherwise(kind, error, trace)
        return
    print(f"caco: {error}", file=sys.stderr)
    if not hasattr(sys, "ps1"):  # an interactive session goes on
        raise SystemExit(2)


def flags() -> set[str]:
    """The processor's flags as Linux names them; empty for processors other than x86."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def processor() -> list[str]:
    """The levels that the processor has, the best last."""
    has, found = [], flags() if platform.machine() in ("x86_64", "AMD64") else set()
    for level in LEVELS:
        if not _FLAGS[level] <= found:
            break
        has.append(level)
    return has


def child_environment(level: str | None) -> dict[str, str]:
    """This process's environment variables for a child process at another level; None is the best level."""
    ours = {VARIABLE, *_OF_TORCH.get(LEVEL or "", {})}
    return {name: value for name, value in os.environ.items() if name not in ours} | (
        {VARIABLE: level} if level else {}
    )


def number() -> int:
    """LEVEL as a number for the compiled parts; -1 means the best."""
    return _NUMBERS.get(LEVEL or "", -1)


@functools.cache
def _load(part: str) -> ctypes.CDLL | None:
    found = importlib.util.find_spec(part)
    return None if found is None or found.origin is None else ctypes.CDLL(found.origin)


def compiled(part: str) -> ctypes.CDLL | None:
    """The library of BANK or VIEWS; None if it is turned off or was not built."""
    return None if LEVEL == "torch" else _load(part)


def used(part: str) -> str:
    """The level at which BANK or VIEWS runs here, or "off", or "not built"."""
    library = compiled(part)
    if library is None:
        return "off" if LEVEL == "torch" else "not built"
    return list(_NUMBERS)[library.caco_set(number())]


def summary() -> str:
    """`record` in one line."""
    wanted, bank, views, torch = record().values()
    return f"instructions: {wanted}; the bank's kernel {bank}, the views {views}, PyTorch {torch}"


def record() -> dict[str, str]:
    """The level asked for and those in use. PyTorch's is known only if it is imported already, which takes seconds."""
    torch = sys.modules.get("torch")
    return {
        "instructions": LEVEL or "best",
        "instructions_bank": used(BANK),
        "instructions_views": used(VIEWS),
        "instructions_torch": "unknown" if torch is None else torch.backends.cpu.get_cpu_capability(),
    }
