"""Sweeps on a real SLURM finish whatever happens to their jobs, and report the jobs that did not finish."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import PATIENCE_S, shown, until
from processes import caco_train, ranks
from recorded import assert_same, final, record
from tiny import BANK, TINY

from caco.config import composition
from caco.runs.environment import environment

pytestmark = pytest.mark.timeout(900)  # the first test waits for all jobs
ROOT = Path(__file__).resolve().parents[2]
SLURM = [
    "launcher=slurm",
    "launcher.hours=1",
    "launcher.gpus_per_node=0",
    "launcher.setup=['export GLOO_SOCKET_IFNAME=lo']",
]
# Before the end, only interruptions save checkpoints; held.py makes runs wait for their interruption.
RUN = [*TINY, *BANK, "batch=16", "bank.size=32", "epochs=1"]


class Sweep:
    """A `python -m caco.train ...` that runs in a folder, and its runs by the value in which they differ.

    Args:
        held: parts of the names of those runs that wait at a step to be interrupted.
    """

    def __init__(self, folder: Path, *overrides: str, code: Path = ROOT, held: str = "none"):
        self.folder = folder
        here = Path(__file__).parent
        variables = {"PYTHONPATH": f"{code}{os.pathsep}{here}", "OMP_NUM_THREADS": "1", "HELD": held}
        tracking = "tracking._target_=held.HeldTracker"
        command = [sys.executable, "-P", "-m", "caco.train", "-m", *RUN, *SLURM, tracking, *overrides]
        self.told = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, cwd=folder, env=os.environ | variables, stderr=self.told)

    def __enter__(self) -> "Sweep":
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.told.close()

    def run_dir(self, part: str) -> Path | None:
        return next(
            (path for path in self.folder.glob("runs/*/*/") if part in str(path.relative_to(self.folder))), None
        )

    def job(self, part: str) -> str:
        run_dir = self.run_dir(part)
        assert run_dir is not None, f"{part}: no directory of such a run"
        return json.loads((run_dir / "job.json").read_text())["id"]

    def wait_until_held(self, part: str) -> None:
        def holds():
            if self.process.poll() is not None:
                pytest.fail(f"{part}: the sweep ended first: {self.end()}; {self.logs()}")
            return ((self.run_dir(part) or self.folder) / "held").exists()

        until(holds, lambda: f"{part}: not held; {shown('squeue')}; {self.logs()}")

    def logs(self) -> str:
        return "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in self.folder.glob("runs/*/.jobs/*/*log.err"))

    def end(self) -> tuple[int, str]:
        code = self.process.wait(timeout=PATIENCE_S)
        self.told.seek(0)
        return code, self.told.read()


def swept(folder: Path, *overrides: str) -> tuple[int, str]:
    with Sweep(folder, *overrides) as sweep:
        return sweep.end()


def log_of(run_dir: Path) -> str:
    return Path(json.loads((run_dir / "job.json").read_text())["log"]).read_text()


# A sweep of two jobs with two ranks each: one is preempted, the other has too few images.

BOTH = ["batch=16,2048", "hydra.sweep.subdir=batch-${batch}", "launcher.tasks_per_node=2"]


@pytest.fixture(scope="module")
def preempted(slurm, tmp_path_factory):
    """The sweep, how it ended, and the states of its jobs by their batch size."""
    folder = tmp_path_factory.mktemp("preempted")
    with Sweep(folder, *BOTH, held="batch-16") as sweep:
        sweep.commit = environment()["git_sha"]  # read now, because a commit may be made while this runs
        sweep.wait_until_held("batch-16")
        shown("scancel", "--signal=USR2", sweep.job("batch-16"))
        end = sweep.end()
    return sweep, end, states_of(sweep, "batch-16", "batch-2048")


def states_of(sweep: Sweep, *parts: str) -> dict[str, str]:
    listed = shown("squeue", "--noheader", "--array", "--states=all", "--format=%i %T")
    return {part: listed.partition(f"{sweep.job(part)} ")[2].split()[0] for part in parts}


def test_a_preempted_job_of_two_ranks_goes_on_to_the_bits_of_a_run_left_alone(preempted, tmp_path):
    sweep, (_, errors), states = preempted
    run_dir = sweep.run_dir("batch-16")
    assert states["batch-16"] == "COMPLETED", errors + sweep.logs()
    log = log_of(run_dir)
    step = log.partition("after step ")[2].partition(" ")[0]
    assert "it goes back into the queue" in log
    assert f"going on from {run_dir}/checkpoints/step_{int(step):09d}.pt" in log, (
        "the run must resume from its last step"
    )
    codes, outputs = ranks(2, caco_train, *RUN, f"hydra.run.dir={tmp_path}")
    assert codes == [0, 0], outputs[0][1]
    assert len(final(run_dir)["random"]) == 2, "two tasks must be two ranks of one run"
    assert_same(final(tmp_path), final(run_dir))
    assert record(tmp_path) == record(run_dir)


def test_a_job_that_raises_is_failed_named_and_does_not_stop_the_others(preempted):
    sweep, (code, errors), states = preempted
    assert states["batch-2048"] == "FAILED"
    assert code == 1
    report = errors.partition("caco: 1 of 2 jobs has failed:\n")[2]
    assert str(sweep.run_dir("batch-2048")) in report
    assert "batch: expected at most the 1400 images of digits/train, got 2048" in report
    assert (sweep.run_dir("batch-2048") / "failure.txt").read_text().startswith("batch: expected at most the 1400")
    assert "Traceback" not in errors


def test_the_code_is_recorded_by_its_commit(preempted):
    sweep, _, _ = preempted
    recorded = json.loads((sweep.run_dir("batch-16") / "environment.json").read_text())
    assert recorded["git_sha"] == sweep.commit and recorded["slurm_job_id"] == sweep.job("batch-16")


# Jobs that are requeued, killed and cancelled.


@pytest.fixture(scope="module")
def copy_of_the_code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    for part in ("caco", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "source.json").write_text(json.dumps({"git_sha": "0123abc", "git_dirty": "false"}))
    return folder


NAMES = ["name=alone,requeued,killed", "pn=halfway"]


@pytest.fixture(scope="module")
def interrupted(slurm, tmp_path_factory, copy_of_the_code):
    """The same run under three names: one is left alone, one is requeued, one is killed. Meanwhile the code is edited,
    also the user's own.
    """
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(ROOT / "tests" / "own", folder / "own")
    with Sweep(folder, *NAMES, "--config-dir", "own", code=copy_of_the_code, held="requeued,killed") as sweep:
        sweep.wait_until_held("runs/killed")
        # From here on the checkout is broken, so the jobs must continue with the code as it was submitted.
        for file in (copy_of_the_code / "caco" / "engine" / "trainer.py", folder / "own" / "mine.py"):
            file.write_text(f"raise RuntimeError('edited after the submission')\n{file.read_text()}")
        kill_processes_of(sweep.job("runs/killed"))
        sweep.wait_until_held("runs/requeued")
        shown("scontrol", "requeue", sweep.job("runs/requeued"))
        return sweep, sweep.end()


def kill_processes_of(job: str) -> None:
    """Send SIGKILL to the job's processes, as the kernel does when memory runs out; SLURM does not know of it."""
    array, _, index = job.partition("_")
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            is_ours = b"submitit.core._submit" in (process / "cmdline").read_bytes()
        except OSError:
            continue  # the process has ended, or belongs to another user
        wanted = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={index}".encode()}
        if wanted <= set(variables) and b"python" in (process / "cmdline").read_bytes().split(b"\0")[0] and is_ours:
            os.kill(int(process.name), signal.SIGKILL)
            killed += 1
    assert killed, f"no process of job {job}"


