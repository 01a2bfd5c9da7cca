"""TensorBoard and Weights & Biases with their own packages and without a network: they are fed from the ledger, and get
each point once.
"""

import csv
import logging
import math
import subprocess
import sys

import pytest

from caco.errors import UserError
from caco.runs.files import read_json, write_json
from caco.tracking import export
from caco.tracking.fed import Feeder
from caco.tracking.ledger import LedgerTracker
from caco.tracking.tensorboard import TensorBoardFeed, TensorBoardTracker
from caco.tracking.wandb import WandbTracker

LONG = pytest.mark.long  # wandb starts a process for each run
FAST = {"feed_seconds": 0.05, "finish_seconds": 120, "system_seconds": 0}
ABOUT = {"params": {"bank.size": 8192, "pn": "both"}, "tags": {"data": "digits"}, "run_name": "bank=1M"}


def scalars(run_dir):
    """{series: [(step, value), ...]} as TensorBoard's own reader gives them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def records(file):
    """The records of a W&B file. It is LevelDB's log format after a header of 7 bytes: blocks of 32 KiB with pieces of
    records, each with a header of 7 bytes.
    """
    content, at, whole = file.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last piece
            yield whole
            whole = b""


def history(run_dir):
    """The content of W&B's files: the logged rows of all files of a run, the project and id of each file, and the last
    summary.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    rows, runs, summary = [], [], {}
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for content in records(file):
            record = Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {(item.key or "/".join(item.nested_key)): float(item.value_json) for item in record.history.item}
                )
            if record.WhichOneof("record_type") == "run":
                runs.append((record.run.project, record.run.run_id, record.run.display_name))
            if record.WhichOneof("record_type") == "summary":
                summary |= {(item.key or "/".join(item.nested_key)): item.value_json for item in record.summary.update}
    return rows, runs, summary


def tensorboard():
    return TensorBoardTracker(**FAST)


def wandb():
    return WandbTracker(project="caco", mode="offline", **FAST)


def test_tensorboard_reads_every_series_by_its_name(tmp_path):
    tracker = TensorBoardTracker(**FAST, paper={"knn20_top1": 60.0})
    tracker.start(tmp_path, **ABOUT, state=None)
    for step in range(300):
        tracker.log(step, {"loss": step / 7, "note": "text stays in the ledger", "odd": math.nan})
    tracker.log(300, {"loss": 7.0}, kind="epoch")
    tracker.log(300, {"knn20_top1": 91.5}, kind="eval")
    tracker.finish("FINISHED", {"knn20_top1": 91.5, "steps": 300, "note": "x"})
    assert scalars(tmp_path) == {
        "train/loss": [(step, step / 7) for step in range(300)],
        "epoch/loss": [(300, 7.0)],
        "eval/knn20_top1": [(300, 91.5)],
        "final/knn20_top1": [(300, 91.5)],
        "final/steps": [(300, 300.0)],
        "paper/knn20_top1": [(0, 60.0)],
    }


