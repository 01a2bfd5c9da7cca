"""Which instructions of the processor serve: in caco's compiled parts, in PyTorch, and in oneDNN and MKL under PyTorch.

Each takes the best that the processor has. CACO_INSTRUCTIONS=plain, avx2, avx512 or amx in the environment holds all of
them to that; CACO_INSTRUCTIONS=torch turns caco's compiled parts off, the Triton kernels too, and leaves PyTorch its
best. PyTorch and its libraries look into their own variables when they are loaded, so `import caco` sets those, and has
to come before `import torch`. Child processes inherit them: loader workers, ranks, the jobs of a sweep.

Imports nothing that takes time.
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
LEVELS = ("plain", "avx2", "avx512", "amx")  # each has all that the ones before it have
BANK, VIEWS = "caco.banks.kernels._kernel", "caco.data.views._views"  # the compiled parts

LEVEL: str | None = None  # that was asked for: one of LEVELS, torch, or None for the best; `apply` sets it

# kernel.cpp and views.cpp count like this. wide: the kernel's tile of AVX-512 in AVX2's instructions, which only tests
# ask for.
_NUMBERS = {name: number for number, name in enumerate((*LEVELS, "wide"))}

# What the system says that the processor has, beyond the level before.
_FLAGS = {
    "plain": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "amx": {"amx_tile", "amx_bf16", "avx512_bf16", "avx512vbmi"},
}

# Of an Intel processor MKL takes MKL_ENABLE_INSTRUCTIONS. Of any other it ignores it, and takes AVX2 where that is:
# there only the results that are to be the same on every processor, MKL_CBWR=COMPATIBLE, keep it from that. Nothing
# holds it back at amx.
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
    """What CACO_INSTRUCTIONS asks for cannot be; `import caco` raises it."""


def apply() -> None:
    """Do what CACO_INSTRUCTIONS says. Called once, by `import caco`.

    Raises:
        Refused: no such level; the processor lacks it; torch is there already, without it; another variable says
            otherwise. Where nobody catches it, as in every command, its one sentence is shown, and the exit code is 2.
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
    """As sys.excepthook."""
    if kind is not Refused:
        otherwise(kind, error, trace)
        return
    print(f"caco: {error}", file=sys.stderr)
    if not hasattr(sys, "ps1"):  # a session that someone types into goes on
        raise SystemExit(2)


def flags() -> set[str]:
    """What the processor has, in Linux's words; nothing is known of other than x86 processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def processor() -> list[str]:
    """The levels that it has, the best last."""
    has, found = [], flags() if platform.machine() in ("x86_64", "AMD64") else set()
    for level in LEVELS:
        if not _FLAGS[level] <= found:
            break
        has.append(level)
    return has


def child_environment(level: str | None) -> dict[str, str]:
    """This process's environment for a child process at another level; None: at the best."""
    ours = {VARIABLE, *_OF_TORCH.get(LEVEL or "", {})}
    return {name: value for name, value in os.environ.items() if name not in ours} | (
        {VARIABLE: level} if level else {}
    )


def number() -> int:
    """LEVEL as the compiled parts are asked for it: -1 for the best."""
    return _NUMBERS.get(LEVEL or "", -1)


@functools.cache
def _load(part: str) -> ctypes.CDLL | None:
    found = importlib.util.find_spec(part)
    return None if found is None or found.origin is None else ctypes.CDLL(found.origin)


def compiled(part: str) -> ctypes.CDLL | None:
    """BANK or VIEWS, or None where it is turned off or was not built."""
    return None if LEVEL == "torch" else _load(part)


def used(part: str) -> str:
    """The level at which BANK or VIEWS serves here, or off, or not built."""
    library = compiled(part)
    if library is None:
        return "off" if LEVEL == "torch" else "not built"
    return list(_NUMBERS)[library.caco_set(number())]


def summary() -> str:
    """One line of what `record` says."""
    wanted, bank, views, torch = record().values()
    return f"instructions: {wanted}; the bank's kernel {bank}, the views {views}, PyTorch {torch}"


def record() -> dict[str, str]:
    """What was asked for, and what serves; of PyTorch only once it is imported, which takes seconds."""
    torch = sys.modules.get("torch")
    return {
        "instructions": LEVEL or "best",
        "instructions_bank": used(BANK),
        "instructions_views": used(VIEWS),
        "instructions_torch": "unknown" if torch is None else torch.backends.cpu.get_cpu_capability(),
    }
