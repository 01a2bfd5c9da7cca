"""Run the demo with every instruction set of this processor and several seeds: does it learn with all of them?

    python -m experiments.demo                    evaluate every cell on held-out training images, then each encoder
                                                  once on the test images
    python -m experiments.demo --check            what the continuous integration runs: one seed, two instruction sets

A cell is one run of the demo: one instruction set and one seed. The first command (make demo-record) writes
experiments/records/demo/cells.json and README.md; it does not repeat runs that exist already. The recipe was chosen on
held-out training images (data.validation_fraction), and every cell must reach the goals below on them. Each encoder is
evaluated on the test images exactly once, and that result changes nothing in the recipe."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caco import instructions, metrics
from caco.runs.files import read_json
from caco.tracking import recorded

RECORD = Path(__file__).parent / "records" / "demo"
SEEDS = (0, 1, 2, 3, 4)
HELD_OUT = 0.2  # of the 1,400 training images: 280 to evaluate with, 1,120 to learn from

ACCURACIES = (f"{metrics.knn()}_top1", f"{metrics.probe()}_top1")  # what preset=demo measures

# Goals for every cell, on held-out images; k-NN in percent.
GOALS = {
    "k-NN of at least 97.0 at the end": lambda cell: cell.knn_end >= 97.0,
    "three points above the untrained network": lambda cell: cell.knn_end >= cell.knn_untrained + 3,
    "never below the untrained network from epoch 10 on": lambda cell: (
        min(cell.knn_from_epoch(10)) >= cell.knn_untrained
    ),
    "better than after the warm start": lambda cell: cell.knn_end > cell.knn_after_warm_start,
    "at least 20 % of the rows in use": lambda cell: cell.rows_used >= 20,
    "at most 25 % near-duplicate rows": lambda cell: cell.near_duplicates <= 25,
    "no warning of a collapse": lambda cell: not cell.warnings,
}
# Goals of --check, on test images. They are wider, because the check sees one seed, on an unknown processor.
CHECKED = {
    "k-NN at least 95.5": lambda cell: cell.knn_end >= 95.5,
    "two points above the untrained network": lambda cell: cell.knn_end >= cell.knn_untrained + 2,
    "no warning of a collapse": lambda cell: not cell.warnings,
}


@dataclass(frozen=True)
class Cell:
    """One run of the demo, read from its directory; accuracies and shares of rows are in percent."""

    level: str
    seed: int
    split: str
    knn: list[tuple[float | str, float]]  # (finished epochs or "warm start", k-NN accuracy) of each evaluation
    probe: float
    test: dict[str, float]  # the encoder's metrics on the test images; empty until look_at_test_images has evaluated it
    rows_used: float
    near_duplicates: float
    warnings: list[str]
    train_seconds: float
    environment: dict[str, str]

    @property
    def knn_untrained(self) -> float:
        return self.knn[0][1]

    @property
    def knn_after_warm_start(self) -> float:
        return next(value for epochs, value in self.knn if epochs == "warm start")

    @property
    def knn_end(self) -> float:
        return self.knn[-1][1]

    def knn_from_epoch(self, epoch: int) -> list[float]:
        return [value for epochs, value in self.knn if not isinstance(epochs, str) and epochs >= epoch]

    def missed(self, goals: dict[str, Any]) -> list[str]:
        """The goals that this cell does not reach."""
        return [name for name, reached in goals.items() if not reached(self)]


def read(run_dir: Path, level: str, seed: int, split: str) -> Cell:
    """Read the directory of a finished run as a cell."""
    run = recorded.read(run_dir)
    knn, probe = ACCURACIES
    environment = read_json(run_dir / "environment.json")
    kept = ("cpu", "cores", "torch", "python", "numpy", "git_sha", "git_dirty")
    return Cell(
        level=level,
        seed=seed,
        split=split,
        knn=[(row.get("phase", row["epochs"]), row[knn]) for row in run.rows if row["kind"] == "eval" and knn in row],
        probe=run.summary[probe],
        test=recorded.read(run_dir / "test").summary,
        rows_used=run.summary["bank/rows_used"],
        near_duplicates=run.summary["bank/near_duplicates"],
        warnings=[row["message"] for row in run.rows if row["kind"] == "warning"],
        train_seconds=run.rows[-1]["time"] - run.rows[0]["time"],
        environment={key: environment[key] for key in environment if key in kept or key.startswith("instructions")},
    )


def run(level: str, seed: int, split: str, *, folder: Path, threads: int | None) -> Cell:
    """Run the demo in a child process that uses the instruction set `level`, or read the run if it exists already.

    Raises:
        RuntimeError: the run failed; the message quotes the end of its standard error.
    """
    run_dir = folder / f"{level}-seed{seed}-{split}"
    command = [
        sys.executable,
        "-m",
        "caco.train",
        "preset=demo",
        f"seed={seed}",
        "tracking=ledger",
        f"hydra.run.dir={run_dir}",
    ]
    if split == "held-out":
        command.append(f"data.validation_fraction={HELD_OUT}")
    if not (run_dir / "summary.json").is_file():
        environment = instructions.child_environment(level) | (
            {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        )
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} with {instructions.VARIABLE}={level} failed:\n{done.stderr[-2000:]}"
            )
    cell = read(run_dir, level, seed, split)
    print(
        f"{level:7} seed {seed} {split}: k-NN {cell.knn_untrained:.2f} untrained, {cell.knn_after_warm_start:.2f} after"
        f" the warm start, {cell.knn_end:.2f} at the end; probe {cell.probe:.2f}; {cell.train_seconds:.0f} s",
        flush=True,
    )
    return cell


def look_at_test_images(cell: Cell, folder: Path) -> Cell:
    """Evaluate a cell's encoder on the test images, if that was not done before, and return the cell with the result.

    k-NN and probe use all 1,400 training images here, the 280 held-out ones included.
    """
    run_dir = folder / f"{cell.level}-seed{cell.seed}-{cell.split}"
    if not cell.test:
        command = [sys.executable, "-m", "caco.evaluate", f"run={run_dir}", "data.validation_fraction=null",
        "eval=[knn_all,probe]",
                   f"to={run_dir / 'test'}"]  # fmt: skip
        environment = instructions.child_environment(cell.level) | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} with {instructions.VARIABLE}={cell.level} failed:\n{done.stderr[-2000:]}"
            )
    return read(run_dir, cell.level, cell.seed, cell.split)


def levels() -> list[str]:
    """The instruction sets of this processor, and PyTorch without caco's compiled parts."""
    return [*instructions.processor(), "torch"]


