"""Check caco on a GPU within a quarter of an hour. The check has stages, which run one after another; each has a time
limit and writes a result file of its own.

    python benchmarks/gpu_check.py                           run all stages (at a tiny size if there is no GPU); the
                                                             results are in gpu-check/
    python benchmarks/gpu_check.py pack /path/to/cifar10      first, on the machine with the images: pack 20,000 of them
                                                             into gpu-data/images.zip (at most 25 MB)
    python benchmarks/gpu_check.py A --to out                set A, which has the stages kernels, waits, bank and
                                                             model: at most four minutes on one H200
    python benchmarks/gpu_check.py B --to out                set B, which trains CaCo, AdCo and MoCo v2 for 80 seconds
                                                             each and evaluates each by k-NN: at most six minutes; it
                                                             needs gpu-data/images.zip

Nothing is downloaded, and only torch and caco's other requirements must be installed. A stage writes its figures as
soon as it has them. If a stage fails or exceeds its limit, it is stopped together with every process that it started,
the end of what it printed is recorded, and the next stage starts. Large files, such as images, are kept in a temporary
folder and removed. What remains is one small file for each stage, and stages.json. Nobody has run this on a GPU yet;
the time limits are estimates."""

import argparse
import contextlib
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# If this is run as a file, import caco and benchmarks from this checkout, as python -m benchmarks.gpu_check does.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import caco  # noqa: F401, I001 - before torch, because it sets torch's instruction set
import torch
from torch.nn import functional as F

from benchmarks.common import Report, lacks_gpu, machine, say
from caco import equations
from caco.banks.kernels import fused
from caco.banks.learnable import LearnableBank
from caco.config import composition
from caco.engine import trainer
from caco.engine.training import run_training
from caco.runs.files import read_json, write_json
from caco.tracking.ledger import read_rows

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "gpu-data" / "images.zip"
PACKED_IMAGES, PACKED_BYTES = 20_000, 25_000_000
LOG_CHARACTERS = 6000  # the number of characters that are kept from the end of what a stage printed
SHAPES = [  # (queries, rows, width); no block size divides 1000 and 65,537
    (256, 4096, 128),
    (1000, 65_537, 128),
    (512, 8192, 256),
]
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
SMALL = ["data=digits", "augmentation=digits", "backbone=small_resnet", "backbone.width=8", "batch=64"]
WAITING = ["caco", "mocov2", "adco", "swav", "dino", "byol", "instdisc"]  # the methods that the stage `waits` runs
NEEDED = ["hydra", "omegaconf", "timm", "torchvision", "numpy", "PIL", "safetensors", "psutil", "sklearn", "scipy",
          "threadpoolctl", "tqdm"]  # fmt: skip


@dataclass
class Stage:
    """A program that is run as one part of the check, with a time limit.

    Args:
        set: "A" or "B", the set that the stage belongs to.
        limit_s: the program is stopped after this many seconds.
        arguments: the command line after `python`. "{to}" stands for the path of the result file, "{data}" for the
            folder with the images, "{run}" for a temporary folder of this stage's own.
        tiny: the arguments to use instead if there is no GPU.
    """

    set: str
    limit_s: int
    arguments: list[str]
    tiny: list[str] = field(default_factory=list)


def _program(name: str, *arguments: str) -> list[str]:
    return [str(HERE / f"{name}.py"), *arguments, "--json", "{to}"]


