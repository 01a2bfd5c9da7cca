"""The bank's step compared with a fair rewrite of the published one: time, memory, and how they grow with the sizes.

One direction of one step is timed: choosing the key's row, loss and gradient of the queries, gradient of the rows,
update of velocity and rows. The published implementation is rewritten in benchmarks/published.py. Ours is caco/banks in
four ways: the compiled kernel in bf16, the same in fp32, "streamed", which is PyTorch code in blocks and is used where
no kernel was built, and "kept", which is fp32 with bank.keep_probabilities=true. benchmarks/contenders.py adds
functions of PyTorch that compute parts of such a step. All take turns in one process, so that changes in the machine's
speed affect all of them. Ways that this machine has no hardware for are left out; without AMX tiles the bf16 kernel is
the fp32 one.

    python benchmarks/bank.py --json bank.json    all parts; takes minutes
    python benchmarks/bank.py --full              as for the published figures: 15 turns, curve up to ten million rows
    python benchmarks/bank.py speed               time, and share of the matrix product's peak, for D 128 and 256
    python benchmarks/bank.py memory              memory beyond the bank itself, one process for each way
    python benchmarks/bank.py step                a whole training step of a small ResNet (benchmarks/step.py)
    python benchmarks/bank.py curve               time over K and over N
    python benchmarks/bank.py speed memory --device cuda --queries 4096 --rows 98304    on a GPU; all ways under bf16
                                                                                        autocast

N is the number of queries, K the number of rows, D their width.
"""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file: import caco and benchmarks from this checkout, as python -m benchmarks.bank does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import caco  # noqa: F401, I001 - before torch, because it sets torch's instruction set
import psutil
import torch
from torch.nn import functional as F

from benchmarks import step
from benchmarks.common import (
    CLOCKS,
    Report,
    formatted,
    lacks_bf16,
    lacks_gpu,
    lacks_kernel,
    lacks_tiles,
    named,
    parser,
    ratios,
    say,
    seconds,
    spread,
    turns,
)  # fmt: skip
from benchmarks.contenders import LinearCrossEntropy, contenders, lacks
from benchmarks.published import LR, MOMENTUM, TAU, Published
from caco import instructions
from caco.banks.kernels import fused
from caco.banks.learnable import LearnableBank
from caco.banks.scoring import Room

PYPI = "memory-efficient InfoNCE from PyPI"
PARTS = ("speed", "memory", "step", "curve")
CURVE = [(256, K, 128) for K in (8192, 32768, 131072)] + [(N, 65536, 128) for N in (128, 512)]
FULL_CURVE = [(256, K, 128) for K in (8192, 32768, 131072, 524288, 1 << 20)]
FULL_CURVE += [(N, 65536, 128) for N in (128, 512, 2048)] + [(64, K, 128) for K in (1_000_000, 10_000_000)]


@contextlib.contextmanager
def streamed(bank: LearnableBank) -> Iterator[None]:
    """Use the PyTorch code of the bank, not its compiled kernel."""
    supports, fused.supports = fused.supports, lambda *tensors: False
    try:
        yield
    finally:
        fused.supports = supports


@contextlib.contextmanager
def kept(bank: LearnableBank) -> Iterator[None]:
    """Keep the probabilities for the rows' update; every step uses the same memory, as in a run."""
    bank.room = ROOM
    try:
        yield
    finally:
        bank.room = None


class How(NamedTuple):
    device: torch.device
    clock: str  # a key of CLOCKS
    runs: int
    peak_size: int  # width and height of the matrices whose product gives the peak rate

    def seconds(self, work: Callable) -> float:
        return seconds(work, clock=self.clock, device=self.device)


ROOM = Room()
Way = tuple[torch.dtype, Callable[[LearnableBank], contextlib.AbstractContextManager[object]]]
WAYS: dict[str, Way] = {  # name -> (precision, context manager to run the step in); the fastest default first
    "bf16": (torch.bfloat16, contextlib.nullcontext),
    "fp32": (torch.float32, contextlib.nullcontext),
    "streamed": (torch.float32, streamed),
    "kept": (torch.float32, kept),
}


def ours(way: str, bank: LearnableBank, q_ND: torch.Tensor, k_ND: torch.Tensor) -> None:
    """One step of the bank. On a GPU all ways, the published one too, run under autocast."""
    precision, serving = WAYS[way]
    with serving(bank):
        with torch.autocast(q_ND.device.type, torch.bfloat16, enabled=precision == torch.bfloat16 or q_ND.is_cuda):
            loss = bank.score(q_ND, bank.rows.most_probable(k_ND), temperature=TAU).loss_B.mean()
        loss.backward()
        bank.update(lr=LR, keys_GD=k_ND)


