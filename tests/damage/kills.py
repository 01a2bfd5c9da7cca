"""Commands that are killed at random instants, with all processes that they have started. The same command, killed
again now and then, ends with the results of a command that was left alone.
"""

import contextlib
import json
import re
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
from processes import caco_evaluate, caco_train
from tiny import TINY

from caco.runs.files import read_json
from caco.tracking.ledger import read_rows

TRAIN = [*TINY, "bank.size=128", "max_steps=8", "data.limit=128", "checkpoint.every_steps=2", "checkpoint.keep=2"]
SWEEP = ["-m", *TRAIN, "hydra.sweep.dir=sweep", "hydra.sweep.subdir=seed${seed}", "seed=0,1"]
CLOCK = ("time", "images_per_second")  # values of a ledger that differ between equal runs
RESULTS = ("loss", "knn20_20pct_top1", "probe_top1", "steps", "bank/row_norm_mean")  # of a summary
AGAIN = 0.4  # probability that the repeated command is killed, too


def export(*words: str) -> None:
    from caco.export import main

    sys.argv = ["caco-export", *words]
    main()


def sync(*words: str) -> None:
    from caco.tracking.sync import main

    sys.exit(main(list(words)))


COMMANDS: dict[str, tuple[Callable, list[str]]] = {
    "train": (caco_train, [*TRAIN, "loader.num_workers=1", "hydra.run.dir=run"]),
    "evaluate": (caco_evaluate, ["run=run", "eval=[knn,probe,linear]", "eval.linear.batch=64", "eval.linear.epochs=3"]),
    "export": (export, ["run=run", "to=exported"]),
    "sync": (sync, ["run", "--uri", "sqlite:///mlflow.db"]),
    "sweep": (caco_train, SWEEP),
    "jobs": (caco_train, [*SWEEP, "launcher=local"]),
}


class Prepared:
    """A command, the folder that it starts from, how long it takes, and its results when it is left alone."""

    def __init__(self, folder: Path, name: str):
        self.name, self.folder, self.start = name, folder, folder / "start"
        self.start.mkdir()
        if name in ("evaluate", "export", "sync"):
            code, told = forked.run(caco_train, *TRAIN, "hydra.run.dir=run", folder=self.start)
            assert code == 0, told
        if name == "sync":
            code, told = forked.run(new_store, folder=self.start)
            assert code == 0, told
        whole = self.again("whole")
        began = time.monotonic()
        code, told = self.run(whole)
        assert code == 0, told
        self.seconds, self.expected = time.monotonic() - began, results(whole)
        assert self.expected != results(self.start), "the command leaves results"

    def again(self, name: str) -> Path:
        """A new folder with what the command starts from."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.start, folder))

    def run(self, folder: Path, killed_after_s: float | None = None) -> tuple[int | None, str]:
        function, words = COMMANDS[self.name]
        return forked.run(function, *words, folder=folder, killed_after_s=killed_after_s)


def new_store() -> None:
    """Make a store, which takes MLflow seconds. The runs' own experiment is made later, because its artifacts stay in
    the folder where that happens.
    """
    from caco.tracking.store import connect, import_mlflow

    import_mlflow()
    connect("sqlite:///mlflow.db", "another")


def prepare(folder: Path, command: str) -> Prepared:
    if command == "sync":
        from caco.tracking.store import import_mlflow

        import_mlflow()
    return Prepared(folder, command)


def results(folder: Path) -> dict[str, Any]:
    """All numbers that a user reads, by file."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub("[0-9a-f]{32}", "ID", str(path.relative_to(folder)))  # MLflow's identifiers of runs are random
        if path.name == "ledger.jsonl":
            rows = read_rows(path)[0]
            found[name] = [json.dumps({k: v for k, v in row.items() if k not in CLOCK}) for row in rows]
        elif path.name == "summary.json":
            found[name] = {key: value for key, value in read_json(path).items() if key in RESULTS}
        elif path.parent.name == "evaluations" and path.suffix == ".json":
            found[name] = read_json(path)["results"]
        elif path.name == "model.safetensors":
            found[name] = path.read_bytes()
        elif path.name == "mlflow.db":
            found[name] = stored(path)
    return found


def stored(database: Path, experiment: str = "%") -> list[tuple]:
    """The number of runs in a store and all their values; a value that was sent twice occurs twice."""
    where = "from runs join experiments using (experiment_id)"
    named = "where experiments.name like ?"
    with contextlib.closing(sqlite3.connect(database)) as store:
        runs = store.execute(f"select count(*) {where} {named}", [experiment]).fetchone()
        values = f"select key, value, is_nan, step {where} join metrics using (run_uuid) {named}"
        return [runs, *sorted(store.execute(values, [experiment]))]


def case(prepared: Prepared, rng: np.random.Generator) -> str:
    folder, kills = prepared.again("killed"), 0
    while kills == 0 or (kills < 5 and rng.random() < AGAIN):
        seconds = float(rng.uniform(0, prepared.seconds))
        code, told = prepared.run(folder, killed_after_s=seconds)
        assert code is not None and "Traceback" not in told, told[-3000:]
        kills += 1
    code, told = prepared.run(folder)
    assert code == 0 and "Traceback" not in told, f"after {kills} kills: exit code {code}: {told[-3000:]}"
    found = results(folder)
    wrong = [name for name in {*found, *prepared.expected} if found.get(name) != prepared.expected.get(name)]
    assert not wrong, f"after {kills} kills: {[(found.get(n), prepared.expected.get(n)) for n in wrong]}"[:3000]
    left = [path.name for path in folder.rglob(".*") if re.search(r"\.(partial|\d+)$", path.name)]
    assert not left, f"after {kills} kills: left behind: {left}"
    return "killed, and gone on with to the same numbers"
