"""What the benchmarks share: timing in turns, ratios, checks for missing hardware, and the table printed at the end.

Every benchmark runs without arguments, makes the data that it needs, and ends within five minutes on two AVX2 cores. If
the machine lacks hardware or software for some measurement, the benchmark says so before it would start that
measurement, and leaves it out. Published figures that take longer to measure need --full.
"""

import argparse
import json
import os
import statistics
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import caco  # noqa: F401  # isort: skip  # before torch, because it sets torch's instruction set
import numpy as np
import torch
from PIL import Image

from caco import instructions
from caco.banks.kernels import fused
from caco.data.sets.folders import folder
from caco.data.sets.sources import Source
from caco.runs.environment import environment
from caco.runs.files import write_text

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_started = time.perf_counter()


def say(line: str) -> None:
    """Print a line of progress, with the seconds since the benchmark started."""
    print(f"[{time.perf_counter() - _started:4.0f} s] {line}", flush=True)


def parser(
    description: str, *, runs: str | None = None, full: str | None = None, photos: bool = False
) -> argparse.ArgumentParser:
    """An argument parser with the options that benchmarks share.

    Args:
        runs, full: the help texts of --runs and --full; None for a benchmark without that option.
        photos: whether the benchmark reads photographs: then it has --photos and --workers.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if runs:
        made.add_argument("--runs", type=int, help=runs)
    made.add_argument("--json", type=Path, help="The figures are also written to this file, as JSON.")
    made.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests; its figures mean nothing
    if full:
        made.add_argument("--full", action="store_true", help=full)
    if photos:
        made.add_argument(
            "--photos",
            type=Path,
            help="Read the JPEG photographs in this zip file or folder. The default is synthetic ones.",
        )
        made.add_argument(
            "--workers",
            type=int,
            default=len(os.sched_getaffinity(0)),
            help="This many processes or threads read the images. The default is one for each core.",
        )
    return made


# What this machine lacks


def lacks_bf16() -> str | None:
    """Why this machine has no hardware for bfloat16 matrix products, or None if it has.

    This reads the processor's flags instead of trying a product, which would take minutes without such hardware.
    """
    if not instructions.flags() & {"avx512_bf16", "amx_bf16"}:
        return "this processor has no unit that is known for products of bfloat16 (AVX512_BF16, AMX)"
    held = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()  # CACO_INSTRUCTIONS sets this variable, too
    if held.startswith(("SSE", "AVX2")) or held in ("AVX", "AVX512_CORE", "AVX512_CORE_VNNI"):
        return f"ONEDNN_MAX_CPU_ISA={held} keeps PyTorch from using the units for products of bfloat16"
    return None


def lacks_kernel() -> str | None:
    """Why the bank's compiled kernel is not used, or None if it is."""
    return (
        None if fused.library() is not None else f"the bank's compiled kernel is {instructions.used(instructions.BANK)}"
    )


def lacks_tiles() -> str | None:
    """Why the bank's kernel does not compute in bfloat16, or None if it does."""
    if instructions.used(instructions.BANK) == "amx":
        return None
    return lacks_kernel() or "no AMX tiles; without them the bank's kernel computes in float32 at any precision"


def lacks_gpu() -> str | None:
    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


def machine() -> dict[str, str]:
    """The facts about the machine that every published figure must name."""
    return {
        "processor": environment()["cpu"],
        "instructions": instructions.summary().partition(": ")[2],
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


# Time


def seconds(work: Callable[[], Any], *, clock: str = "wall", device: torch.device | None = None) -> float:
    """Seconds of one call of `work`.

    Args:
        clock: "wall", or "cpu" for processor time, which is more reliable for one thread on a machine with other users.
        device: the device to wait for.
    """
    done = torch.cuda.synchronize if device is not None and device.type == "cuda" else lambda: None
    done()
    started = CLOCKS[clock]()
    work()
    done()
    return CLOCKS[clock]() - started


def turns(works: Mapping[str, Callable[[], float]], runs: int, *, warm: int = 1) -> dict[str, list[float]]:
    """Call all works in turn, `warm` + `runs` times; returns {name: values of the last `runs` turns}.

    The works alternate so that changes in the machine's speed affect all of them.
    """
    values: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warm + runs):
        for name, work in works.items():
            value = work()
            if turn >= warm:
                values[name].append(value)
        say(f"    turn {turn - warm + 1} of {runs}" if turn >= warm else "    warmed up")
    return values


