"""Check caco on a GPU within a quarter of an hour: stages that run one after another, each with a time limit and its
own result file.

    python benchmarks/gpu_check.py                           run all stages (at a tiny size if there is no GPU); the
                                                             results are in gpu-check/
    python benchmarks/gpu_check.py pack data/cifar10         first, on the machine with the images: pack 20,000 of them
                                                             into gpu-data.zip (at most 25 MB)
    python benchmarks/gpu_check.py A --to out                kernels, bank and model: at most four minutes on one H200
    python benchmarks/gpu_check.py B --data gpu-data.zip     for each of some methods, 80 seconds of training and a
                                                             k-NN evaluation: at most six minutes

Nothing is downloaded, and only torch and caco's other requirements must be installed. A stage that fails or exceeds its
limit is stopped and recorded, and the next one starts. Nobody has run this on a GPU yet; the limits are estimates."""

import argparse
import os
import random
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

if (
    not __package__
):  # run as a file: import caco and benchmarks from this checkout, as python -m benchmarks.gpu_check does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import caco  # noqa: F401, I001 - before torch, because it sets torch's instruction set
import torch
from torch.nn import functional as F

from benchmarks.common import Report, lacks_gpu, machine, say
from caco import equations
from caco.banks.kernels import fused
from caco.banks.learnable import LearnableBank
from caco.runs.files import read_json, write_json

HERE = Path(__file__).resolve().parent
PACKED_IMAGES, PACKED_BYTES = 20_000, 25_000_000
SHAPES = [
    (256, 4096, 128),
    (1000, 65_537, 128),
    (512, 8192, 256),
]  # (queries, rows, width); among them numbers that no block size divides
# Largest allowed error of the loss at temperature 0.1, and of the rows' steps relative to the largest step.
BOUND = {"fp32": 2e-4, "bf16": 3e-2}
LEARNING = {
    "caco": ["method=caco_small", "pn=both", "bank.size=1024", "warm_start.passes=32", "bank_learning.final_lr=0",
    "bank_learning.reading=paper",
             "bank_learning.push=0.25", "bank_learning.lr_reference_batch=1024"],
    "adco": ["method=adco", "method.momentum=0.99", "bank.size=1024", "bank_learning.final_lr=0",
    "bank_learning.reading=paper",
             "bank_learning.push=0.25", "bank_learning.lr_reference_batch=1024"],
    "mocov2": ["method=mocov2", "method.momentum=0.99", "method.temperature=0.1", "bank.size=4096"],
}  # fmt: skip
TRAINING = [
    "projector=small", "optimizer=sgd", "optimizer.lr=0.06", "optimizer.weight_decay=5e-4",
    "schedule.warmup_epochs=1", "schedule.final_fraction=0", "eval=[knn_all]", "tracking=ledger",
]  # fmt: skip


@dataclass
class Stage:
    """A program with a time limit.

    Args:
        set: "A" or "B".
        limit_s: the program is stopped after this many seconds.
        arguments: the command line after `python`; "{to}" stands for the result file, "{data}" for the images, "{run}"
            for a folder for this stage.
        tiny: the arguments to use instead if there is no GPU.
    """

    set: str
    limit_s: int
    arguments: list[str]
    tiny: list[str] = field(default_factory=list)


def _program(name: str, *arguments: str) -> list[str]:
    return [str(HERE / f"{name}.py"), *arguments, "--json", "{to}"]


MODEL = ["backbone=resnet50", "augmentation=caco", "batch=512", "bank=8M", "precision=bf16"]
STAGES = {
    "kernels": Stage("A", 60, _program("gpu_check", "kernels"), _program("gpu_check", "kernels", "--tiny")),
    "bank": Stage(
        "A", 90, _program("bank", "speed", "memory", "--device", "cuda", "--queries", "4096", "--rows", "65536"),
        _program("bank", "speed", "memory", "--tiny"),
    ),
    "model": Stage("A", 90, _program("step", *MODEL), _program("step", "--tiny")),
    **{
        f"learn-{name}": Stage(
            "B", 118, _program("gpu_check", "learn", name, "--seconds", "80", "--data", "{data}", "--run", "{run}"),
            _program("gpu_check", "learn", name, "--seconds", "1", "--run", "{run}", "--tiny"),
        )
        for name in LEARNING
    },
}  # fmt: skip