@pytest.mark.long
@pytest.mark.parametrize("name", ["requeued", "killed"])
def test_an_interrupted_job_ends_well_with_the_bits_of_one_left_alone(interrupted, name):
    sweep, (code, errors) = interrupted
    assert code == 0 and errors.count("COMPLETED") >= 2, errors + sweep.logs()
    one, other = sweep.run_dir("runs/alone"), sweep.run_dir(f"runs/{name}")
    assert_same(final(one), final(other))
    assert record(one) == record(other)


@pytest.mark.long
def test_each_log_says_what_happened_to_its_job_and_to_no_other(interrupted):
    sweep, _ = interrupted
    logs = {name: log_of(sweep.run_dir(f"runs/{name}")) for name in ("alone", "requeued", "killed")}
    assert {name for name, log in logs.items() if "killed by signal 9" in log} == {"killed"}
    assert {name for name, log in logs.items() if "SLURM has requeued" in log} == {"requeued"}
    assert "going on from" not in logs["alone"] and "after 0 of" in logs["alone"]
    step = logs["requeued"].partition("after step ")[2].partition(" ")[0]
    assert f"going on from {sweep.run_dir('runs/requeued')}/checkpoints/step_{int(step):09d}.pt" in logs["requeued"]


@pytest.mark.long
def test_each_job_knows_its_sweep_also_after_it_was_requeued(interrupted):
    sweep, _ = interrupted
    about = [
        json.loads((sweep.run_dir(f"runs/{name}") / "tracking.json").read_text())
        for name in ("alone", "requeued", "killed")
    ]
    assert [run["run_name"] for run in about] == ["name=alone", "name=requeued", "name=killed"]
    assert {(run["sweep"]["jobs"], run["sweep"]["name"]) for run in about} == {(3, about[0]["sweep"]["name"])}


