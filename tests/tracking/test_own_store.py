"""A run belongs to one MLflow store: a later sync finds this store, counts what it has, and reports what was sent
where.
"""

import logging
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from caco.runs.files import read_json, write_json
from caco.tracking.ledger import LedgerTracker
from caco.tracking.mlflow import MLflowTracker
from caco.tracking.store import own_uri
from caco.tracking.sync import main

ROOT = Path(__file__).parents[2]


def track(run_dir: Path, uri: str | None, *, steps=3, state=None, experiment="caco", **more):
    tracker = MLflowTracker(
        uri=uri, experiment=experiment, feed_seconds=0.05, finish_seconds=60, system_seconds=0, **more
    )
    run_dir.mkdir(exist_ok=True)
    tracker.start(run_dir, params={"seed": 0, "tracking.uri": uri}, tags={}, run_name="n", state=state)
    for step in range(steps):
        tracker.log(step, {"loss": step / 7})
    return tracker


def told(capsys) -> str:
    return capsys.readouterr().out.splitlines()[0]


def test_a_run_that_never_reached_its_server_is_sent_there_and_not_elsewhere(look, tmp_path, capsys, monkeypatch):
    """The run's server is down during training; the shell that sends the run later names another store, or none."""
    tracker = track(tmp_path / "run", "http://127.0.0.1:9", experiment=look.experiment)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker.finish_seconds = 0.1
    tracker.finish("FINISHED", {})
    assert read_json(tmp_path / "run" / "tracking.json")["store"] == {
        "uri": "http://127.0.0.1:9",
        "experiment": look.experiment,
    }
    assert own_uri(tmp_path / "run") == "http://127.0.0.1:9"
    assert main([str(tmp_path / "run")]) == 1 and "not sent: " in told(capsys)
    assert not (tmp_path / "mlflow.db").exists(), "no other store may be created"
    assert main([str(tmp_path / "run"), "--uri", look.uri]) == 0
    assert told(capsys).startswith(f"{tmp_path / 'run'}: sent 3 rows of 3 to {look.uri} (FINISHED, run ")
    assert look.points("train/loss") == [(step, step / 7) for step in range(3)]
    assert own_uri(tmp_path / "run") == look.uri, "the newly chosen store must be recorded"
    assert main([str(tmp_path / "run")]) == 0 and f"complete (FINISHED, 3 rows in {look.uri})" in told(capsys)


@pytest.mark.parametrize("recorded", ["tracking.json", "config.yaml"])
def test_a_run_of_an_earlier_version_belongs_where_its_settings_say(tmp_path, recorded):
    LedgerTracker(system_seconds=0).start(tmp_path, params={}, tags={}, run_name="n", state=None)
    if recorded == "config.yaml":
        (tmp_path / recorded).write_text("tracking:\n  uri: http://host:5000\n")
    else:
        write_json(
            tmp_path / recorded, read_json(tmp_path / recorded) | {"params": {"tracking.uri": "http://host:5000"}}
        )
    assert own_uri(tmp_path) == "http://host:5000"


def test_a_run_goes_on_in_its_own_store_in_a_shell_that_names_another_or_none(
    look, tmp_path, new_store, monkeypatch, caplog
):
    run_dir = tmp_path / "run"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", look.uri)
    tracker = track(run_dir, None, experiment=look.experiment)
    state = tracker.state_dict()
    tracker.finish("KILLED", {})
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracker = track(run_dir, None, steps=0, state=state, experiment=look.experiment)
    tracker.log(3, {"loss": 3 / 7})
    tracker.finish("FINISHED", {})
    assert (
        look.points("train/loss") == [(step, step / 7) for step in range(4)] and not (tmp_path / "mlflow.db").exists()
    )
    assert caplog.messages == []
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "other"))
    track(run_dir, None, steps=0, state={**state, "rows": 4}, experiment=look.experiment).finish("FINISHED", {})
    assert look.run().info.status == "FINISHED"
    assert "this run goes on in its own store" in caplog.messages[0] and "--uri ADDRESS" in caplog.messages[0]


@pytest.mark.parametrize("lost", ["the store", "some points"])
def test_what_a_store_has_lost_is_counted_and_sent_again(tmp_path, new_store, capsys, lost):
    (tmp_path / "store").mkdir()
    uri = new_store(tmp_path / "store")
    run_dir = tmp_path / "run"
    track(run_dir, uri, steps=20).finish("FINISHED", {})
    assert main([str(run_dir)]) == 0 and "complete (FINISHED, 20 rows" in told(capsys)
    if lost == "the store":
        (tmp_path / "store" / "mlflow.db").unlink()
        new_store(tmp_path / "store")
    else:
        with sqlite3.connect(tmp_path / "store" / "mlflow.db") as database:
            database.execute("DELETE FROM metrics WHERE step IN (3, 4)")
        database.close()
    # In a new process, as a user would do it; a process that has the old file open would still read that.
    done = subprocess.run(
        [sys.executable, "-m", "caco.tracking.sync", str(run_dir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and f"sent 20 rows of 20 to {uri} (FINISHED, run " in done.stdout, (
        done.stdout + done.stderr
    )
    query = "SELECT m.step, m.value FROM metrics m WHERE m.key = 'train/loss' ORDER BY m.step"
    with sqlite3.connect(tmp_path / "store" / "mlflow.db") as database:
        points, status = database.execute(query).fetchall(), database.execute("SELECT status FROM runs").fetchall()
    database.close()
    assert points == [(step, step / 7) for step in range(20)] and status == [("FINISHED",)]


def test_a_store_whose_folder_is_gone_is_not_made_anew_somewhere(tmp_path, new_store, capsys):
    (tmp_path / "store").mkdir()
    track(tmp_path / "run", new_store(tmp_path / "store"), steps=1).finish("FINISHED", {})
    (tmp_path / "store").rename(tmp_path / "moved")
    assert main([str(tmp_path / "run")]) == 1
    assert (
        "is in a folder that does not exist here: make the folder for a new store, or choose another store with --uri"
        in told(capsys)
    )
    assert not (tmp_path / "store").exists()


def test_a_server_that_is_down_is_one_warning(tmp_path, capsys, caplog, monkeypatch):
    handler = logging.StreamHandler(sys.stdout)  # like Hydra's
    logging.getLogger().addHandler(handler)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    try:
        tracker = track(tmp_path / "run", "http://me:Gehe1m@127.0.0.1:9")
        tracker._feeder.stopping.set()
        tracker._feeder.join()
    finally:
        logging.getLogger().removeHandler(handler)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("MLflow at http://me:***@127.0.0.1:9: "), said