def kernels(device: torch.device, *, tiny: bool) -> dict:
    """Compare the bank's loss and update in both precisions with the equations in float64; returns the errors.

    Raises:
        AssertionError: an error is larger than its bound.
    """
    found = {}
    for N, K, D in [(32, 129, 16)] if tiny else SHAPES:
        for precision, bound in BOUND.items():
            generator = torch.Generator().manual_seed(0)
            q, k = (F.normalize(torch.randn(N, D, generator=generator), dim=1).to(device) for _ in range(2))
            bank = LearnableBank(size=K, dim=D, lr=3.0, seed=0).to(device)
            before = bank.rows.weight.detach().double()
            q.requires_grad_()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                row = bank.rows.most_probable(k)
                loss = bank.score(q, row, temperature=0.1).loss_B.mean()
            loss.backward()
            bank.update(lr=3.0, keys_GD=k)
            exact = equations.contrastive_loss(q.detach().double(), before, row, 0.1).mean()
            gradient = equations.bank_gradient(q.detach().double(), before, row, 0.1) if N * K * D <= 2**27 else None
            off = {"loss": abs(loss.item() - exact.item())}
            if gradient is not None:
                step = before - bank.rows.weight.detach().double()
                off["rows"] = ((step - 3.0 * gradient).abs().max() / (3.0 * gradient).abs().max()).item()
            found[f"N {N}, K {K}, D {D}, {precision}"] = off
            assert max(off.values()) <= bound, (
                f"N {N}, K {K}, D {D}, {precision}: off by {off}, expected at most {bound}"
            )
    served = (
        "Triton"
        if device.type == "cuda" and fused.on_cuda(device, 128)
        else "CPU"
        if device.type == "cpu"
        else "PyTorch alone"
    )
    return {"served_by": served, "off": found}


