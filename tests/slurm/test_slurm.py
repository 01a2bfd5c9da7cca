"""Sweeps on a real SLURM: they finish, whatever becomes of their jobs, and say what did not."""

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
from conftest import shown, until
from test_trainer import assert_same, final, record
from tiny import BANK, TINY

from caco import config
from caco.tracking.environment import environment

pytestmark = pytest.mark.timeout(600)  # of the first test, which waits for all jobs; two cores need three minutes
ROOT = Path(__file__).resolve().parents[2]
SLURM = ["launcher=slurm", "launcher.hours=1", "launcher.gpus_per_node=0", "launcher.setup=['export GLOO_SOCKET_IFNAME=lo']"]
# Long enough to be interrupted; no checkpoint before the end but those of interruptions.
RUN = [*TINY, *BANK, "batch=16", "bank.size=32", "epochs=1", "max_steps=40"]


class Sweep:
    """`python -m caco.train ...` at work in a folder, and its runs by the value that tells them apart."""

    def __init__(self, folder: Path, *overrides: str, code: Path = ROOT):
        self.folder = folder
        variables = {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "caco.train", "-m", *RUN, *SLURM, *overrides]
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
        return next((path for path in self.folder.glob("runs/*/*/") if part in str(path.relative_to(self.folder))), None)

    def job(self, part: str) -> str:
        return json.loads((self.run_dir(part) / "job.json").read_text())["id"]

    def wait_for_steps(self, part: str, *, steps: int = 5) -> None:
        def rows():
            ledger = (self.run_dir(part) or self.folder) / "ledger.jsonl"
            return len(ledger.read_bytes().splitlines()) if ledger.exists() else 0

        def holds():
            if self.process.poll() is not None:
                pytest.fail(f"{part}: the sweep ended first: {self.end()}; {self.logs()}")
            return rows() > steps

        until(holds, 90, lambda: f"{part}: {rows()} rows; {shown('squeue')}; {self.logs()}")

    def logs(self) -> str:
        return "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in self.folder.glob("runs/*/.jobs/*/*log.err"))

    def end(self) -> tuple[int, str]:
        code = self.process.wait(timeout=150)
        self.told.seek(0)
        return code, self.told.read()


def swept(folder: Path, *overrides: str) -> tuple[int, str]:
    with Sweep(folder, *overrides) as sweep:
        return sweep.end()


@pytest.fixture(scope="module")
def copy_of_the_code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    for part in ("caco", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "source.json").write_text(json.dumps({"git_sha": "0123abc", "git_dirty": "false"}))
    return folder


@pytest.fixture(scope="module")
def interrupted(slurm, tmp_path_factory, copy_of_the_code):
    """One run, four times under four names: left alone, requeued, killed; and of two ranks, left alone and preempted."""
    folder = tmp_path_factory.mktemp("sweep")
    names = "name=alone,requeued,killed"
    pairs = ["name=two-alone,two-told", "launcher.tasks_per_node=2"]
    with Sweep(folder, names, code=copy_of_the_code) as single, Sweep(folder, *pairs) as double:
        single.commit = environment()["git_sha"]  # now: someone may commit while this runs
        interrupt(single, double, copy_of_the_code)
        return single, {"single": single.end(), "double": double.end()}


def interrupt(single, double, copy_of_the_code):
    single.wait_for_steps("runs/killed")
    # From here on the checkout is of no use: what goes on must be the code as it was submitted.
    (copy_of_the_code / "caco" / "trainer.py").write_text("raise RuntimeError('edited after the submission')\n")
    kill_processes_of(single.job("runs/killed"))
    single.wait_for_steps("runs/requeued")
    shown("scontrol", "requeue", single.job("runs/requeued"))
    double.wait_for_steps("runs/two-told")
    shown("scancel", "--signal=USR2", double.job("runs/two-told"))


def kill_processes_of(job: str) -> None:
    """SIGKILL, as the kernel does when memory runs out: not SLURM's doing."""
    array, _, index = job.partition("_")
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            is_ours = b"submitit.core._submit" in (process / "cmdline").read_bytes()
        except OSError:
            continue  # ended meanwhile, or another user's
        wanted = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={index}".encode()}
        if wanted <= set(variables) and b"python" in (process / "cmdline").read_bytes().split(b"\0")[0] and is_ours:
            os.kill(int(process.name), signal.SIGKILL)
            killed += 1
    assert killed, f"no process of job {job}"


def test_every_job_of_the_sweeps_ends_well(interrupted):
    sweep, ends = interrupted
    for code, errors in ends.values():
        assert code == 0, errors + sweep.logs()
        assert errors.count("COMPLETED") >= 2


@pytest.mark.parametrize("name, whole", [("requeued", "alone"), ("killed", "alone"), ("two-told", "two-alone")])
def test_an_interrupted_job_ends_with_the_bits_of_one_left_alone(interrupted, name, whole):
    sweep, _ = interrupted
    one, other = sweep.run_dir(f"runs/{whole}"), sweep.run_dir(f"runs/{name}")
    assert_same(final(one), final(other))
    assert record(one) == record(other)


