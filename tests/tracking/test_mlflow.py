"""Each training run has one MLflow run, fed from the ledger. Every point arrives exactly once, even if a process is
killed, a run resumes, or the server is down.
"""

import json
import logging
import math
import socket
import statistics
import time

import pytest

from caco.tracking.ledger import Ledger
from caco.tracking.mlflow import MLflowTracker

PARAMS = {"bank.size": 8192, "pn": "both", "compile": False, "max_steps": None}


def begin(look, run_dir, state=None, params=PARAMS, **arguments):
    arguments = {
        "feed_seconds": 0.05,
        "finish_seconds": 240,
    } | arguments  # long enough for a busy machine
    tracker = MLflowTracker(uri=look.uri, experiment=look.experiment, **arguments)
    tracker.start(run_dir, params=params, tags={"git_sha": "abc", "host": "h"}, run_name="bank=1M", state=state)
    return tracker


def kill(tracker):
    """Simulate the end of the process: nothing more is sent, and nothing is closed."""
    feeder = tracker._feeder
    feeder.attempt = lambda: None
    feeder.stopping.set()
    feeder.join()
    feeder.feed.release()


def test_published_values_stand_beside_ours_from_the_beginning(look, tmp_path):
    tracker = begin(look, tmp_path, paper={"linear_top1": 71.3})
    tracker.log(1, {"linear_top1": 70.9}, kind="eval")
    tracker.finish("FINISHED", {})
    assert (look.points("paper/linear_top1"), look.points("eval/linear_top1")) == ([(0, 71.3)], [(1, 70.9)])


def test_a_run_is_found_by_config_name_and_holds_what_was_logged(look, tmp_path):
    (tmp_path / "config.yaml").write_text("batch: 64\n")
    tracker = begin(look, tmp_path)
    values = [0.1, 1 / 3, 5e-324, 1e300]
    for step, value in enumerate(values):
        tracker.log(step, {"loss": value, "note": "text stays in the ledger"})
    tracker.log(4, {"loss": 7.0}, kind="epoch")
    tracker.log(4, {"knn20_top1": 91.5}, kind="eval")
    tracker.finish("FINISHED", {"knn20_top1": 91.5, "steps": 5, "note": "x"})

    (run,) = look.runs("params.`bank.size` = '8192' and params.pn = 'both' and params.compile = 'false'")
    assert look.runs("params.`bank.size` = '4096'") == []
    assert run.data.params == {"bank.size": "8192", "pn": "both", "compile": "false", "max_steps": "null"}
    assert (run.info.run_name, run.info.status) == ("bank=1M", "FINISHED")
    assert run.data.tags["host"] == "h"
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert look.points("train/loss") == list(enumerate(values))
    assert look.points("epoch/loss") == [(4, 7.0)]
    assert look.points("eval/knn20_top1") == [(4, 91.5)]
    assert look.points("final/knn20_top1") == [(4, 91.5)]
    assert look.points("final/steps") == [(4, 5.0)]
    assert look.artifacts() == ["config.yaml", "summary.json"]
    history = look.client.get_metric_history(run.info.run_id, "train/loss")
    times = [int(row["time"] * 1000) for row in Ledger(tmp_path / "ledger.jsonl").rows() if row["kind"] == "train"]
    assert sorted(metric.timestamp for metric in history) == sorted(times)


def test_what_is_not_finite_stays_in_the_ledger_and_the_run_says_so(look, tmp_path):
    tracker = begin(look, tmp_path)
    tracker.log(1, {"loss": math.inf, "lr": 0.5})
    tracker.log(2, {"loss": 2.0, "lr": math.nan})
    tracker.finish("FAILED", {"loss": math.nan})
    assert look.points("train/loss") == [(2, 2.0)]
    assert look.points("train/lr") == [(1, 0.5)]
    assert look.run().data.tags["caco.non_finite"] == "train/loss, train/lr"
    assert look.run().info.status == "FAILED"


