"""The bank's step against an honest rewrite of the published one: time, memory, and how both grow.

One direction of one step: the key chooses its row, loss and query gradient, gradient of the rows, velocity, rows. The
published way (`Published`) makes N x K matrices of each stage, in PyTorch, in place where that is natural, without its
top-5 monitoring, in float32. Ours is caco/banks: fused in the precision of a bf16 run and of an fp32 run, and streamed by PyTorch
alone (what serves where no kernel was built). They take turns in one process, so that a drifting machine hits all.

    python benchmarks/bank.py --json bank.json    all parts; a few minutes
    python benchmarks/bank.py speed               time and share of the matrix peak, D 128 and 256
    python benchmarks/bank.py memory              beyond the bank itself, of processes of their own
    python benchmarks/bank.py step                a whole step of a small ResNet (benchmarks/step.py)
    python benchmarks/bank.py curve               cost over K to a million rows, and over N
    python benchmarks/bank.py speed memory --device cuda --queries 4096 --rows 98304    on a GPU, both ways under bf16 autocast
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from caco import instructions  # before torch: CACO_INSTRUCTIONS holds for it too

import torch
from torch.nn import functional as F

from caco.banks import fused
from caco.banks.learnable import LearnableBank
from caco.tracking.environment import environment

TAU, LR, MOMENTUM = 0.08, 0.01, 0.9
PARTS = ("speed", "memory", "step", "curve")
# cpu: on a machine that others use too, with --threads 1, the processor's time says more than the wall's.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = "wall"
device = torch.device("cpu")
low = False  # whether caco's bank runs as with precision=bf16


class Published:
    """The published bank: rows stored unnormalised, normalised anew where they are read, stepped by hand."""

    def __init__(self, w_KD: torch.Tensor):
        self.w_KD, self.velocity_KD = w_KD.clone(), torch.zeros_like(w_KD)

    def loss(self, q_ND: torch.Tensor, k_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of one direction, and its gradient of the rows, [K, D]."""
        norm_K1 = self.w_KD.norm(dim=1, keepdim=True)
        m_KD = self.w_KD / norm_K1
        cosine_NK = q_ND @ m_KD.T
        with torch.no_grad():
            label_N = (k_ND @ m_KD.T).argmax(1)
        loss = F.cross_entropy(cosine_NK / TAU, label_N)
        with torch.no_grad():
            weight_NK = torch.softmax(cosine_NK / TAU, 1)
            own_N1 = weight_NK.gather(1, label_N[:, None])
            weight_NK.scatter_(1, label_N[:, None], 1 - own_N1)
            toward_KD = weight_NK.T @ q_ND / len(q_ND)
            along_K1 = (weight_NK * cosine_NK).mean(0)[:, None]
            gradient_KD = -(toward_KD - along_K1 * m_KD) / (norm_K1 * TAU)
        return loss, gradient_KD

    @torch.no_grad()
    def update(self, gradient_KD: torch.Tensor) -> None:
        self.velocity_KD.mul_(MOMENTUM).add_(gradient_KD)
        self.w_KD.sub_(self.velocity_KD, alpha=LR)

    def step(self, q_ND: torch.Tensor, k_ND: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, gradient_KD = self.loss(q_ND, k_ND)
        loss.backward()
        self.update(gradient_KD)


def precision() -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=low or device.type == "cuda")


def ours(bank: LearnableBank, q_ND: torch.Tensor, k_ND: torch.Tensor) -> None:
    with precision():
        loss = bank.score(q_ND, bank.rows.most_probable(k_ND), temperature=TAU).loss_B.mean()
    loss.backward()
    bank.update(lr=LR, keys_GD=k_ND)


@contextlib.contextmanager
def streamed():
    """The path of PyTorch alone."""
    serves, fused.serves = fused.serves, lambda *tensors: False
    try:
        yield
    finally:
        fused.serves = serves


@contextlib.contextmanager
def in_bf16():
    global low
    low = True
    try:
        yield
    finally:
        low = False


WAYS = {"bf16": in_bf16, "fp32": contextlib.nullcontext, "streamed": streamed}


def problem(N: int, K: int, D: int) -> tuple[LearnableBank, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(N, D, generator=generator), dim=1).to(device) for _ in range(2))
    return LearnableBank(size=K, dim=D, seed=0, lr=LR, momentum=MOMENTUM).eval().to(device), q.requires_grad_(), k


def seconds(work) -> float:
    done = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    done()
    started = CLOCKS[clock]()
    work()
    done()
    return CLOCKS[clock]() - started


