"""Disks that become full during a write: the run says so with exit code 2, and the same command later finishes as if
nothing had happened. A limit on file sizes simulates the disk; the first file that reaches the limit fails.
"""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
from processes import caco_train
from tiny import TINY

from caco.runs.files import read_json

_fork = multiprocessing.get_context("fork")
SETTINGS = [*TINY, "bank.size=128", "max_steps=6", "data.limit=128", "checkpoint.every_steps=2", "checkpoint.keep=2"]
SAME = ("loss", "knn20_20pct_top1", "steps", "bank/row_norm_mean")
PATIENCE_S = 50.0


def prepare(folder: Path) -> tuple[Path, dict]:
    code, told = run(folder / "whole", None)
    assert code == 0, told
    return folder, read_json(folder / "whole" / "summary.json")


def run(run_dir: Path, limit: int | None) -> tuple[int | None, str]:
    """Exit code and standard error; the code is None if it did not end."""
    read, write = os.pipe()
    process = _fork.Process(target=_train, args=(run_dir, limit, write))
    process.start()
    os.close(write)
    told = b""
    while part := os.read(read, 65536):
        told += part
    os.close(read)
    process.join(PATIENCE_S)
    if process.is_alive():
        process.kill()
        return None, told.decode(errors="replace")
    return process.exitcode, told.decode(errors="replace")


def _train(run_dir: Path, limit: int | None, told: int) -> None:
    os.dup2(told, 1)
    os.dup2(told, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w"),
        os.fdopen(2, "w"),
    )  # pytest's streams write to files, to which the limit would apply, too
    os.chdir(run_dir.parent)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    caco_train(*SETTINGS, f"hydra.run.dir={run_dir}")


def case(prepared: tuple[Path, dict], rng: np.random.Generator) -> str:
    folder, expected = prepared
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    limit = int(np.exp(rng.uniform(np.log(100), np.log(600_000))))
    code, told = run(run_dir, limit)
    assert code in (0, 2) and "Traceback" not in told, f"limit {limit}: exit code {code}: {told[-3000:]}"
    again, more = run(run_dir, None)
    found = read_json(run_dir / "summary.json")
    assert again == 0 and {name: found.get(name) for name in SAME} == {name: expected.get(name) for name in SAME}, (
        f"limit {limit}: {more[-3000:]}"
    )
    return "no file reached the limit" if code == 0 else "said, and gone on with to the same bits"