MODEL = ["backbone=resnet50", "augmentation=caco", "batch=512", "bank=8M", "precision=bf16", "--runs", "5"]
LEARN_S, LEARN_LIMIT_S = 80, 117
STAGES = {
    "kernels": Stage("A", 60, _program("gpu_check", "kernels"), _program("gpu_check", "kernels", "--tiny")),
    "waits": Stage(
        "A", 40, _program("gpu_check", "waits", "--run", "{run}"),
        _program("gpu_check", "waits", "--run", "{run}", "--tiny"),
    ),
    "bank": Stage(
        "A", 70, _program("bank", "speed", "memory", "--device", "cuda", "--queries", "4096", "--rows", "65536"),
        _program("bank", "speed", "memory", "--tiny"),
    ),
    "model": Stage("A", 70, _program("step", *MODEL), _program("step", "--tiny")),
    **{
        f"learn-{name}": Stage(
            "B", LEARN_LIMIT_S, _program("gpu_check", "learn", name, "--data", "{data}", "--run", "{run}"),
            _program("gpu_check", "learn", name, "--run", "{run}", "--tiny"),
        )
        for name in LEARNING
    },
}  # fmt: skip
Write = Callable[[dict], None]  # writes the figures that are known so far to the result file


def kernels(device: torch.device, *, tiny: bool, write: Write = lambda known: None) -> dict:
    """Compare the bank's loss, update and choice of rows, in both precisions, with the equations in float64.

    The update is compared only at shapes whose gradient in float64 is not too large to compute.

    Returns:
        who made the passes ("served_by": Triton, the CPU's code, or PyTorch alone), and for each shape and precision
        the errors ("off"): of the mean loss; of the rows' steps, relative to the largest step; and the number of keys
        whose chosen row is not the nearest one in float64.
    Raises:
        AssertionError: an error is larger than its bound.
    """
    found: dict[str, dict[str, float]] = {}
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
            nearest = (k.double() @ F.normalize(before, dim=1).T).argmax(1)
            off["rows chosen otherwise than in float64"] = (row != nearest).sum().item()
            found[f"N {N}, K {K}, D {D}, {precision}"] = off
            write({"off": found})
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


def waits(run: Path, *, tiny: bool, write: Write) -> dict:
    """Find where training steps wait for the GPU, and how often. PyTorch reports the waits
    (`torch.cuda.set_sync_debug_mode`). For each method the steps from the 12th to the 20th are watched; none of these
    is logged, because a logged step has to wait for its loss.

    Returns:
        for each method, the places in the source code ("FILE:LINE") and how often each waited in these steps; or the
        error that kept the method from running.
    """
    found: dict[str, dict] = {}
    for name in WAITING[:1] if tiny else WAITING:
        bank = ["bank.size=512"] if name in ("caco", "mocov2", "adco") else []
        few = ["method.num_prototypes=64"] if name in ("swav", "dino") else []
        steps = ["max_steps=30", "epochs=2", "log_every_steps=1000", "schedule.warmup_epochs=0", "eval=[]"]
        own = ["optimizer=sgd", "projector=small", "tracking=ledger", *SMALL]
        try:
            with _watched() as seen:
                _train(run / name, [f"method={name}", *own, *bank, *few, *steps])
            found[name] = {"places": dict(seen)}
        except Exception as error:  # noqa: BLE001 - one method failed; the others must still run
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        write({"waits": found})
    return {"waits": found}


