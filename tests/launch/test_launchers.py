"""Jobs of the local launcher, and the parts of the SLURM launcher that need no cluster; tests/slurm tests the rest."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import BANK, TINY, compose

from caco import instructions, train
from caco.installed import command_to_install
from caco.launch import sweep
from caco.launch.jobs import Job, environment_of_jobs
from caco.launch.local import Local
from caco.launch.slurm import _hours
from caco.launch.snapshot import snapshot
from caco.runs.environment import environment
from caco.runs.files import process_start

ROOT = Path(train.__file__).parents[1]
LOCAL: dict[str, Any] = {"gpus_per_job": 0, "tasks_per_job": None, "parallel": 1, "setup": []}


def caco(*overrides, cwd, **environment):
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-P", "-m", "caco.train", *overrides]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)


def test_a_run_is_done_in_a_sweep_when_no_evaluation_at_its_end_is_missing(tmp_path):
    job = Job((), tmp_path)
    assert sweep._lacks(job) == "its end"
    failed = [{"evaluator": "knn", "step": 5, "message": "eval.knn failed after 1 of 2 epochs: no memory"}]
    for summary, lacks in (
        ({}, None),
        ({"failed_evaluations": failed}, None),
        ({"failed_evaluations": failed, "steps": 5}, failed[0]["message"]),
    ):
        (tmp_path / "summary.json").write_text(json.dumps({"steps": 10} | summary))
        assert sweep._lacks(job) == lacks


def test_a_local_sweep_goes_on_after_a_failure_names_it_and_is_not_done_twice(tmp_path):
    sweep = [
        "-m",
        *TINY,
        *BANK,
        "launcher=local",
        "launcher.parallel=2",
        "batch=64,2048",
        "hydra.sweep.subdir=b${batch}",
    ]
    first = caco(*sweep, cwd=tmp_path)
    assert first.returncode == 1, first.stderr
    assert "caco: 1 of 2 jobs has failed:\n" in first.stderr
    assert "got 2048. Lower batch or give more images." in first.stderr
    run = tmp_path / "runs" / "caco" / "b64"
    assert json.loads((run / "summary.json").read_text())["steps"] == 12
    about = json.loads((run / "tracking.json").read_text())
    assert (about["run_name"], about["sweep"]["jobs"], about["sweep"]["keys"]) == ("batch=64", 2, ["batch"])
    written = (run / "ledger.jsonl").stat().st_mtime_ns
    # As if the run were being evaluated, by this process: its record is open, and the job is finished all the same.
    here = {"status": "RUNNING", "pid": os.getpid(), "process_start": process_start(os.getpid())}
    (run / "tracking.json").write_text(json.dumps(about | here))
    again = caco(*sweep, cwd=tmp_path)
    assert "caco/b64: is finished already" in again.stderr and again.returncode == 1
    assert (run / "ledger.jsonl").stat().st_mtime_ns == written

    # As if the job had been killed after it wrote its results and while it closed its record.
    (run / ".tracking.json.4711").touch()
    (run / "tracking.json").write_text(json.dumps(about | {"status": "RUNNING"}))
    closed = caco(*sweep[:-2], "batch=64", sweep[-1], cwd=tmp_path)
    assert closed.returncode == 0 and "finished already" not in closed.stderr.split("caco/b64: job ")[0], closed.stderr
    assert json.loads((run / "tracking.json").read_text())["status"] == "FINISHED"
    assert not (run / ".tracking.json.4711").exists()
    assert (run / "ledger.jsonl").stat().st_mtime_ns == written


def test_without_submitit_the_launcher_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['submitit'] = None\n")
    done = caco("launcher=local", "data=digits", cwd=tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}")
    told = f"caco: launcher: needs submitit, which is not installed; to install it: {command_to_install('slurm')}\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_without_slurm_the_launcher_says_so(tmp_path):
    done = caco("launcher=slurm", "data=digits", "launcher.gpus_per_node=1", cwd=tmp_path, PATH="/nowhere")
    assert done.returncode == 2 and "launcher=slurm needs SLURM's commands" in done.stderr


@pytest.mark.parametrize("key, value", [("parallel", 0), ("gpus_per_job", -1), ("tasks_per_job", 0)])
def test_numbers_without_sense_are_refused(key, value):
    with pytest.raises(ValueError, match=f"Local: {key}: expected .*, got {value}"):
        Local(**LOCAL | {key: value})


def test_what_this_machine_or_the_ranks_cannot_do_is_refused():
    import torch

    cfg = compose("batch=64", "bank.size=128", "device=auto")
    with pytest.raises(ValueError, match="batch: expected a multiple of the 3 processes of a job, got 64"):
        Local(**LOCAL | {"tasks_per_job": 3}).check(cfg)
    Local(**LOCAL | {"tasks_per_job": 64}).check(compose("bank.size=100"))  # the first ranks have one more row
    here = torch.cuda.device_count()
    with pytest.raises(
        ValueError,
        match=f"launcher.gpus_per_job: expected at most {here}, the number of this machine's GPUs, got {here + 1}",
    ):
        Local(**LOCAL | {"gpus_per_job": here + 1, "tasks_per_job": 1}).check(cfg)


@pytest.mark.parametrize(
    "limit, hours", [("1:00:00", 1), ("2-12:00:00", 60), ("30:00", 0.5), ("infinite", math.inf), ("n/a", math.inf)]
)
def test_time_limits_are_read_as_slurm_writes_them(limit, hours):
    assert _hours(limit) == hours


@pytest.mark.parametrize("level", ["plain", "torch", None])
def test_jobs_are_told_which_instructions_to_use(level, monkeypatch, tmp_path):
    monkeypatch.setattr(instructions, "LEVEL", level)
    assert environment_of_jobs(tmp_path).get("CACO_INSTRUCTIONS") == level


def test_a_snapshot_is_the_code_and_knows_its_commit(tmp_path):
    code = snapshot(tmp_path)
    assert snapshot(tmp_path) == code, "the same code must be copied only once"
    names = {path.relative_to(code).as_posix() for path in code.rglob("*.*") if path.is_file()}
    assert {
        "caco/engine/trainer.py",
        "caco/data/views/augmentation.py",
        "conf/config.yaml",
        "conf/bank/8M.yaml",
        "source.json",
    } <= names
    loaded = (
        "import caco.config.composition as c, caco.runs.environment as e; print(c.CONF, e.environment()['git_sha'])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", loaded],
        cwd=code,
        env=os.environ | {"PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
    ).stdout.split()
    assert shown == [str(code / "conf"), environment()["git_sha"]]
