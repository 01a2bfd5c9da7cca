"""The worker process of experiments.compare: runs one commit's cases one after another, so that torch is imported only
once.

experiments/compare/running.py starts it as `python -P experiments/compare/worker.py JOB.json`, with the commit's files
first on PYTHONPATH. The worker belongs to another commit than the code that it runs. It therefore relies only on what a
user can rely on: the command line of caco.train, conf/, and checkpoints/*.pt with the step in their names. Each case
writes FOLDER/run, its output as output-RANK.txt, and outcome-RANK.json.
"""

import contextlib
import importlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMALL_BANK = "bank.size=128"  # for every case with a bank; two batches of 64 images fill it


@contextlib.contextmanager
def said_into(path: Path) -> Iterator[None]:
    """Append everything that this process and its children write to stdout and stderr to a file."""
    kept = os.dup(1), os.dup(2)
    try:
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def with_small_bank(overrides: list[str], conf: Path) -> list[str]:
    """The overrides with a small bank added, if the case has a bank and does not set its size.

    Overrides that do not compose are returned unchanged; caco.train then reports why.
    """
    import hydra

    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            bank = hydra.compose("config", overrides).get("bank")
    except Exception:
        return overrides
    sized = any(override.startswith("bank.size=") for override in overrides)
    return overrides if bank is None or sized else [*overrides, SMALL_BANK]


def train(overrides: list[str]) -> None:
    """Do what `python -m caco.train ... hydra.run.dir=run` does.

    Raises:
        RuntimeError: caco.train ended with a non-zero exit code; its own message is in the output.
    """
    sys.argv = ["caco-train", *overrides, "hydra.run.dir=run"]
    try:
        importlib.import_module("caco.train").main()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"caco.train ended with exit code {ended.code}") from ended


def take_back(run_dir: Path, step: int) -> Path:
    """Turn a finished run into one that was interrupted after `step`; returns the checkpoint of that step, from which
    the run must resume.
    """
    numbers = {path: int(re.findall(r"\d+", path.stem)[-1]) for path in run_dir.glob("checkpoints/**/*.pt")}
    kept = [path for path, number in numbers.items() if number == step]
    if not kept or max(numbers.values()) == step:
        raise RuntimeError(f"expected checkpoints of step {step} and of later ones, got {sorted(numbers.values())}")
    for path, number in numbers.items():
        if number > step:
            path.unlink()
    (run_dir / "summary.json").unlink()
    return kept[0]


def run(case: dict[str, Any], conf: Path, rank: int) -> None:
    overrides = with_small_bank(case["overrides"], conf)
    train(overrides)
    if case["cut_at"] is None:
        return
    if rank == 0:
        kept = take_back(Path("run"), case["cut_at"])
        saved = kept.stat().st_mtime_ns
    train(overrides)
    if rank == 0 and kept.stat().st_mtime_ns != saved:
        raise RuntimeError(f"expected the run to go on from step {case['cut_at']}; it began anew")


def last_words(output: Path, error: BaseException) -> str:
    """Why a case failed, in a line or two: caco's own message if it refused the case, else the exception."""
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.startswith("caco: ")]
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, SystemExit) and lines:
        return lines[-1].removeprefix("caco: ")
    return "".join(traceback.format_exception_only(error)).strip()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    tree, rank = Path(job["tree"]), int(os.environ.get("RANK", "0"))
    broken: BaseException | None = None
    try:
        caco = importlib.import_module("caco.train")  # before torch: caco may have to set torch's instruction set
        if not Path(caco.__file__ or "").resolve().is_relative_to(tree.resolve()):
            raise ImportError(f"expected caco from {tree}, got {caco.__file__}")
        torch = importlib.import_module("torch")
        torch.set_num_threads(1)
    except Exception as error:
        broken = error
    for case in job["cases"]:
        folder = Path(case["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        os.environ["MASTER_PORT"] = str(case["port"])
        output, failure = folder / f"output-{rank}.txt", broken
        started, begun = time.monotonic(), time.process_time()
        with said_into(output):
            try:
                if broken is None:
                    run(case, tree / "conf", rank)
            except Exception as error:
                failure = error
                traceback.print_exc()
            if broken is None and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # so that the next case can make its own
        outcome = {
            "error": None if failure is None else last_words(output, failure),
            "seconds": time.monotonic() - started,
            "cpu_seconds": time.process_time() - begun,
        }
        aside = folder / f".outcome-{rank}"
        aside.write_text(json.dumps(outcome))
        aside.rename(folder / f"outcome-{rank}.json")
        if rank == 0:
            end = "failed" if failure else "done"
            print(
                f"compare: {job['side']}: {case['name']}: {end}, {outcome['seconds']:.1f} s",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    main()
