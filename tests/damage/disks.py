"""Disks that become full during a write: the run says so with exit code 2, and the same command later finishes as if
nothing had happened. A limit on file sizes simulates the disk; the first file that reaches the limit fails.
"""

import resource
import shutil
import signal
from pathlib import Path

import forked
import numpy as np
from processes import caco_train
from tiny import TINY

from caco.runs.files import read_json

SETTINGS = [*TINY, "bank.size=128", "max_steps=6", "data.limit=128", "checkpoint.every_steps=2", "checkpoint.keep=2"]
SAME = ("loss", "knn20_20pct_top1", "steps", "bank/row_norm_mean")


def prepare(folder: Path) -> tuple[Path, dict]:
    code, told = forked.run(train, "whole", None, folder=folder)
    assert code == 0, told
    return folder, read_json(folder / "whole" / "summary.json")


def train(name: str, limit: int | None) -> None:
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    caco_train(*SETTINGS, f"hydra.run.dir={name}")


def case(prepared: tuple[Path, dict], rng: np.random.Generator) -> str:
    folder, expected = prepared
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    limit = int(np.exp(rng.uniform(np.log(100), np.log(600_000))))
    code, told = forked.run(train, "run", limit, folder=folder)
    assert code in (0, 2) and "Traceback" not in told, f"limit {limit}: exit code {code}: {told[-3000:]}"
    again, more = forked.run(train, "run", None, folder=folder)
    found = read_json(run_dir / "summary.json")
    assert again == 0 and {name: found.get(name) for name in SAME} == {name: expected.get(name) for name in SAME}, (
        f"limit {limit}: {more[-3000:]}"
    )
    return "no file reached the limit" if code == 0 else "said, and gone on with to the same bits"
