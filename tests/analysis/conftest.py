"""Results to analyse: made by hand at the smoke scale, and one real run that is also tracked by MLflow."""

import sys

import pytest

from analysis.results import Result
from caco.runs.identity import identity
from experiments.tables import experiments, load_scale, load_table

ENVIRONMENT = {
    "cpu": "a CPU",
    "gpus": "none",
    "cores": "2",
    "torch": "2.15.0",
    "git_sha": "0123456789abcdef",
    "git_dirty": "false",
}


@pytest.fixture(scope="session")
def table7():
    """The rows of Table VII at the smoke scale, by id."""
    return {one.row_id: one for one in experiments(load_table("7"), load_scale("smoke"))}


@pytest.fixture(scope="session")
def result(table7):
    """`result("both", 0, knn=50.0)` makes a finished run of that row and seed, with three evaluations from 30 to 50."""

    def make(row, seed, *, knn, digest="d1", rate=3600.0, **changed):
        one = table7[row]
        curve = [{"kind": "eval", "step": 0, "epochs": 0.0, "knn20_top1": 30.0}]
        for epoch in (0, 1):
            step = 29 + 21 * epoch if row in ("both", "negative") else 21 + 21 * epoch
            values = {"max_probability": 0.01 * (epoch + 1) + 0.001 * seed, "loss": 5.0}
            if row != "none":
                values |= {
                    "bank/rows_used": 10.0 * epoch,
                    "bank/use_entropy": 50.0,
                    "bank/near_duplicates": 1.0,
                    "bank/row_norm_mean": 1.0,
                }
            curve.append({"kind": "epoch", "step": step, "epoch": epoch, **values})
            curve.append(
                {"kind": "eval", "step": step, "epochs": epoch + 1.0, "knn20_top1": 30 + (knn - 30) * (epoch + 1) / 2}
            )
        summary = {"knn20_top1": knn, "probe_top1": knn + 5, "steps": step, "epochs": 2.0, "images_per_second": rate}
        summary |= {"processes": 2, "data": "digits/train", "data_digest": digest}
        about = {
            "name": f"table7-{row}-seed{seed}-{one.hash(seed)}", "hash": one.hash(seed), "seed": seed,
            "command": "python -m caco.train",
            "config": identity(one.with_seed(seed)), "environment": ENVIRONMENT, "summary": summary, "curve": curve,
            "label": {"table": "table7", "row": row, "scale": "smoke"}, "source": "ours.json",
        }  # fmt: skip
        return Result(**(about | changed))

    return make


@pytest.fixture(scope="session")
def record_of():
    """Turn results into a record, as its file has it."""
    from experiments.record import pack

    def make(results):
        return pack(
            [
                {"name": r.name, "command": r.command, "experiment": r.label, "config_hash": r.hash, "seed": r.seed,
                 "config": r.config, "environment": r.environment, "summary": r.summary, "curve": r.curve}
                for r in results
            ]
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(run directory, MLflow URI) of a short finished run of CaCo on digits."""
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from tiny import BANK, TINY, train

    from caco.config.composition import compose, job_config
    from caco.runs.directory import open_run

    folder = tmp_path_factory.mktemp("runs")
    uri = f"sqlite:///{folder}/mlflow.db"
    further = [
        "name=tiny",
        "tracking=mlflow",
        f"tracking.uri={uri}",
        "tracking.finish_seconds=240",
        "epochs=1",
        "max_steps=null",
    ]
    run_dir = folder / "tiny" / "one"
    open_run(run_dir, job_config(compose([*TINY, *BANK, *further])))
    train(run_dir, *further)
    return run_dir, uri


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """A module's main() as a function of its arguments, in an empty directory: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def of(module):
        def main(*arguments):
            monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
            try:
                module.main()
                code = 0
            except SystemExit as end:
                code = end.code
            told = capsys.readouterr()
            return code, told.out, told.err

        return main

    return of