@LONG
def test_wandb_without_a_network_holds_every_number_beside_its_step(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # so that a request to the network fails
    tracker = wandb()
    tracker.start(tmp_path, **ABOUT, state=None)
    for step in range(5):
        tracker.log(step, {"loss": step / 7, "lr": 0.1})
    tracker.log(5, {"knn20_top1": 91.5}, kind="eval")
    tracker.finish("FINISHED", {"knn20_top1": 91.5})
    rows, ((project, run_id, name),), summary = history(tmp_path)
    kept = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    assert kept == [
        *({"train/loss": step / 7, "train/lr": 0.1, "train/step": step} for step in range(5)),
        {"eval/knn20_top1": 91.5, "eval/step": 5},
    ]
    assert (project, run_id, name) == ("caco", read_json(tmp_path / "wandb.json")["token"], "bank=1M")
    assert summary["final/knn20_top1"] == "91.5"


@pytest.mark.parametrize("make", [tensorboard, pytest.param(wandb, marks=LONG)])
def test_a_run_that_goes_on_from_a_checkpoint_has_each_point_once(tmp_path, make):
    tracker = make()
    tracker.start(tmp_path, **ABOUT, state=None)
    for step in range(4):
        tracker.log(step, {"loss": float(step)})
    state = tracker.state_dict()
    for step in range(4, 7):
        tracker.log(step, {"loss": float(step)})
    tracker.finish("KILLED", {})

    tracker = make()
    tracker.start(tmp_path, **ABOUT, state=state)  # this rolls back three rows that had been sent
    for step in range(4, 9):
        tracker.log(step, {"loss": float(step)})
    tracker.finish("FINISHED", {})
    if make is tensorboard:
        assert scalars(tmp_path)["train/loss"] == [(step, float(step)) for step in range(9)]
    else:
        rows, runs, _ = history(tmp_path)
        assert sorted((row["train/step"], row["train/loss"]) for row in rows) == [
            (step, float(step)) for step in range(9)
        ]
        assert len({run_id for _, run_id, _ in runs}) == 1, "one run may have several files, one for each process"


@pytest.mark.parametrize("make", [tensorboard, pytest.param(wandb, marks=LONG)])
def test_what_fails_costs_one_warning_and_nothing_of_the_run(tmp_path, make, caplog, monkeypatch):
    tracker = make()
    monkeypatch.setattr(
        type(tracker.feed_of(tmp_path)), "send", lambda self: (_ for _ in ()).throw(OSError("no such thing"))
    )
    tracker.finish_seconds = 0.5
    with caplog.at_level(logging.WARNING):
        tracker.start(tmp_path, **ABOUT, state=None)
        for step in range(3):
            tracker.log(step, {"loss": float(step)})
        tracker.finish("FINISHED", {})
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 3
    first, last = (record.getMessage() for record in caplog.records if record.name.startswith("caco"))
    assert "no such thing; training goes on, the ledger keeps all" in first
    assert f"lacks a part of this run; to send it: python -m caco.tracking.export {tmp_path}" in last


def test_wandb_is_not_begun_where_nobody_has_logged_in(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="there is no login .* tracking.mode=offline"):
        WandbTracker(project="caco")


@pytest.fixture
def sweep(tmp_path):
    """Two runs that only have a ledger; one of them has a value that is not finite."""
    for name in ("seed-0", "seed-1"):
        tracker = LedgerTracker(system_seconds=0)
        tracker.start(tmp_path / "runs" / name, **ABOUT, state=None)
        for step in range(3):
            tracker.log(step, {"loss": 1 / (step + 1)})
        tracker.log(3, {"knn20_top1": math.inf if name == "seed-1" else 0.1 + 0.2}, kind="eval")
        tracker.finish("FINISHED", {})
        write_json(tmp_path / "runs" / name / "summary.json", {"knn20_top1": 91.5})
    return tmp_path / "runs"


def test_the_curves_of_a_sweep_are_one_csv_with_every_digit(sweep, tmp_path, capsys):
    assert export.main([str(sweep), "--csv", str(tmp_path / "curves.csv")]) == 0
    assert "curves.csv: 8 numbers of 2 runs" in capsys.readouterr().out
    with open(tmp_path / "curves.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["kind"], row["step"], row["name"], float(row["value"])) for row in rows] == [
        *(("seed-0", "train", str(step), "loss", 1 / (step + 1)) for step in range(3)),
        ("seed-0", "eval", "3", "knn20_top1", 0.1 + 0.2),
        *(("seed-1", "train", str(step), "loss", 1 / (step + 1)) for step in range(3)),
        ("seed-1", "eval", "3", "knn20_top1", math.inf),
    ]


def test_runs_of_another_tracking_are_sent_later(sweep):
    assert export.main([str(sweep), "--tensorboard"]) == 0
    assert export.main([str(sweep), "--tensorboard"]) == 0, "the files must be written again, not doubled"
    assert scalars(sweep / "seed-0")["train/loss"] == [(step, 1 / (step + 1)) for step in range(3)]
    assert scalars(sweep / "seed-0")["final/knn20_top1"] == [(3, 91.5)]


@LONG
def test_runs_of_another_tracking_are_sent_to_wandb_once(sweep, capsys):
    for _ in range(2):
        assert export.main([str(sweep / "seed-0"), "--wandb", "caco", "--offline"]) == 0
    rows, _, _ = history(sweep / "seed-0")
    assert [row["train/step"] for row in rows if "train/step" in row] == [0, 1, 2]
    assert "points (FINISHED)" in capsys.readouterr().out


def test_nothing_is_imported_of_what_was_not_chosen():
    code = (
        "import sys, caco.tracking.ledger, caco.tracking.export; assert not {'wandb', 'tensorboard', 'torch', 'mlflow'}"
        " & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_feeder_never_holds_up_an_exit(tmp_path):
    assert Feeder(TensorBoardFeed(tmp_path), 1.0).daemon