@pytest.mark.long
def test_a_copy_of_the_code_is_recorded_by_the_commit_that_it_says(interrupted):
    sweep, _ = interrupted
    recorded = json.loads((sweep.run_dir("runs/killed") / "environment.json").read_text())
    assert recorded["git_sha"] == "0123abc" and recorded["slurm_job_id"] == sweep.job("runs/killed")


@pytest.mark.long
def test_the_same_sweep_again_has_nothing_to_do(interrupted):
    first, _ = interrupted
    code, errors = swept(first.folder, *NAMES, "--config-dir", "own")
    assert code == 0 and errors.count("is finished already") == 3
    assert not shown("squeue", "--noheader")


@pytest.mark.long
def test_a_cancelled_job_stays_cancelled_and_the_same_command_submits_it_again(slurm, tmp_path):
    wrong = ["batch=16,2048", "hydra.sweep.subdir=batch-${batch}"]
    with Sweep(tmp_path, *wrong, held="batch-16") as sweep:
        sweep.wait_until_held("batch-16")
        shown("scancel", sweep.job("batch-16"))
        code, errors = sweep.end()
    assert states_of(sweep, "batch-16", "batch-2048") == {"batch-16": "CANCELLED", "batch-2048": "FAILED"}
    report = errors.partition("caco: 2 of 2 jobs have failed:\n")[2]
    assert (
        code == 1
        and str(sweep.run_dir("batch-16")) in report
        and "the process ended without a result (CANCELLED)" in report
    )
    code, errors = swept(tmp_path, *wrong)
    assert code == 1 and "caco: 1 of 2 jobs has failed:" in errors
    assert (sweep.run_dir("batch-16") / "summary.json").exists()
    assert "going on from" in log_of(sweep.run_dir("batch-16")), (
        "the job must resume from what the cancelled one had saved"
    )


# Refusals.


@pytest.mark.parametrize(
    "overrides, told",
    [
        (
            ["launcher.gpus_per_node=2", "device=auto"],
            "launcher.gpus_per_node: expected at most 0, as partition short has, got 2",
        ),
        (["launcher.hours=24"], "launcher.hours: expected at most 1, as partition short has, got 24"),
        (["launcher.signal_minutes=40"], "launcher.signal_minutes: expected at most half of launcher.hours, got 40"),
        (["launcher.tasks_per_node=3"], "batch: expected a multiple of the 3 processes of a job, got 16"),
        (["launcher.nodes=2"], "launcher.nodes: expected at most 1, as partition short has, got 2"),
        (
            ["launcher.cpus_per_task=9"],
            "launcher: expected at most the 8 CPUs that a node of partition short has, got 9",
        ),
    ],
)
def test_what_the_cluster_cannot_do_is_refused(slurm, overrides, told):
    cfg = composition.job_config(composition.compose([*RUN, *SLURM, *overrides]))
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        composition.instantiate(cfg.launcher).check(cfg)


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["launcher.partition=big"], "launcher.partition: expected one of long, short, got big"),
        (["launcher.mem_gb=100000"], "SLURM refuses the jobs: Memory specification can not be satisfied"),
    ],
)
def test_a_refusal_comes_before_the_queue_in_a_line_and_leaves_no_job(slurm, tmp_path, overrides, told):
    code, errors = swept(tmp_path, *overrides)
    assert code == 2 and f"caco: {told}" in errors and "Traceback" not in errors
    assert not list(tmp_path.glob("runs/*/*/job.json")) and not shown("squeue", "--noheader", "--me")