def ways_that_serve(report: Report, device: torch.device) -> list[str]:
    """The ways that this machine can run: first the fastest of those that a run uses by default."""
    keeps = fused.numbers_kept(*[torch.empty(1, 1, device=device)] * 2) > 0
    lacking = {
        "bf16": None if device.type == "cuda" else lacks_tiles(),
        "fp32": None if device.type == "cuda" else lacks_kernel(),
        "streamed": None,
        "kept": None if keeps else "probabilities are kept only by the compiled kernel without AMX tiles",
    }
    return [way for way in WAYS if not report.leave_out(f"the bank in {way}", lacking[way])]


def problem(N: int, K: int, D: int, device: torch.device) -> tuple[LearnableBank, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(N, D, generator=generator), dim=1).to(device) for _ in range(2))
    return LearnableBank(size=K, dim=D, seed=0, lr=LR, momentum=MOMENTUM).eval().to(device), q.requires_grad_(), k


def matrix_peak(dtype: torch.dtype, how: How) -> float:
    """The best rate of PyTorch's matrix product in six tries, in GFLOP/s."""
    a, b = (torch.randn(how.peak_size, how.peak_size, device=how.device).to(dtype) for _ in range(2))
    return 2 * how.peak_size**3 / min(how.seconds(lambda: a @ b) for _ in range(6)) / 1e9


def speed(report: Report, N: int, K: int, D: int, how: How) -> dict:
    say(f"speed at N {N}, K {K:,}, D {D}: {how.runs} turns of every way and of the best matrix product")
    ways, peaks = ways_that_serve(report, how.device), {"fp32": torch.float32, "bf16": torch.bfloat16}
    if report.leave_out("the bf16 matrix product", None if how.device.type == "cuda" else lacks_bf16()):
        del peaks["bf16"]
    bank, q, k = problem(N, K, D, how.device)
    published = Published(bank.rows.weight.detach())
    ours(ways[0], bank, q, k)
    published.step(q, k)
    difference = (bank.rows.weight - published.w_KD).abs().max().item()
    if how.device.type == "cpu":
        assert difference < 1e-5, f"the two disagree by {difference}"
    else:  # the first run on a GPU: report the difference, and measure the times whatever it is
        report.row(f"after a step of both, D {D}", f"rows apart by {difference:.1e}", "expected below 1e-3")
    others = contenders_that_serve(report, published, q, k, how)
    works = {"published": partial(how.seconds, partial(published.step, q, k))}
    works |= {name: partial(how.seconds, partial(other.step, q, k)) for name, other in others.items()}
    works |= {way: partial(how.seconds, partial(ours, way, bank, q, k)) for way in ways}
    works |= {f"{name}_peak_gflops": partial(matrix_peak, dtype, how) for name, dtype in peaks.items()}
    times = turns(works, how.runs, warm=0)
    figures: dict = {"published_seconds": spread(times["published"])["median"], "rows_apart": difference}
    figures |= {f"{name}_peak_gflops": max(times[f"{name}_peak_gflops"]) for name in peaks}
    for way in [*ways, *others]:
        taken = spread(times[way])["median"]
        ratio = ratios(times["published"], times[way])
        gflops = 5 * 2 * N * K * D / taken / 1e9
        figures[way] = {"seconds": taken, **named(ratio, "ratio"), "gflops": gflops}
        report.row(
            f"step of {way}, N {N}, K {K:,}, D {D}", f"{formatted(ratio, digits=1)} times as fast as the published",
            f"{taken:.3f} s, published {figures['published_seconds']:.2f} s; {gflops:.0f} GFLOP/s, "
            f"{100 * gflops / figures['fp32_peak_gflops']:.0f} % of the fp32 matrix product",
        )  # fmt: skip
    if isinstance(fused_loss := others.get("linear_cross_entropy"), LinearCrossEntropy):
        over = ratios(times["linear_cross_entropy"], times["streamed"])
        figures["streamed"] |= named(over, "vs_linear_cross_entropy")
        report.row(
            f"streamed compared with linear_cross_entropy, D {D}",
            f"{formatted(over, digits=1)} times as fast",
            f"linear_cross_entropy with its fastest chunk size: {fused_loss.chunk}",
        )
    report.row(
        "the best matrix product",
        ", ".join(f"{name} {figures[f'{name}_peak_gflops']:.0f} GFLOP/s" for name in peaks),
        "",
    )
    best = "bf16" if "bf16" in ways and "bf16" in peaks else "fp32"
    if best in ways:
        figures["share_of_peak"] = figures[best]["gflops"] / figures[f"{best}_peak_gflops"]
        report.row(
            f"the {best} bank's rate / the {best} matrix product's", f"{100 * figures['share_of_peak']:.0f} %", ""
        )
    return figures | {"best": ways[0], "turns": times}