def matrix_peak(dtype: torch.dtype) -> float:
    """Best of PyTorch's matrix products here, operations a second."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(6))


def speed(N: int, K: int, D: int, runs: int) -> dict:
    bank, q, k = problem(N, K, D)
    published = Published(bank.rows.weight.detach())
    ours(bank, q, k)
    published.step(q, k)
    difference = (bank.rows.weight - published.w_KD).abs().max().item()
    assert difference < (1e-3 if device.type == "cuda" else 1e-5), f"the two disagree by {difference}"
    times = {way: [] for way in ("published", *WAYS)}
    peaks = {"bf16": [], "fp32": []}
    for _ in range(runs):
        times["published"].append(seconds(lambda: published.step(q, k)))
        for way, serving in WAYS.items():
            with serving():
                times[way].append(seconds(lambda: ours(bank, q, k)))
        peaks["bf16"].append(matrix_peak(torch.bfloat16))
        peaks["fp32"].append(matrix_peak(torch.float32))
    figures: dict = {"published_seconds": statistics.median(times["published"])}
    for way in WAYS:
        ratios = [p / t for p, t in zip(times["published"], times[way], strict=True)]
        taken = statistics.median(times[way])
        figures[way] = {
            "seconds": taken, "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            "gflops": 5 * 2 * N * K * D / taken / 1e9,
        }  # fmt: skip
    figures |= {f"{dtype}_peak_gflops": max(values) / 1e9 for dtype, values in peaks.items()}
    figures["share_of_peak"] = figures["bf16"]["gflops"] / figures["bf16_peak_gflops"]
    figures["turns"] = times | {f"{dtype}_peak_gflops": [value / 1e9 for value in values] for dtype, values in peaks.items()}
    return figures


def extra_memory(way: str, N: int, K: int, D: int) -> float:
    """Bytes that one step takes beyond bank, queries and keys: the peak of a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--device", str(device), "--child", way, str(N), str(K), str(D)],
        capture_output=True, text=True, check=True,
    )
    return float(done.stdout)


def child(way: str, N: int, K: int, D: int) -> None:
    bank, q, k = problem(N, K, D)
    published = Published(bank.rows.weight.detach()) if way == "published" else None
    small = problem(64, 512, D)
    ours(*small)  # libraries and thread pools are there before we look
    Published(small[0].rows.weight.detach()).step(*small[1:])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak, forgotten
        before = status("VmRSS")
    with WAYS.get(way, contextlib.nullcontext)():
        published.step(q, k) if published else ours(bank, q, k)
    print((torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")) - before)


def status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) * 1024


def curve(runs: int) -> list[dict[str, float]]:
    rows = []
    shapes = [(256, K, 128) for K in (8192, 32768, 131072, 524288, 1 << 20)] + [(N, 65536, 128) for N in (128, 512, 2048)]
    for N, K, D in shapes:
        bank, q, k = problem(N, K, D)
        ours(bank, q, k)
        taken = min(seconds(lambda: ours(bank, q, k)) for _ in range(runs))
        rows.append({"N": N, "K": K, "D": D, "seconds": taken, "gflops": 5 * 2 * N * K * D / taken / 1e9})
        print(f"N {N:5} K {K:8} D {D}: {taken:.3f} s, {rows[-1]['gflops']:.0f} GFLOP/s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; without any: all")
    parser.add_argument("--runs", type=int, default=3, help="timed turns, after one that warms up (step: two)")
    parser.add_argument("--queries", type=int, default=1024, help="of the speed")
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--memory-queries", type=int, default=4096)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the step's model")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, help="PyTorch's number; its own choice without")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, or cuda; the parts but step")
    arguments = parser.parse_args()
    global clock, device
    clock, device = arguments.clock, arguments.device
    if arguments.child:
        child(arguments.child[0], *map(int, arguments.child[1:]))
        return
    parts = arguments.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"expected parts of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    print(instructions.told(), flush=True)
    figures: dict = {"runs": arguments.runs, "threads": torch.get_num_threads(), "clock": clock, "environment": environment()}
    figures["instructions"] = ("Triton" if fused.on_cuda(device, 128) else None) if device.type == "cuda" else instructions.used(instructions.BANK)
    if "speed" in parts:
        for D in (128, 256):
            one = speed(arguments.queries, arguments.rows, D, arguments.runs)
            figures[f"d{D}"], figures[f"vs_published_d{D}"] = one, one["bf16"]["ratio"]
            print(f"N {arguments.queries} K {arguments.rows} D {D}: published {one['published_seconds']:.2f} s", flush=True)
            for way in WAYS:
                told = one[way]
                print(
                    f"    {way} {told['seconds']:.3f} s, {told['ratio']:.1f} times ({told['ratio_min']:.1f} to {told['ratio_max']:.1f}), "
                    f"{told['gflops']:.0f} GFLOP/s",
                    flush=True,
                )
            print(
                f"    best matrix product here: bf16 {one['bf16_peak_gflops']:.0f} GFLOP/s, fp32 {one['fp32_peak_gflops']:.0f}; the bf16 bank "
                f"reaches {100 * one['share_of_peak']:.0f} % of the first",
                flush=True,
            )
        figures["fallback_vs_published"] = figures["d128"]["streamed"]["ratio"]
        figures["fallback_vs_published_d256"] = figures["d256"]["streamed"]["ratio"]
    if "memory" in parts:
        shape = arguments.memory_queries, arguments.rows, 128
        extra = {way: extra_memory(way, *shape) for way in ("published", *WAYS)}
        figures |= {"extra_bytes": extra, "memory_vs_published": extra["published"] / extra["bf16"]}
        told = ", ".join(f"{way} {size / 2**20:,.1f} MiB" for way, size in extra.items())
        print(f"N {shape[0]}: extra memory {told}: {figures['memory_vs_published']:.0f} times less", flush=True)
    if "step" in parts:
        from step import DEFAULT, measure, told

        step = measure([*DEFAULT, f"precision={arguments.precision}"], arguments.runs)
        figures |= {"step_overhead": step["overhead"], "step_vs_published": step["vs_published"], "step": step}
        print(told(step), flush=True)
    if "curve" in parts:
        with in_bf16():
            figures["curve"] = curve(arguments.runs)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