@contextlib.contextmanager
def _watched() -> Iterator[Counter[str]]:
    """A context that counts, by place in the source code, PyTorch's warnings that the host waits for the GPU. It counts
    from the 12th to the 20th step of a training. Without a GPU there are no such warnings.
    """
    seen: Counter[str] = Counter()
    batches, gpu = trainer.Trainer.batches, torch.cuda.is_available()

    def some(self):
        for number, given in enumerate(batches(self)):
            if gpu and number in (11, 20):  # an epoch of the digits has 21 steps
                torch.cuda.set_sync_debug_mode("warn" if number == 11 else "default")
            yield given

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if "synchroniz" in str(message):
            seen[f"{Path(filename).name}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        trainer.Trainer.batches = some  # type: ignore[method-assign]
        try:
            yield seen
        finally:
            trainer.Trainer.batches = batches  # type: ignore[method-assign]
            if gpu:
                torch.cuda.set_sync_debug_mode("default")


def _train(folder: Path, overrides: list[str]) -> dict:
    composition.register()
    return run_training(composition.job_config(composition.compose(overrides)), folder)


def learn(name: str, data: Path | None, run: Path, *, tiny: bool, write: Write) -> dict:
    """Train one method for about 80 seconds and evaluate it by k-NN. A short first run measures how many epochs fit in
    the 80 seconds.

    Args:
        name: the method, a key of `LEARNING`.
        data: the folder with the unpacked images; not needed with `tiny`.
        run: a folder for the directories of the two runs.
    Returns:
        images per second, accuracy of k-NN in percent, seconds, and the summary of the run.
    """
    started = time.perf_counter()
    images = SMALL
    if not tiny:
        if data is None:
            raise SystemExit("learn: expected --data, a folder with train/ and test/, as pack takes it")
        images = ["data=cifar10_jpeg75", f"data.root={data}", "augmentation=cifar", "backbone=resnet18_cifar",
                  "batch=256", "loader.num_workers=8"]  # fmt: skip

    def train(folder: str, *overrides: str) -> dict:
        own = {key for key, _, _ in (override.partition("=") for override in overrides)}
        settings = [
            setting for setting in [*TRAINING, *LEARNING[name], *images] if setting.partition("=")[0] not in own
        ]
        return _train(run / folder, [*settings, *overrides])

    train("first", "max_steps=60", "epochs=10", "warm_start.steps=0", "warm_start.passes=null", "eval=[]")
    speed = _images_per_second(run / "first" / "ledger.jsonl", batch=64 if tiny else 256)
    # The time left before the stage's limit, less 20 s for the images, the k-NN evaluation and saving.
    seconds = 1 if tiny else min(LEARN_S, LEARN_LIMIT_S - 20 - (time.perf_counter() - started))
    epochs = max(2, int(seconds * speed / (1400 if tiny else 4 * PACKED_IMAGES // 5)))
    known = {"method": name, "images_per_second_at_first": speed, "epochs": epochs}
    write(known)
    whole = train("whole", f"epochs={epochs}")
    return known | {
        "images_per_second": whole["images_per_second"],
        "knn": whole["knn20_top1"],
        "training_s": time.perf_counter() - started,
        "summary": whole,
    }


def _images_per_second(ledger: Path, *, batch: int) -> float:
    """The speed of a short run, from its ledger. The first half of the ledger's rows is left out, because kernels are
    compiled in the first steps.
    """
    rows = [row for row in read_rows(ledger)[0] if row.get("kind") == "train"]
    early, late = rows[len(rows) // 2], rows[-1]
    return (late["step"] - early["step"]) * batch / max(late["time"] - early["time"], 1e-3)


def pack(folder: Path, to: Path) -> None:
    """Pack 20,000 images from class folders in train/ and test/ into a zip file. They are drawn with a fixed seed, and
    their files are not changed. Four fifths of them come from train/.

    Args:
        folder: the folder that has train/ and test/.
        to: the zip file that is written.
    Raises:
        SystemExit: there are too few images, or the zip file is too large for `PACKED_BYTES`.
    """
    chosen = list[Path]()
    for split, count in (("train", 4 * PACKED_IMAGES // 5), ("test", PACKED_IMAGES // 5)):
        files = sorted((folder / split).glob("*/*"))
        if len(files) < count:
            raise SystemExit(
                f"pack: expected at least {count:,} images in class folders below {folder / split}, got {len(files):,}"
            )
        chosen += random.Random(0).sample(files, count)
    to.parent.mkdir(parents=True, exist_ok=True)
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
    """Run the stages of the given sets, and write each stage's result and a list of all results (stages.json).

    Args:
        sets: "A", "B" or both.
        to: the folder of the results.
        data: the zip file that `pack` made; None: `DATA`, if it exists. Without one, set B's stages are left out.
    Returns:
        how many of the stages that were run did not succeed.
    Raises:
        SystemExit: one of caco's requirements is not installed.
    """
    lacking = lacks_gpu()
    to.mkdir(parents=True, exist_ok=True)
    report = Report(["stage", "result", "seconds, limit"], to / "stages.json")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"gpu_check: expected caco's requirements to be installed; missing: {', '.join(missing)}")
    if lacking:
        say(f"every stage runs at a tiny size: {lacking}")
    if data is None and DATA.exists():
        data = DATA
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="caco-gpu-check-") as top:
        unpacked = Path(top) / "data"
        for name, stage in STAGES.items():
            if stage.set not in sets:
                continue
            needs_data = not lacking and "{data}" in stage.arguments
            if needs_data and report.leave_out(name, None if data else f"no {DATA.parent.name}/{DATA.name}: pack it"):
                continue
            if needs_data and data is not None and not unpacked.exists():
                with zipfile.ZipFile(data) as packed:
                    packed.extractall(unpacked)
            places = {"{to}": str(to / f"{name}.json"), "{data}": str(unpacked), "{run}": str(Path(top) / name)}
            chosen = stage.tiny if lacking else stage.arguments
            command = [sys.executable, *(places.get(word, word) for word in chosen)]
            say(f"{name}, at most {stage.limit_s} s: {' '.join(command[1:])}")
            (to / f"{name}.json").unlink(missing_ok=True)
            started, log = time.perf_counter(), Path(top) / f"{name}.log"
            result = _run(command, log, stage.limit_s)
            taken = time.perf_counter() - started
            wrong += result != "done"
            of_stage = {"result": result, "seconds": round(taken, 1), "limit_s": stage.limit_s, "machine": machine()}
            of_stage |= {"printed_last": log.read_text(errors="replace")[-LOG_CHARACTERS:]}
            write_json(to / f"{name}.json", read_json(to / f"{name}.json") | {"stage": {"name": name, **of_stage}})
            report.row(name, result, f"{taken:.0f}, {stage.limit_s}")
            shutil.rmtree(Path(top) / name, ignore_errors=True)
    report.end(to / "stages.json")
    return wrong


def _run(command: list[str], log: Path, limit_s: int) -> str:
    """Run the command, with its output in the file `log`, for at most `limit_s` seconds. Then kill every process that
    it started. Returns in words how it ended.
    """
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return "stopped at its time limit"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "done" if code == 0 else f"failed with exit code {code}"


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="A and B are the two sets of stages, and the default is both. `pack FOLDER` packs images for set B. A"
        " single stage is kernels, waits or `learn METHOD`.",
    )
    options.add_argument(
        "--to",
        type=Path,
        help="The results are written into this folder (default: gpu-check). For pack, the images are written to this"
        " file (default: gpu-data/images.zip).",
    )
    options.add_argument(
        "--data",
        type=Path,
        help="Set B trains on the images in this file, which pack made (default: gpu-data/images.zip, if it exists).",
    )
    options.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    what, tiny = arguments.what or ["A", "B"], arguments.tiny
    if what[0] == "pack" and len(what) == 2:
        return pack(Path(what[1]), arguments.to or DATA)

    def write(known: dict) -> None:
        write_json(arguments.json, known)

    if what == ["kernels"]:
        return write(kernels(torch.device("cpu" if tiny else "cuda"), tiny=tiny, write=write))
    if what == ["waits"]:
        return write(waits(arguments.run, tiny=tiny, write=write))
    if what[0] == "learn" and len(what) == 2 and what[1] in LEARNING:
        return write(learn(what[1], arguments.data, arguments.run, tiny=tiny, write=write))
    if set(what) - {"A", "B"}:
        options.error(f"expected A, B or both, or pack FOLDER; got {' '.join(what)}")
    sys.exit(1 if stages(what, arguments.to or Path("gpu-check"), arguments.data) else 0)


if __name__ == "__main__":
    main()