def ratios(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """The spread of a / b, dividing only values of the same turn, which were measured under like conditions."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def named(values: dict[str, float], name: str) -> dict[str, float]:
    """A spread as a dictionary with the keys `name` (the median), `name`_min and `name`_max."""
    return {name: values["median"], f"{name}_min": values["min"], f"{name}_max": values["max"]}


def formatted(values: dict[str, float], unit: str = "", *, scale: float = 1, digits: int = 2) -> str:
    """A spread as text: "median (min to max)", multiplied by `scale`."""
    median, least, most = (f"{scale * values[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median}{unit} ({least} to {most})"


# Photographs


def make_photos(out: Path, count: int, width: int) -> None:
    """Write `count` JPEGs of noise that look to a decoder like photographs.

    Their power falls with the square of the frequency, and they have blots with edges (see benchmarks/loader.md).
    """
    out.mkdir()
    height = width * 3 // 4
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width).clip(1)
    y, x = np.mgrid[:height, :width]

    def texture() -> np.ndarray:
        made = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, s=(height, width))
        return made / made.std()

    for number in range(count):
        light = texture()
        image = np.stack([128 + 45 * light + 15 * texture() for _ in range(3)], axis=2)
        for _ in range(12):
            middle, radius = rng.uniform(0, (height, width)), rng.uniform(width / 33, width / 4.5, 2)
            blot = ((y - middle[0]) / radius[0]) ** 2 + ((x - middle[1]) / radius[1]) ** 2 < 1
            image[blot] = 0.5 * image[blot] + rng.uniform(0, 128, 3)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(out / f"{number:04}.jpg", quality=92)


def photos_at(given: Path | None, top: Path, count: int, width: int) -> Source:
    """The photographs given by --photos (a zip or a folder), or else `count` made ones, `width` pixels wide.

    A zip is unpacked into `top`, and made photographs are written there.
    """
    if given is None:
        say(f"no --photos: making {count} JPEGs of noise with the texture of photographs")
        make_photos(top, count, width)
    elif given.suffix == ".zip":
        zipfile.ZipFile(given).extractall(top)
    return folder(root=str(given if given is not None and given.is_dir() else top), in_memory_mb=0).pretrain


# The end


class Report:
    """Collects the figures for --json, the rows of the table printed at the end, what was left out and why, and notes
    on in what contenders differ.

    Args:
        file: the figures and rows so far are written to it with every row, so that a run that is stopped early leaves
            them.
    """

    def __init__(self, columns: Sequence[str], file: Path | None = None):
        self.columns, self.file = columns, file
        self.figures: dict[str, Any] = {}
        self.rows: list[Sequence[Any]] = []
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        self._on: dict[str, dict[str, str]] = {}

    def leave_out(self, what: str, why: str | None) -> bool:
        """Return whether `why` gives a reason to leave out `what`; if so, print it at once and remember it."""
        if why is not None and what not in self.left_out:
            self.left_out[what] = why
            say(f"left out: {what}: {why}")
        return why is not None

    def row(self, *cells: Any) -> None:
        self.rows.append(cells)
        if self.file is not None:
            self._write(self.file, {"unfinished": True, "rows": [[str(cell) for cell in row] for row in self.rows]})

    def _write(self, file: Path, more: dict[str, Any]) -> None:
        self._on = self._on or {"machine": machine(), "environment": environment()}
        figures = self.figures | {"left_out": self.left_out} | self._on | more
        write_text(file, json.dumps(figures, indent=1) + "\n")

    def end(self, file: Path | None) -> None:
        """Print the table, what was left out, and the machine; write the figures to `file` if one is given."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        print("\n" + "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines))
        for what, why in self.left_out.items():
            print(f"left out: {what}: {why}")
        for note in self.notes:
            print(f"not the same: {note}")
        on = machine()
        facts = [f"{name}: {value}" for name, value in on.items()]
        print("; ".join([*facts, f"{time.perf_counter() - _started:.0f} s in total"]), flush=True)
        if file is not None:
            self._write(file, {})