def test_more_parameters_values_and_characters_than_one_request_takes(look, tmp_path):
    params = {f"p.{i}": i for i in range(250)} | {"long": "x" * 7000, "views[0]": 1}
    tracker = begin(look, tmp_path, params=params)
    tracker.log(1, {f"m{i}": float(i) for i in range(1500)})
    tracker.log(2, {"m1499": 2.0})
    tracker.finish("FINISHED", {})
    assert len(look.run().data.params) == 252
    assert look.run().data.params["long"] == "x" * 6000
    assert look.run().data.params["views_0_"] == "1"
    assert len(look.run().data.metrics) == 1500
    assert look.points("train/m1499") == [(1, 1499.0), (2, 2.0)]


def test_a_resumed_run_goes_on_with_each_point_once_though_rows_were_rolled_back(look, tmp_path, eventually):
    tracker = begin(look, tmp_path)
    for step in range(4):
        tracker.log(step, {"loss": step / 7})
    eventually(lambda: tracker.state_dict()["sent"] == 4)
    state = tracker.state_dict()
    for step in range(4, 9):
        tracker.log(step, {"loss": step / 7})
    eventually(lambda: tracker.state_dict()["sent"] == 9)
    kill(tracker)

    # Another cadence of checkpoints: a parameter that changed must neither raise an error nor be changed in MLflow.
    tracker = begin(look, tmp_path, state, params={**PARAMS, "max_steps": 7, "new": 1})
    assert tracker.state_dict()["mlflow_run_id"] == state["mlflow_run_id"] == look.run().info.run_id
    assert look.run().info.status == "RUNNING"
    for step in range(4, 12):
        tracker.log(step, {"loss": step / 7})
    tracker.finish("FINISHED", {})
    assert look.points("train/loss") == [(step, step / 7) for step in range(12)]
    assert look.run().data.params == {
        "bank.size": "8192", "pn": "both", "compile": "false", "max_steps": "null", "new": "1"
    }  # fmt: skip
    assert look.run().info.status == "FINISHED"


def test_a_roll_back_that_is_itself_killed_and_rolled_back_doubles_nothing(look, tmp_path, eventually):
    state = None
    for end in (6, 3, 8):
        tracker = begin(look, tmp_path, state)
        for step in range(end):
            tracker.log(step, {"loss": step / 7})
        eventually(lambda tracker=tracker, end=end: tracker.state_dict()["sent"] == end)
        kill(tracker)
    assert look.points("train/loss") == [(step, step / 7) for step in range(8)]


def test_a_resume_with_another_logging_cadence_has_every_point_once(look, tmp_path, eventually):
    tracker = begin(look, tmp_path)
    for step in range(0, 60, 10):
        tracker.log(step, {"loss": step / 7})
        if step == 20:
            state = tracker.state_dict()
    eventually(lambda: tracker.state_dict()["sent"] == 6)
    kill(tracker)
    tracker = begin(look, tmp_path, state)
    for step in range(25, 75, 5):
        tracker.log(step, {"loss": step / 7})
    tracker.finish("FINISHED", {})
    assert look.points("train/loss") == [(step, step / 7) for step in [0, 10, *range(20, 75, 5)]]


@pytest.mark.parametrize("arrived", [True, False])
def test_a_kill_while_a_batch_is_on_its_way_neither_doubles_nor_loses_it(look, tmp_path, monkeypatch, arrived):
    tracker = MLflowTracker(uri=look.uri, experiment=look.experiment, feed_seconds=1000, finish_seconds=240)
    tracker.start(tmp_path, params={}, tags={}, run_name="n", state=None)
    tracker.log(0, {"loss": 0.0})
    tracker._feeder.attempt()
    state = tracker.state_dict()
    assert (state["rows"], state["sent"]) == (1, 1)
    tracker.log(1, {"loss": 0.5, "images_per_second": 10.0})
    tracker.log(2, {"loss": 0.25, "images_per_second": 11.0})
    feed = tracker._feeder.feed
    send = feed._client.log_batch

    def dies(*args, **kwargs):
        if arrived:
            send(*args, **kwargs)
        raise ConnectionResetError

    monkeypatch.setattr(feed._client, "log_batch", dies)
    tracker._feeder.attempt()
    kill(tracker)
    monkeypatch.undo()
    assert look.points("train/loss") == ([(0, 0.0), (1, 0.5), (2, 0.25)] if arrived else [(0, 0.0)])

    tracker = begin(look, tmp_path, state)
    tracker.log(1, {"loss": 0.5, "images_per_second": 99.0})
    tracker.log(2, {"loss": 0.25, "images_per_second": 98.0})
    tracker.finish("FINISHED", {})
    assert look.points("train/loss") == [(0, 0.0), (1, 0.5), (2, 0.25)]
    # Values measured by the clock differ the second time; the first ones must stay.
    assert look.points("train/images_per_second") == [(1, 10.0), (2, 11.0)]