def learn(name: str, seconds: float, data: Path | None, run: Path, *, tiny: bool) -> dict:
    """Train for about `seconds` seconds and evaluate; a short first run measures how many epochs fit into them."""
    images = ["data=digits", "augmentation=digits", "backbone=small_resnet", "backbone.width=8", "batch=64"]
    if not tiny:
        if data is None:
            raise SystemExit(
                "learn: expected --data gpu-data.zip, as `python benchmarks/gpu_check.py pack FOLDER` makes it"
            )
        with zipfile.ZipFile(data) as packed:
            packed.extractall(run / "data")
        images = [
            "data=cifar10_jpeg75",
            f"data.root={run / 'data'}",
            "augmentation=cifar",
            "backbone=resnet18_cifar",
            "batch=256",
        ]

    def train(folder: str, *overrides: str) -> dict:
        own = {key for key, _, _ in (override.partition("=") for override in overrides)}
        settings = [
            setting for setting in [*TRAINING, *LEARNING[name], *images] if setting.partition("=")[0] not in own
        ]
        command = [sys.executable, "-m", "caco.train", *settings, *overrides, f"hydra.run.dir={run / folder}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return read_json(run / folder / "summary.json")

    first = train("first", "max_steps=40", "epochs=10", "warm_start.steps=0", "warm_start.passes=null")
    epochs = max(2, int(seconds * first["images_per_second"] / (1400 if tiny else 4 * PACKED_IMAGES // 5)))
    whole = train("whole", f"epochs={epochs}")
    return {
        "method": name,
        "images_per_second": whole["images_per_second"],
        "knn": whole["knn20_top1"],
        "epochs": epochs,
        "summary": whole,
    }


def pack(folder: Path, to: Path) -> None:
    """Pack 20,000 images from class folders in train/ and test/ into a zip, drawn with a fixed seed and not re-encoded.

    Four fifths of them are training images.
    """
    chosen = list[Path]()
    for split, count in (("train", 4 * PACKED_IMAGES // 5), ("test", PACKED_IMAGES // 5)):
        files = sorted((folder / split).glob("*/*"))
        if len(files) < count:
            raise SystemExit(
                f"pack: expected at least {count:,} images in class folders below {folder / split}, got {len(files):,}"
            )
        chosen += random.Random(0).sample(files, count)
    with zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as packed:
        for file in sorted(chosen):
            packed.write(file, file.relative_to(folder))
    total = to.stat().st_size
    say(f"{len(chosen):,} images, {total / 1e6:.1f} MB: {to}")
    if total > PACKED_BYTES:
        raise SystemExit(
            f"pack: expected at most {PACKED_BYTES / 1e6:.0f} MB, got {total / 1e6:.1f}; give smaller images"
        )


def stages(sets: list[str], to: Path, data: Path | None) -> int:
    """Run the stages of these sets; returns how many did not succeed."""
    lacking = lacks_gpu()
    to.mkdir(parents=True, exist_ok=True)
    report = Report(["stage", "result", "seconds, limit"])
    if lacking:
        say(f"every stage runs at a tiny size: {lacking}")
    wrong = 0
    for name, stage in STAGES.items():
        if stage.set not in sets:
            continue
        if (
            not lacking
            and "{data}" in stage.arguments
            and report.leave_out(name, None if data else "no --data gpu-data.zip")
        ):
            continue
        places = {"{to}": str(to / f"{name}.json"), "{data}": str(data), "{run}": str(to / name)}
        command = [sys.executable, *(places.get(word, word) for word in (stage.tiny if lacking else stage.arguments))]
        say(f"{name}, at most {stage.limit_s} s: {' '.join(command[1:])}")
        started = time.perf_counter()
        with open(to / f"{name}.log", "w", encoding="utf-8") as log:
            try:
                code = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, timeout=stage.limit_s, env=_environment()
                ).returncode
                result = "done" if code == 0 else f"failed with exit code {code}: see {log.name}"
            except subprocess.TimeoutExpired:
                result = f"stopped at its time limit: see {log.name}"
        taken = time.perf_counter() - started
        wrong += result != "done"
        write_json(
            to / f"{name}.stage.json",
            {
                "stage": name,
                "result": result,
                "seconds": round(taken, 1),
                "limit_s": stage.limit_s,
                "machine": machine(),
            },
        )
        report.row(name, result, f"{taken:.0f}, {stage.limit_s}")
    report.end(to / "stages.json")
    return wrong


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", nargs="*", help="A, B or both; or pack FOLDER; or one stage: kernels, or learn METHOD")
    options.add_argument(
        "--to", type=Path, help="the folder of the results (default: gpu-check); for pack the file (gpu-data.zip)"
    )
    options.add_argument("--data", type=Path, help="the file that pack made, for set B")
    options.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--seconds", type=float, default=80, help=argparse.SUPPRESS)
    options.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    what = arguments.what or ["A", "B"]
    if what[0] == "pack" and len(what) == 2:
        return pack(Path(what[1]), arguments.to or Path("gpu-data.zip"))
    if what == ["kernels"]:
        return write_json(
            arguments.json, kernels(torch.device("cpu" if arguments.tiny else "cuda"), tiny=arguments.tiny)
        )
    if what[0] == "learn" and len(what) == 2 and what[1] in LEARNING:
        return write_json(
            arguments.json, learn(what[1], arguments.seconds, arguments.data, arguments.run, tiny=arguments.tiny)
        )
    if set(what) - {"A", "B"}:
        options.error(f"expected A, B or both, or pack FOLDER; got {' '.join(what)}")
    sys.exit(1 if stages(what, arguments.to or Path("gpu-check"), arguments.data) else 0)


if __name__ == "__main__":
    main()
