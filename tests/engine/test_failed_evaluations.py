"""If an evaluation during training fails, only its own results are missing; the run continues."""

import pytest
from processes import Process, caco_train
from recorded import assert_same, final, record
from tiny import BANK, TINY, train

from caco.engine.progress import ending
from caco.evals import classifier
from caco.evals.knn import KNN
from caco.runs.files import read_json

BOTH = [
    "data.limit=300",
    "eval=[knn,probe]",
    "eval.probe.when=epoch",
    "eval_every_epochs=1",
    "max_steps=null",
    "epochs=2",
]


@pytest.fixture
def failing(monkeypatch):
    """failing(2) makes the k-NN evaluator fail at its second call."""

    def make(*numbers, error=RuntimeError("no memory for the neighbours")):
        original, calls = KNN.run, []

        def run(self, backbone):
            calls.append(None)
            if len(calls) in numbers:
                raise error
            yield from original(self, backbone)

        monkeypatch.setattr(KNN, "run", run)

    return make


def test_a_failed_evaluation_is_named_and_the_run_goes_on_as_if_it_had_not_been(tmp_path, failing, capfd):
    whole = train(tmp_path / "whole", *BOTH)
    failing(3)  # the first two evaluations are before training and after the warm start
    summary = train(tmp_path / "failed", *BOTH)
    message = "eval.knn failed after 1 of 2 epochs: no memory for the neighbours"
    told = capfd.readouterr().err
    assert f"caco: {message}" in told and "Traceback" in told, "a bug is shown with its traceback"
    assert summary["failed_evaluations"] == [
        {"evaluator": "knn", "step": summary["failed_evaluations"][0]["step"], "message": message}
    ]
    assert {k: v for k, v in summary.items() if k not in ("images_per_second", "failed_evaluations")} == {
        k: v for k, v in whole.items() if k != "images_per_second"
    }
    rows, expected = record(tmp_path / "failed"), record(tmp_path / "whole")
    assert [row["message"] for row in rows if row["kind"] == "warning"] == [message]
    lacking = [dict(row) for row in expected]
    (after_one,) = [row for row in lacking if row["kind"] == "eval" and row["epochs"] == 1]
    assert after_one.pop("knn20_20pct_top1") is not None and "probe_top1" in after_one
    assert [row for row in rows if row["kind"] != "warning"] == lacking
    a, b = final(tmp_path / "whole"), final(tmp_path / "failed")
    assert_same(a["method"], b["method"])
    assert "1 evaluation failed:" in told and "exit code" not in told, "the last evaluation has its results"


def test_the_checkpoint_is_saved_before_the_evaluation_whatever_the_cadence(tmp_path, monkeypatch):
    """An evaluation may kill the process, by lack of memory or a time limit."""
    original = KNN.run

    def run(self, backbone):
        if (tmp_path / "cut" / "checkpoints").is_dir() and final(tmp_path / "cut")["place"][2] == 1:
            raise SystemExit(9)
        yield from original(self, backbone)

    monkeypatch.setattr(KNN, "run", run)
    cadence = [
        "data.limit=300",
        "eval=[knn]",
        "max_steps=null",
        "epochs=2",
        "eval_every_epochs=1",
        "checkpoint.every_epochs=100",
    ]
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", *cadence)
    state = final(tmp_path / "cut")
    assert state["place"][2:] == [1, 0] and state["evaluation_due"] == "epoch"


def test_results_that_are_missing_at_the_end_are_said_and_made_by_the_same_command(
    tmp_path, monkeypatch, failing, capfd
):
    failing(4)
    summary = train(tmp_path / "run", *BOTH)
    assert "knn20_20pct_top1" in summary and summary["failed_evaluations"][0]["step"] == summary["steps"]
    told = capfd.readouterr().err
    assert "caco:   eval.knn failed after 2 of 2 epochs: no memory" in told and "the exit code is 3" in told
    assert read_json(tmp_path / "run" / "summary.json")["failed_evaluations"] == summary["failed_evaluations"]
    monkeypatch.undo()
    again = train(tmp_path / "run", *BOTH)
    assert "failed_evaluations" not in again and again == read_json(tmp_path / "run" / "summary.json")
    assert train(tmp_path / "run", *BOTH) == again, "a further call must compute nothing"
    assert [row["epochs"] for row in record(tmp_path / "run") if row["kind"] == "eval"] == [0.0, 0.0, 1.0, 2.0]


def test_a_command_whose_run_lacks_results_ends_with_exit_code_3(tmp_path):
    # With this rate the loss becomes infinite, which cannot be known before the run.
    linear = [
        "eval=[linear]",
        "eval.linear.epochs=1",
        "eval.linear.batch=64",
        "eval.linear.larc=false",
        "eval.linear.lr=1e39",
    ]
    short = ["data.limit=300", "epochs=1", "max_steps=3", "warm_start.steps=0"]
    tiny = [item for item in TINY if not item.startswith(("eval=", "epochs=", "max_steps="))]
    command = [*tiny, *BANK, *linear, *short, f"hydra.run.dir={tmp_path}"]
    code, _, err = Process(caco_train, *command).end()
    assert code == 3, err
    assert (
        "Traceback" not in err
        and "eval.linear failed after" in err
        and "the loss became" in err
        and "caco: finished in" in err
    )
    assert not (tmp_path / "failure.txt").exists() and read_json(tmp_path / "summary.json")["steps"] == 3


def test_the_ending_names_what_failed():
    failed = [
        {"evaluator": "linear", "step": 10, "message": "eval.linear failed after 1 of 2 epochs: no memory\nmore of it"}
    ]
    summary = {"probe_top1": 50.0, "steps": 20, "failed_evaluations": failed}
    lines = ending(summary, seconds=5, run_dir="runs/x", evaluators=[], commands=False).splitlines()
    assert lines[1:] == ["caco: 1 evaluation failed:", "caco:   eval.linear failed after 1 of 2 epochs: no memory"]


class Cut(BaseException):
    pass


def test_a_linear_evaluation_while_training_goes_on_from_its_last_epoch(tmp_path, monkeypatch):
    linear = [
        "data.limit=300",
        "eval=[linear]",
        "eval.linear.epochs=4",
        "eval.linear.batch=64",
        "eval.linear.larc=false",
        "max_steps=3",
        "warm_start.steps=0",
    ]
    whole = train(tmp_path / "whole", *linear)
    epochs, original = [], classifier._epoch

    def cut(*args, **kwargs):
        epochs.append(args[4])
        if len(epochs) == 3:
            raise Cut
        return original(*args, **kwargs)

    monkeypatch.setattr(classifier, "_epoch", cut)
    with pytest.raises(Cut):
        train(tmp_path / "cut", *linear)
    resumed = train(tmp_path / "cut", *linear)
    assert epochs == [0, 1, 2, 2, 3]
    assert {k: v for k, v in whole.items() if k != "images_per_second"} == {
        k: v for k, v in resumed.items() if k != "images_per_second"
    }
    assert not list((tmp_path / "cut" / "evaluations" / "classifiers").iterdir()), (
        "the classifiers' state must be removed when the results exist"
    )
    assert not (tmp_path / "cut" / "evaluations" / "features").exists(), (
        "features of a network in training are not stored, because they are valid for one round only"
    )
