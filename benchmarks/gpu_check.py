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
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

# If this is run as a file, import caco and benchmarks from this checkout, as python -m benchmarks.gpu_check does.
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import caco  # noqa: F401, I001 - before torch, because it sets torch's instruction set
import torch

from benchmarks.common import Report, lacks_gpu, machine, say
from benchmarks.gpu_stages import LEARN_LIMIT_S, LEARNING, PACKED_IMAGES, kernels, learn, waits
from caco.runs.files import read_json, write_json

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "gpu-data" / "images.zip"
PACKED_BYTES = 25_000_000
LOG_CHARACTERS = 6000  # the number of characters that are kept from the end of what a stage printed
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
