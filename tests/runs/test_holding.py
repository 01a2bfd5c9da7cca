"""A run directory has only one writer, also on file systems without locks and under srun; files that killed writers
left are removed at the next start.
"""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from caco.errors import UserError
from caco.runs import directory
from caco.runs.directory import hold, is_first_rank, open_run

ROOT = Path(__file__).parents[2]
HOLDER = """
    import fcntl, socket, sys, time
    from pathlib import Path
    from caco.runs import directory
    directory._BEAT_S = 0.1
    host, has_locks = sys.argv[2], sys.argv[3] == "locks"
    if host != "here":
        socket.gethostname = lambda: host
    if not has_locks:
        def lockf(*_):
            raise OSError(37, "No locks available")
        fcntl.lockf = lockf
    directory.hold(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(600)  # it is killed before
"""


@pytest.fixture
def holder():
    """holder(run_dir, host, locks) starts a process that holds the directory, on this machine ("here") or as if on
    another.
    """
    started = []

    def start(run_dir, host="here", locks="locks"):
        command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(run_dir), host, locks]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(directory, "_locks", {})
    monkeypatch.setattr(directory, "_PATIENCE_S", 2.0)
    monkeypatch.setattr(directory, "_MOMENT_S", 0.05)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)


@pytest.fixture
def no_locks(monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)


def test_a_holder_on_another_machine_is_seen_where_locks_are_not_shared(tmp_path, holder, no_locks, capsys):
    process = holder(tmp_path, "elsewhere", "no locks")
    with pytest.raises(UserError, match=f"in use: process {process.pid} on elsewhere trains or evaluates there now"):
        hold(tmp_path)
    assert "checking for 2 s whether that process still runs" in capsys.readouterr().err


def test_a_holder_on_another_machine_that_was_killed_is_not_waited_for_long(tmp_path, holder, no_locks):
    process = holder(tmp_path, "elsewhere", "no locks")
    process.kill()
    process.wait()
    began = time.monotonic()
    hold(tmp_path)
    assert 2 <= time.monotonic() - began < 60
    assert f"process {os.getpid()} on {socket.gethostname()}\n" in (tmp_path / ".lock").read_text()


def test_without_locks_a_holder_on_this_machine_is_known_by_its_process(tmp_path, holder, no_locks):
    process = holder(tmp_path, "here", "no locks")
    with pytest.raises(UserError, match=f"in use: process {process.pid} "):
        hold(tmp_path)
    process.kill()
    process.wait()
    hold(tmp_path)


def test_of_two_that_write_at_once_without_locks_the_last_one_stays(tmp_path, no_locks, monkeypatch):
    other = directory.Holder(1, "elsewhere", "9")

    def meanwhile(seconds):
        lock = os.open(tmp_path / ".lock", os.O_RDWR)
        other.write(lock)
        os.close(lock)

    monkeypatch.setattr(directory.time, "sleep", meanwhile)
    with pytest.raises(UserError, match="in use: process 1 on elsewhere"):
        hold(tmp_path)


def test_what_srun_alone_starts_several_times_is_not_two_writers(tmp_path, holder, monkeypatch):
    """By their environment variables, both processes are the only writer; the second is refused with a hint about
    srun.
    """
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert is_first_rank()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    holder(tmp_path)
    with pytest.raises(UserError, match="srun has started 2 processes, each a run of its own: use srun --ntasks=1"):
        hold(tmp_path)


@pytest.mark.parametrize(
    "variables, first",
    [
        ({}, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, False),
        ({"RANK": "1"}, True),
    ],
)
def test_the_processes_of_one_run_have_one_writer(variables, first, monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_rank() == first


def test_who_leaves_is_not_looked_for(tmp_path, monkeypatch):
    hold(tmp_path)
    directory._leave()
    assert (tmp_path / ".lock").read_text() == ""


def test_what_killed_writers_left_is_removed_at_the_next_start(tmp_path):
    kept = [
        "config.yaml",
        ".mlflow.json.7",
        ".hidden",
        "figures/use.png",
        "figures/.use.png.8",
        "checkpoints/step_000000001.pt",
    ]
    gone = [
        ".config.yaml.12",
        ".environment.json.3",
        ".tracking.json.99",
        "checkpoints/step_000000002.partial",
        "evaluations/.knn-ab.json.4",
    ]
    old = [".mlflow.json.5", "figures/.loss.png.6"]
    for name in [*kept, *gone, *old, ".model.17/MLmodel"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name in old:
        os.utime(tmp_path / name, (1, 1))
    open_run(tmp_path, {"seed": 0}) if not (tmp_path / "config.yaml").unlink() else None
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert there == {*kept, ".lock", "environment.json"}