def contenders_that_serve(
    report: Report, published: Published, q: torch.Tensor, k: torch.Tensor, how: How
) -> dict[str, Published]:
    """The contenders that this machine can run, each checked to compute the same step as the published code.

    linear_cross_entropy moves the rows in another way, so only its loss is compared.
    """
    report.leave_out(PYPI, lacks(PYPI, how.device))
    others: dict[str, Published] = {}
    for name, made in contenders(how.device).items():
        if report.leave_out(name, lacks(name, how.device)):
            continue
        other = made(published.w_KD)
        try:
            difference = distance(other, Published(published.w_KD), q, k, how)
        except Exception as error:  # any kind: the code is not ours, and may run on such a machine for the first time
            if how.device.type == "cpu":
                raise
            report.leave_out(name, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        if how.device.type == "cpu":
            assert difference < 1e-4, f"{name} and the published step disagree by {difference}"
        elif not difference < 1e-2:
            report.leave_out(name, f"it and the published step disagree by {difference:.1e}")
            continue
        others[name] = other
    return others


def distance(other: Published, again: Published, q: torch.Tensor, k: torch.Tensor, how: How) -> float:
    """Returns the largest difference between what the two compute."""
    if not isinstance(other, LinearCrossEntropy):
        other.step(q, k)
        again.step(q, k)
        return (other.w_KD - again.w_KD).abs().max().item()
    difference = (other.loss(q, k)[0] - again.loss(q, k)[0]).abs().item()
    other.choose(how.seconds, q, k)
    other.step(q, k)
    return difference


def extra_memory(way: str, N: int, K: int, D: int, device: torch.device) -> float:
    """Bytes of memory that one step needs beyond bank, queries and keys: the peak of a new process."""
    say(f"    {way}")
    if device.type == "cuda":  # PyTorch counts its memory on a GPU, so no new process is needed
        return extra_of_step(way, N, K, D, device)
    command = [sys.executable, __file__, "--device", str(device), "--child", way, str(N), str(K), str(D)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def extra_of_step(way: str, N: int, K: int, D: int, device: torch.device) -> float:
    bank, q, k = problem(N, K, D, device)
    published = Published(bank.rows.weight.detach()) if way == "published" else None
    small = problem(64, 512, D, device)
    ours("fp32", *small)  # load libraries and start thread pools before memory is measured
    Published(small[0].rows.weight.detach()).step(*small[1:])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before: float = torch.cuda.memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
        before = status("VmRSS")
    published.step(q, k) if published else ours(way, bank, q, k)
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")) - before


def status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) * 1024


def memory(report: Report, N: int, K: int, D: int, device: torch.device) -> dict:
    say(f"memory at N {N}, K {K:,}, D {D}: a process for each way")
    ways = ways_that_serve(report, device)
    extra = {way: extra_memory(way, N, K, D, device) for way in ("published", *ways)}
    less = {way: extra["published"] / max(extra[way], 1) for way in ways}
    for way in ways:
        report.row(
            f"memory of {way}, N {N}, K {K:,}, D {D}", f"{less[way]:.0f} times less than the published",
            f"{extra[way] / 2**20:,.1f} MiB beyond the bank, published {extra['published'] / 2**20:,.1f} MiB",
        )  # fmt: skip
    return {"extra_bytes": extra, "memory_vs_published": less[ways[0]]}


def curve(report: Report, shapes: list[tuple[int, int, int]], how: How) -> list[dict]:
    way = ways_that_serve(report, how.device)[0]
    say(f"curve of {way}: best of {how.runs} at each size")
    rows = []
    for N, K, D in shapes:
        # The rows and their velocities, and a copy of the rows while they are drawn.
        needed, there = 3 * 4 * K * D, psutil.virtual_memory().available
        short = needed > there and how.device.type == "cpu"
        lacking = (
            f"it needs {needed / 2**30:.0f} GiB of memory, and {there / 2**30:.0f} GiB are free" if short else None
        )
        if report.leave_out(f"a bank of {K:,} rows", lacking):
            continue
        bank, q, k = problem(N, K, D, how.device)
        ours(way, bank, q, k)
        taken = min(how.seconds(lambda: ours(way, bank, q, k)) for _ in range(how.runs))
        rows.append({"N": N, "K": K, "D": D, "way": way, "seconds": taken, "gflops": 5 * 2 * N * K * D / taken / 1e9})
        report.row(f"step of {way}, N {N}, K {K:,}, D {D}", f"{taken:.3f} s", f"{rows[-1]['gflops']:.0f} GFLOP/s")
        say(f"    N {N}, K {K:,}")
    return rows


def main() -> None:
    counted = "This many turns are measured. The default is 3. The part step has two turns before them, to warm up."
    options = parser(__doc__, runs=counted, full="Measure 15 turns, and the curve up to ten million rows.")
    options.add_argument(
        "parts", nargs="*", metavar="PART", help=f"Measure these parts of {', '.join(PARTS)}. The default is all."
    )
    options.add_argument(
        "--queries", type=int, default=1024, help="The part speed has this many queries. The default is %(default)s."
    )
    options.add_argument(
        "--rows", type=int, default=65_536, help="The bank has this many rows. The default is %(default)s."
    )
    options.add_argument(
        "--memory-queries",
        type=int,
        default=4096,
        help="The part memory has this many queries. The default is %(default)s.",
    )
    options.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="The part step computes in this precision. The default is bf16 if it is supported.",
    )
    options.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="Time is read from this clock. Use cpu, with --threads 1, on a machine that others use too.",
    )
    options.add_argument(
        "--threads", type=int, help="PyTorch uses this many threads. The default is PyTorch's own choice."
    )
    options.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options.add_argument(
        "--device", type=torch.device, default="cpu", help="Measure on cpu or cuda. The part step always uses the CPU."
    )
    arguments = options.parse_args()
    device = arguments.device
    if arguments.child:
        way, *sizes = arguments.child
        N, K, D = map(int, sizes)
        print(extra_of_step(way, N, K, D, device))
        return
    parts = arguments.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        options.error(f"expected parts of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    if device.type == "cuda" and lacks_gpu():
        options.error("--device cuda: expected a GPU, PyTorch sees none here")
    if arguments.precision == "bf16" and (lacking := lacks_bf16()):
        options.error(f"--precision bf16: {lacking}; fp32 is measured without it")
    runs = arguments.runs or (15 if arguments.full else 1 if arguments.tiny else 3)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())

    N, K, memory_N = arguments.queries, arguments.rows, arguments.memory_queries
    shapes, overrides = FULL_CURVE if arguments.full else CURVE, step.DEFAULT
    peak_size = 8192 if device.type == "cuda" else 2048  # on a GPU a smaller product is too short to time
    if arguments.tiny:
        N, K, memory_N, shapes, overrides, peak_size = 32, 512, 64, [(16, 512, 32)], step.TINY, 64
    how = How(device, arguments.clock, runs, peak_size)
    report = Report(["what", "figure", "details"], arguments.json)
    figures = report.figures
    figures |= {"runs": runs, "threads": torch.get_num_threads(), "clock": arguments.clock}
    if device.type == "cuda":
        figures["instructions"] = "Triton" if fused.on_cuda(device, 128) else None
    else:
        figures["instructions"] = instructions.used(instructions.BANK)
        report.leave_out("a GPU", lacks_gpu())
    if "speed" in parts:
        for D in (128, 256):
            one = speed(report, N, K, D, how)
            figures[f"d{D}"], figures[f"vs_published_d{D}"] = one, one[one["best"]]["ratio"]
        figures["fallback_vs_published"] = figures["d128"]["streamed"]["ratio"]
        figures["fallback_vs_published_d256"] = figures["d256"]["streamed"]["ratio"]
    if "memory" in parts:
        figures |= memory(report, memory_N, K, 128, device)
    if "step" in parts:
        chosen = [f"precision={arguments.precision}"] if arguments.precision else []
        measured = step.measure(report, [*overrides, *chosen], runs)
        figures |= {
            "step_overhead": measured["overhead"],
            "step_vs_published": measured["vs_published"],
            "step": measured,
        }
    if "curve" in parts:
        figures["curve"] = curve(report, shapes, how)
    report.end(arguments.json)


if __name__ == "__main__":
    main()