def test_a_run_killed_before_its_first_checkpoint_goes_on_and_is_not_made_again(look, tmp_path, eventually):
    tracker = begin(look, tmp_path)
    tracker.log(0, {"loss": 1.0})
    eventually(lambda: tracker.state_dict()["sent"] == 1)
    kill(tracker)
    tracker = begin(look, tmp_path, None)
    tracker.log(0, {"loss": 1.0})
    tracker.log(1, {"loss": 0.5})
    tracker.finish("FINISHED", {})
    assert look.points("train/loss") == [(0, 1.0), (1, 0.5)]  # there is only one run


def test_a_kill_right_after_the_runs_creation_does_not_make_a_second_one(look, tmp_path):
    kill(begin(look, tmp_path))
    side = json.loads((tmp_path / "mlflow.json").read_text())
    # the run was created in MLflow, but its id was not yet noted here
    (tmp_path / "mlflow.json").write_text(json.dumps({**side, "run_id": ""}))
    tracker = begin(look, tmp_path)
    tracker.log(0, {"loss": 1.0})
    tracker.finish("FINISHED", {})
    assert look.points("train/loss") == [(0, 1.0)]


def test_without_the_side_file_the_checkpoint_knows_the_run(look, tmp_path, eventually):
    tracker = begin(look, tmp_path)
    tracker.log(0, {"loss": 1.0})
    eventually(lambda: tracker.state_dict()["sent"] == 1)
    state = tracker.state_dict()
    tracker.log(1, {"loss": 0.5})
    eventually(lambda: tracker.state_dict()["sent"] == 2)
    kill(tracker)
    (tmp_path / "mlflow.json").unlink()
    tracker = begin(look, tmp_path, state)
    tracker.log(1, {"loss": 0.5})
    tracker.log(2, {"loss": 0.25})
    tracker.finish("FINISHED", {})
    assert look.points("train/loss") == [(0, 1.0), (1, 0.5), (2, 0.25)]


def test_a_run_that_was_deleted_in_mlflow_is_made_anew_with_everything(look, tmp_path, eventually):
    tracker = begin(look, tmp_path)
    tracker.log(0, {"loss": 1.0})
    eventually(lambda: tracker.state_dict()["sent"] == 1)
    state = tracker.state_dict()
    kill(tracker)
    look.client.delete_run(state["mlflow_run_id"])
    tracker = begin(look, tmp_path, state)
    tracker.log(1, {"loss": 0.5})
    tracker.finish("FINISHED", {})
    assert look.run().info.run_id != state["mlflow_run_id"]
    assert look.points("train/loss") == [(0, 1.0), (1, 0.5)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_server_that_is_down_costs_one_warning_and_no_time(tmp_path, caplog, store, eventually, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = MLflowTracker(
        uri=f"http://127.0.0.1:{free_port()}", experiment="x", feed_seconds=0.01, finish_seconds=1.0
    )
    tracker.start(tmp_path, params=PARAMS, tags={}, run_name="n", state=None)
    seconds = []
    for step in range(200):
        began = time.thread_time()
        tracker.log(step, {"loss": 1 / (step + 1), "lr": 0.1, "images_per_second": 100.0})
        seconds.append(time.thread_time() - began)
    assert statistics.median(seconds) < 0.01 * 10 * 0.010  # 1 % of the ten steps of 10 ms between two rows
    assert tracker.state_dict() == {"rows": 200, "mlflow_run_id": "", "sent": 0}
    eventually(lambda: caplog.messages)
    tracker.finish("FINISHED", {"loss": 0.1})
    assert len(Ledger(tmp_path / "ledger.jsonl")) == 200
    down, lacks = [r.getMessage() for r in caplog.records if r.name.startswith("caco") and r.levelno >= logging.WARNING]
    assert "training goes on" in down
    assert f"python -m caco.tracking.sync {tmp_path}" in lacks
