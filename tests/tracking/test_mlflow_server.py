"""A real `mlflow server` that is slow, hangs, loses its answers, disappears or is killed does not disturb a run."""

import os
import signal
import statistics
import time

import pytest
from ports import unused_port
from wire import Wire

from caco.tracking import dashboard
from caco.tracking.ledger import Ledger
from caco.tracking.mlflow import MLflowTracker
from caco.tracking.sync import main


@pytest.fixture(scope="module")
def server(new_store, tmp_path_factory):
    """(port, database, process) of a real server, as the dashboard starts it."""
    database = new_store(tmp_path_factory.mktemp("server"))
    port = unused_port()
    with dashboard.server(database, host="127.0.0.1", port=port, wait_s=280) as process:
        yield port, database, process


@pytest.fixture
def wire(server, monkeypatch):
    # So that this tests the feeder's own retries, and no request is given up because the machine is busy.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "240")
    wire = Wire(server[0])
    yield wire
    wire.close()


@pytest.fixture
def there(server, look):
    """The content of this test's experiment in the server's database."""
    return type(look)(server[1], look.experiment)


def begin(wire, experiment, run_dir, **arguments):
    tracker = MLflowTracker(uri=wire.uri, experiment=experiment, feed_seconds=0.05, **arguments)
    (run_dir / "config.yaml").write_text("batch: 64\n")
    tracker.start(run_dir, params={"bank.size": 8192}, tags={}, run_name="n", state=None)
    return tracker


def log(tracker, first, last, pause=0.0):
    """Log the rows from `first` to `last` - 1; returns the median processor time of log() in this thread, in
    seconds.
    """
    seconds = []
    for step in range(first, last):
        began = time.thread_time()
        tracker.log(step, {"loss": step / 7, "lr": 1 / (step + 1)})
        seconds.append(time.thread_time() - began)
        time.sleep(pause)
    return statistics.median(seconds)


ONE_PERCENT = 0.01 * 10 * 0.010  # of the ten steps of 10 ms between two rows


def expected(num_rows):
    return [(step, step / 7) for step in range(num_rows)]


def sent(tracker):
    return tracker.state_dict()["sent"]


def test_all_arrives_through_http(wire, there, tmp_path):
    tracker = begin(wire, there.experiment, tmp_path, finish_seconds=240)
    log(tracker, 0, 600)
    tracker.finish("FINISHED", {"knn20_top1": 90.5})
    assert there.points("train/loss") == expected(600)
    assert there.points("final/knn20_top1") == [(599, 90.5)]
    assert there.run().data.params == {"bank.size": "8192"}
    assert there.run().info.status == "FINISHED"
    through = type(there)(wire.uri, there.experiment)
    assert through.artifacts() == ["config.yaml", "summary.json"]


@pytest.mark.parametrize("mode", ["slow", "hangs"])
def test_a_server_that_answers_late_or_never_takes_no_time_and_loses_nothing(
    wire, there, tmp_path, eventually, caplog, mode
):
    tracker = begin(wire, there.experiment, tmp_path, finish_seconds=0.5)
    log(tracker, 0, 10)
    eventually(lambda: sent(tracker) == 10)
    wire.mode = mode
    assert log(tracker, 10, 300) < ONE_PERCENT
    if mode == "hangs":
        assert sent(tracker) == 10, "the server must not have answered yet when 300 rows are logged"
    feeder = tracker._feeder
    tracker.finish("FINISHED", {})
    assert feeder.is_alive(), "finish() must not wait for the server"
    assert len(Ledger(tmp_path / "ledger.jsonl")) == 300
    assert f"python -m caco.tracking.sync {tmp_path}" in caplog.messages[-1]
    # The process ends, and with it the feeder.
    feeder.attempt = lambda: None
    wire.mode = "cut"
    feeder.join()
    feeder.feed.release()
    wire.mode = "through"
    assert main([str(tmp_path)]) == 0  # sends to the server that the run has recorded
    assert there.points("train/loss") == expected(300)
    assert there.run().info.status == "FINISHED"


@pytest.mark.parametrize("mode", ["loses answers", "cut"])
def test_an_outage_during_a_run_is_made_up_for_when_it_is_over(wire, there, tmp_path, eventually, caplog, mode):
    tracker = begin(wire, there.experiment, tmp_path, finish_seconds=240)
    log(tracker, 0, 10)
    eventually(lambda: sent(tracker) == 10)
    wire.mode = mode
    log(tracker, 10, 40, pause=0.02)
    wire.mode = "through"
    log(tracker, 40, 60)
    eventually(lambda: sent(tracker) == 60)
    tracker.finish("FINISHED", {})
    assert there.points("train/loss") == expected(60)
    assert there.run().info.status == "FINISHED"
    assert len(caplog.messages) == 1  # one line for the outage, none at the end
    assert "training goes on" in caplog.messages[0]


def test_a_run_whose_creation_was_not_answered_is_created_once(wire, there, tmp_path, eventually):
    wire.mode = "loses answers"
    tracker = begin(wire, there.experiment, tmp_path, finish_seconds=240)
    log(tracker, 0, 30, pause=0.02)
    wire.mode = "through"
    eventually(lambda: sent(tracker) == 30)
    tracker.finish("FINISHED", {})
    assert there.points("train/loss") == expected(30)  # there is only one run


def test_a_server_killed_during_a_run_loses_nothing_after_a_sync(server, wire, there, tmp_path, eventually, caplog):
    tracker = begin(wire, there.experiment, tmp_path, finish_seconds=240)
    log(tracker, 0, 100)
    eventually(lambda: sent(tracker) == 100)
    os.killpg(server[2].pid, signal.SIGKILL)
    server[2].wait()
    assert log(tracker, 100, 400) < ONE_PERCENT
    (tmp_path / "summary.json").write_text('{"knn20_top1": 90.5}')
    tracker.finish("FINISHED", {"knn20_top1": 90.5})
    assert there.points("train/loss") == expected(100)
    assert len(caplog.messages) == 2
    # The database survived the server, so a sync to it continues the same run.
    assert main([str(tmp_path), "--uri", server[1]]) == 0
    assert main([str(tmp_path), "--uri", server[1]]) == 0
    assert there.points("train/loss") == expected(400)
    assert there.points("final/knn20_top1") == [(399, 90.5)]
    assert there.run().info.status == "FINISHED"