def test_a_job_that_is_told_in_time_loses_no_step(interrupted):
    sweep, _ = interrupted
    for name, going in (("requeued", "SLURM has requeued"), ("two-told", "it goes back into the queue")):
        log = Path(json.loads((sweep.run_dir(f"runs/{name}") / "job.json").read_text())["log"]).read_text()
        step = log.partition("after step ")[2].partition(" ")[0]
        assert going in log
        assert f"going on from {sweep.run_dir(f'runs/{name}')}/checkpoints/step_{int(step):09d}.pt" in log


def test_only_the_interrupted_jobs_were_interrupted(interrupted):
    sweep, _ = interrupted
    for name in ("alone", "two-alone"):
        log = json.loads((sweep.run_dir(f"runs/{name}") / "job.json").read_text())["log"]
        assert "going on from" not in Path(log).read_text() and "after 0 of" in Path(log).read_text()
    for name in ("requeued", "killed", "two-told"):
        log = json.loads((sweep.run_dir(f"runs/{name}") / "job.json").read_text())["log"]
        assert ("killed by signal 9" in Path(log).read_text()) == (name == "killed")


def test_each_job_knows_its_sweep_also_after_it_was_requeued(interrupted):
    sweep, _ = interrupted
    about = [json.loads((sweep.run_dir(f"runs/{name}") / "tracking.json").read_text()) for name in ("alone", "requeued", "killed")]
    assert [run["run_name"] for run in about] == ["name=alone", "name=requeued", "name=killed"]
    assert {(run["sweep"]["jobs"], run["sweep"]["name"]) for run in about} == {(3, about[0]["sweep"]["name"])}


def test_two_tasks_are_two_ranks_of_one_run(interrupted):
    sweep, _ = interrupted
    assert len(final(sweep.run_dir("runs/two-alone"))["random"]) == 2


def test_the_code_is_recorded_by_its_commit(interrupted):
    sweep, _ = interrupted
    recorded = [json.loads((sweep.run_dir(f"runs/{name}") / "environment.json").read_text()) for name in ("killed", "two-alone")]
    assert recorded[0]["git_sha"] == "0123abc" and recorded[0]["slurm_job_id"] == sweep.job("runs/killed")
    assert recorded[1]["git_sha"] == sweep.commit


def test_the_same_sweep_again_has_nothing_to_do(interrupted):
    first, _ = interrupted
    code, errors = swept(first.folder, "name=alone,requeued,killed")
    assert code == 0 and errors.count("is done already") == 3
    assert not shown("squeue", "--noheader")


FAILING = ["batch=16,2048", "hydra.sweep.subdir=batch-${batch}"]


@pytest.fixture(scope="module")
def failing(slurm, tmp_path_factory):
    """A sweep of a job that is cancelled while it runs and one that has too few images; then the same command again."""
    folder = tmp_path_factory.mktemp("failing")
    with Sweep(folder, *FAILING) as sweep:
        sweep.wait_for_steps("batch-16")
        shown("scancel", sweep.job("batch-16"))
        first = sweep.end()
    states = shown("squeue", "--noheader", "--array", "--states=all", "--format=%i %T")
    jobs = {batch: sweep.job(f"batch-{batch}") for batch in (16, 2048)}
    return sweep, first, {batch: states.partition(f"{job} ")[2].split()[0] for batch, job in jobs.items()}


def test_a_job_that_raises_is_failed_and_one_that_is_cancelled_stays_cancelled(failing):
    _, _, states = failing
    assert states == {16: "CANCELLED", 2048: "FAILED"}


def test_the_sweep_says_which_failed_and_why(failing):
    sweep, (code, errors), _ = failing
    assert code == 1
    report = errors.partition("caco: 2 of 2 jobs have failed:\n")[2]
    assert str(sweep.run_dir("batch-16")) in report and "ended as CANCELLED" in report
    assert "batch: expected at most the 1400 images of digits/train, got 2048" in report
    assert (sweep.run_dir("batch-2048") / "failure.txt").read_text().startswith("batch: expected at most the 1400")
    assert "Traceback" not in errors


def test_the_same_command_submits_the_unfinished_jobs_and_one_failure_does_not_stop_the_others(failing):
    sweep, _, _ = failing
    code, errors = swept(sweep.folder, *FAILING)
    assert code == 1 and "caco: 1 of 2 jobs have failed:" in errors
    assert (sweep.run_dir("batch-16") / "summary.json").exists()
    log = Path(json.loads((sweep.run_dir("batch-16") / "job.json").read_text())["log"]).read_text()
    assert "going on from" in log, "what the cancelled job had saved"


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["launcher.gpus_per_node=2", "device=auto"], "launcher.gpus_per_node: expected at most 0, as partition short has, got 2"),
        (["launcher.hours=24"], "launcher.hours: expected at most 1, as partition short has, got 24"),
        (["launcher.signal_minutes=40"], "launcher.signal_minutes: expected at most half of launcher.hours, got 40"),
        (["launcher.tasks_per_node=3"], "batch: expected a multiple of the 3 processes of a job, got 16"),
        (["launcher.nodes=2"], "launcher.nodes: expected at most 1, as partition short has, got 2"),
        (["launcher.cpus_per_task=9"], "launcher: expected at most the 8 CPUs that a node of partition short has, got 9"),
    ],
)
def test_what_the_cluster_cannot_do_is_refused(slurm, overrides, told):
    cfg = config.job_config(config.compose([*RUN, *SLURM, *overrides]))
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        config.build(cfg.launcher).check(cfg)


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
