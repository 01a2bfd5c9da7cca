"""caco.tracking.sync sends every row that MLflow missed exactly once, and no run stays RUNNING for ever."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from caco.tracking.ledger import LedgerTracker
from caco.tracking.sync import last_status, main

ROOT = Path(__file__).parents[2]


def begin(run_dir, state=None):
    tracker = LedgerTracker()
    params = {"bank.size": 8192, "seed": run_dir.name}
    tracker.start(run_dir, params=params, tags={"host": "h"}, run_name=run_dir.name, state=state)
    return tracker


def sync(look, *run_dirs):
    return main([*map(str, run_dirs), "--uri", look.uri, "--experiment", look.experiment])


def test_a_run_tracked_without_mlflow_is_sent_whole_and_only_once(look, tmp_path, capsys):
    tracker = begin(tmp_path)
    (tmp_path / "config.yaml").write_text("batch: 64\n")
    for step in range(500):
        tracker.log(step, {"loss": step / 7})
    tracker.finish("FINISHED", {})
    (tmp_path / "summary.json").write_text(json.dumps({"knn20_top1": 91.5}))
    assert sync(look, tmp_path) == 0
    assert sync(look, tmp_path) == 0
    assert "sent 500 rows" in capsys.readouterr().out.splitlines()[0]
    assert look.points("train/loss") == [(step, step / 7) for step in range(500)]
    assert look.points("final/knn20_top1") == [(499, 91.5)]
    assert look.run().data.params == {"bank.size": "8192", "seed": tmp_path.name}
    assert (look.run().info.status, look.run().info.run_name) == ("FINISHED", tmp_path.name)
    assert look.artifacts() == ["config.yaml", "summary.json"]


def test_a_directory_of_runs_is_sent_run_by_run(look, tmp_path, capsys):
    for name in ("sweep/a", "sweep/b", "c"):
        tracker = begin(tmp_path / name)
        tracker.log(1, {"loss": 1.0})
        tracker.finish("FAILED", {})
    assert sync(look, tmp_path / "sweep", tmp_path) == 0
    assert sorted(run.data.params["seed"] for run in look.runs()) == ["a", "b", "c"]
    assert {run.info.status for run in look.runs()} == {"FAILED"}
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_run_that_goes_on_can_be_sent_meanwhile_even_if_it_is_rolled_back(look, tmp_path):
    tracker = begin(tmp_path)
    tracker.log(0, {"loss": 1.0})
    state = tracker.state_dict()
    tracker.log(1, {"loss": 0.5})
    sync(look, tmp_path)
    assert look.run().info.status == "RUNNING"
    tracker = begin(tmp_path, state)  # the run was preempted and resumes
    tracker.log(1, {"loss": 0.5})
    sync(look, tmp_path)
    tracker.log(2, {"loss": 0.25})
    tracker.finish("FINISHED", {})
    sync(look, tmp_path)
    assert look.points("train/loss") == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert look.run().info.status == "FINISHED"


KILLED = """
import sys, time
from pathlib import Path
from caco.tracking.mlflow import MLflowTracker
tracker = MLflowTracker(uri=sys.argv[2], experiment=sys.argv[3], feed_seconds=0.05)
tracker.start(Path(sys.argv[1]), params={}, tags={}, run_name="n", state=None)
for step in range(10**9):
    tracker.log(step, {"loss": step / 7})
    print(step, tracker.state_dict()["sent"], flush=True)
    time.sleep(0.002)  # the feeder's turn
"""


def test_a_run_killed_with_sigkill_loses_no_row_and_ends_as_killed(look, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), look.uri, look.experiment]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    step, sent = 0, 0
    while sent < 100:
        step, sent = map(int, process.stdout.readline().split())
    process.kill()
    rest = [line for line in process.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
    step = int(rest[-1].split()[0]) if rest else step
    assert look.run().info.status == "RUNNING"
    (tmp_path / ".mlflow.json.4711").write_text("{")  # what a killed sender was writing
    assert sync(look, tmp_path) == 0
    assert look.run().info.status == "KILLED" and not list(tmp_path.glob(".mlflow.json*"))
    points = look.points("train/loss")
    assert len(points) >= step + 1
    assert points == [(s, s / 7) for s in range(len(points))]


def test_what_is_known_about_the_end_of_a_run(tmp_path):
    begin(tmp_path)
    about = json.loads((tmp_path / "tracking.json").read_text())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    def status(summary=None, **changes):
        (tmp_path / "tracking.json").write_text(json.dumps({**about, **changes}))
        if summary is not None:
            (tmp_path / "summary.json").write_text(json.dumps(summary))
        return last_status(tmp_path)[0]

    assert about["host"] == socket.gethostname()
    assert status() == "RUNNING"  # this process is alive
    assert status(host="another", pid=gone.pid) == "RUNNING"  # only that host knows whether the process is alive
    assert status(pid=gone.pid) == "KILLED"
    assert status(process_start="1") == "KILLED"  # its process number belongs to another process now
    assert status(pid=gone.pid, status="FAILED") == "FAILED"
    assert status(pid=gone.pid, summary={"loss": 1.0}) == "FINISHED"  # it was killed after it had finished


def test_another_server_gets_the_whole_run(look, tmp_path, tmp_path_factory, new_store):
    tracker = begin(tmp_path)
    tracker.log(0, {"loss": 1.0})
    tracker.finish("FINISHED", {})
    sync(look, tmp_path)
    other = type(look)(new_store(tmp_path_factory.mktemp("other")), look.experiment)
    sync(other, tmp_path)
    assert other.points("train/loss") == look.points("train/loss") == [(0, 1.0)]


def test_a_server_that_gets_a_run_back_from_another_has_it_once(look, tmp_path, tmp_path_factory, new_store):
    tracker = begin(tmp_path)
    tracker.log(0, {"loss": 1.0})
    sync(look, tmp_path)
    other = type(look)(new_store(tmp_path_factory.mktemp("other")), look.experiment)
    sync(other, tmp_path)
    tracker.log(1, {"loss": 0.5})
    tracker.finish("FINISHED", {"knn20_top1": 90.5})
    assert sync(look, tmp_path) == 0
    assert look.points("train/loss") == [(0, 1.0), (1, 0.5)]
    assert look.run().info.status == "FINISHED"


def test_an_unreachable_server_is_told_in_one_line_and_the_exit_code(look, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    begin(tmp_path).finish("FINISHED", {})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    assert main([str(tmp_path), "--uri", f"http://127.0.0.1:{port}"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}: not sent: ")


@pytest.mark.parametrize("arguments", [["EMPTY"], ["RUN", "--uri", "file:///x"]])
def test_what_is_no_run_and_no_server_is_refused(tmp_path, capsys, store, arguments):
    begin(tmp_path / "RUN").finish("FINISHED", {})
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / arguments[0]), *arguments[1:]])
    assert end.value.code == 2
    assert "expected a" in capsys.readouterr().err