def table(cells: list[Cell]) -> str:
    """The record as Markdown."""
    machine = cells[0].environment
    lines = [
        "# The demo on every instruction set",
        "",
        (
            f"`make demo-record`, on {machine['cpu']} with {machine['cores']} cores, torch {machine['torch']}, Python"
            f" {machine['python']}; one thread per run, two runs at a time. `plain`, `avx2`, ... limit caco's compiled"
            " code and PyTorch to that instruction set (`CACO_INSTRUCTIONS`); `torch` runs without caco's compiled"
            " code, and PyTorch uses the best instruction set of the processor."
        ),
        "",
        f"Training held out {HELD_OUT:.0%} of the 1,400 training images; the recipe was chosen on these 280 images"
        " ([how](../README.md)). The columns from untrained to probe give accuracies on them, in percent (one image is"
        " 0.36). Goals for every cell: " + "; ".join(GOALS) + ".",
        (
            "The last two columns evaluate the same encoders on the 397 test images (one image is 0.25), with all 1,400"
            " training images as neighbours. This was done once, after all cells had finished, and the recipe was not"
            " changed afterwards."
        ),
        "",
        (
            "| instruction set | seed | untrained | after the warm start | lowest from epoch 10 on | end | probe | rows"
            " used % | near-duplicates % | goals missed | test k-NN | test probe |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        lines.append(
            f"| {cell.level} | {cell.seed} | {cell.knn_untrained:.1f} | {cell.knn_after_warm_start:.1f} "
            f"| {min(cell.knn_from_epoch(10)):.1f} | {cell.knn_end:.1f} | {cell.probe:.1f} | {cell.rows_used:.0f} "
            f"| {cell.near_duplicates:.0f} | {'; '.join(cell.missed(GOALS)) or 'none'} "
            f"| {cell.test[ACCURACIES[0]]:.1f} | {cell.test[ACCURACIES[1]]:.1f} |"
        )
    return "\n".join(lines) + "\n"


def make_record(folder: Path, seeds: Iterable[int], jobs: int) -> int:
    """Run every cell on held-out images, and only then evaluate each encoder on the test images; write the record.

    Returns the number of missed goals over all cells.
    """
    todo = [(level, seed) for level in levels() for seed in seeds]
    with ThreadPoolExecutor(jobs) as pool:
        cells = list(pool.map(lambda cell: run(cell[0], cell[1], "held-out", folder=folder, threads=1), todo))
        cells = list(pool.map(lambda cell: look_at_test_images(cell, folder), cells))
    content = [{**vars(cell), "missed": cell.missed(GOALS)} for cell in cells]
    RECORD.mkdir(exist_ok=True)
    (RECORD / "cells.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (RECORD / "README.md").write_text(table(cells), encoding="utf-8")
    return sum(len(cell["missed"]) for cell in content)


def check(folder: Path) -> int:
    """Run seed 0 on the test images with the processor's two highest instruction sets; return how many runs failed.

    A processor with a single instruction set runs that one and PyTorch without caco's compiled code.
    """
    failed = 0
    for level in instructions.processor()[-2:] if len(instructions.processor()) > 1 else levels():
        cell = run(level, 0, "test", folder=folder, threads=None)
        if missed := cell.missed(CHECKED):
            failed += 1
            print(f"demo with {instructions.VARIABLE}={level}: missed: {'; '.join(missed)}", file=sys.stderr)
    print(f"demo: {2 - failed} passed, {failed} failed")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="run one seed with two instruction sets on test images, with wider goals"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/demo-record"), help="where the runs go; default: %(default)s"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: one per core")
    options = parser.parse_args()
    missed = check(options.folder) if options.check else make_record(options.folder, options.seeds, options.jobs)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
