"""Runs a sweep from submission to its end: skips finished jobs, follows running ones and submits the rest.

Between two commands, a job's state is kept in its run directory: summary.json (finished), job.json (where it was
submitted), failure.txt (why it failed).
"""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from caco import metrics
from caco.config import composition, folders
from caco.errors import SweepFailed
from caco.launch.jobs import Job
from caco.launch.local import Local
from caco.launch.slurm import ENDED, Slurm
from caco.launch.snapshot import snapshot
from caco.runs.files import last_line, read_json, write_json
from caco.saying import amount
from caco.tracking import recorded
from caco.tracking.sync import last_status


class SubmititLauncher(Launcher):
    """The launcher to which Hydra hands a sweep's jobs with launcher=slurm and launcher=local.

    It replaces hydra-submitit-launcher. There a job that raises counts as COMPLETED, the sweep ends with the first
    failure, and a queued job composes whatever the checkout's conf/ says when it starts.
    """

    __module__ = "hydra_plugins.caco_launcher"  # Hydra accepts launchers from its own package only

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run one Job for each list of overrides; returns when all have ended.

        Raises:
            UserError: the cluster cannot run this.
            SweepFailed: some jobs have failed.
        """
        composed = [self.context.config_loader.load_sweep_config(self.config, list(item)) for item in job_overrides]
        launcher = composition.instantiate(self.config.launcher)
        jobs = []
        for number, cfg in enumerate(composed, start=initial_job_idx):
            with open_dict(cfg.hydra.job):
                cfg.hydra.job.num = number  # as in Hydra's own launcher, because a directory's name may contain it
            launcher.check(cfg)
            run_dir = Path(cfg.hydra.sweep.dir).absolute() / cfg.hydra.sweep.subdir
            jobs.append(Job(tuple(o for o in cfg.hydra.overrides.task if not _of_launcher(o)), run_dir))
        folder = Path(self.config.hydra.sweep.dir).absolute()
        follow(launcher, jobs, folder)
        return [_returned(job) for job in jobs]


def _of_launcher(override: str) -> bool:
    return override.lstrip("+~").partition("=")[0].partition(".")[0] == "launcher"


def _returned(job: Job) -> JobReturn:
    done = JobReturn(overrides=list(job.overrides), status=JobStatus.COMPLETED, working_dir=str(job.run_dir))
    run = recorded.read(job.run_dir)
    done.return_value = metrics.objective(run.summary, run.config.get("eval", {}))
    return done


def follow(launcher: Slurm | Local, jobs: list[Job], folder: Path) -> None:
    """Submit the jobs that are neither finished nor in the queue, and print what happens to each until all have ended.

    Args:
        folder: of the sweep; holds the jobs' logs and the copy of the code.
    Raises:
        SweepFailed: some jobs have failed.
    """
    waiting, active, begun = [], {}, []
    for job in jobs:
        submitted = read_json(job.run_dir / "job.json")
        if not _lacks(job) and not _was_cut(job):
            _say(job, "is finished already")
        elif submitted and _is_active(launcher, submitted["id"]):
            active[submitted["id"]] = job
            _say(job, f"is job {submitted['id']} already, submitted at {submitted['at']}")
        else:
            waiting.append(job)
    code = snapshot(folder / ".code") if waiting else None
    states: dict[str, str] = {}
    pause_s = 0.5
    try:
        while waiting or active:
            room = launcher.parallel - len(active) if launcher.needs_refill else len(waiting)
            starting, waiting = waiting[:room], waiting[room:]
            if starting:
                assert code is not None
                for job in starting:
                    (job.run_dir / "failure.txt").unlink(missing_ok=True)
                for job, id in zip(starting, launcher.submit(starting, folder / ".jobs", code), strict=True):
                    job.run_dir.mkdir(parents=True, exist_ok=True)
                    log = launcher.log(folder / ".jobs", id)
                    at = time.strftime("%Y-%m-%d %H:%M:%S")
                    write_json(job.run_dir / "job.json", {"id": id, "at": at, "log": str(log), "code": str(code)})
                    active[id] = job
                    begun.append(job)
            for id, state in launcher.states(list(active)).items():
                if states.get(id) != state:
                    _say(active[id], f"job {id} {state}")
                    states[id] = state
                    pause_s = 0.5
                if state in ENDED or state == "ENDED":
                    active.pop(id)
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.3, 15.0)
    except KeyboardInterrupt:
        if launcher.needs_refill:
            raise
        ids = " ".join(active)
        print(
            f"\ncaco: the jobs keep running; the same command follows them again, scancel {ids} ends them",
            file=sys.stderr,
        )
        sys.exit(130)
    _wait_for_results(jobs)
    # failure.txt was removed before a job began, so one that exists now is of this attempt: a job that was refused in
    # the directory of a finished run has failed too.
    failed = [job for job in jobs if _lacks(job) or (job in begun and (job.run_dir / "failure.txt").exists())]
    if failed:
        raise SweepFailed(_report(jobs, failed, states))


def _tail(log: str, *, lines: int = 3) -> list[str]:
    """The last lines of a job's log under a heading; [] if there is no log."""
    path = Path(log)
    text = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    last = [line.rstrip() for line in text if line.strip()][-lines:]
    return ["the last lines of its log:", *(f"  {line}" for line in last)] if last else []


def _lacks(job: Job) -> str | None:
    """What a job's run lacks: its end, or evaluations at its end; None if it is complete."""
    summary = read_json(job.run_dir / "summary.json")
    return "; ".join(metrics.missing_at_the_end(summary)) or None if summary else "its end"


def _was_cut(job: Job) -> bool:
    """Whether the process of a finished run was killed before it closed its record. Such a job is submitted once more,
    which closes the record. A record may also be open because the run is being evaluated now.
    """
    about = read_json(job.run_dir / "tracking.json")
    return about.get("status") == "RUNNING" and last_status(job.run_dir)[0] != "RUNNING"


def _is_active(launcher: Slurm | Local, id: str) -> bool:
    state = launcher.states([id])[id]
    return state not in ENDED and state != "ENDED"


def _wait_for_results(jobs: list[Job], *, seconds: float = 5.0) -> None:
    """Wait for result files: a shared file system may show them later than SLURM shows the end of their job."""
    end = time.monotonic() + seconds
    results = ("summary.json", "failure.txt")
    while time.monotonic() < end and not all(any((job.run_dir / r).exists() for r in results) for job in jobs):
        time.sleep(0.2)


def _say(job: Job, what: str) -> None:
    print(f"caco: {job.run_dir.parent.name}/{job.run_dir.name}: {what}", file=sys.stderr)


def _report(jobs: list[Job], failed: list[Job], states: dict[str, str]) -> str:
    lines = [f"{len(failed)} of {amount(len(jobs), 'job')} {'has' if len(failed) == 1 else 'have'} failed:"]
    for job in failed:
        submitted = read_json(job.run_dir / "job.json")
        failure = job.run_dir / "failure.txt"
        if failure.exists():
            why = last_line(failure) or f"why is not known: {failure} is empty, as a full disk leaves it"
        elif (job.run_dir / "summary.json").exists():
            why = _lacks(job) or ""
        else:
            state = states.get(submitted["id"])
            ended = f" ({state})" if state in ENDED else ""
            why = "\n    ".join([f"the process ended without a result{ended}", *_tail(submitted["log"])])
        lines += [f"  {job.run_dir}", f"    {why}", f"    log: {submitted['log']}"]
    lines.append("Give the same command again to submit only these. To run one of them here, in this process:")
    words = [*folders.flag(), *failed[0].overrides]
    lines.append(f"  python -m caco.train {shlex.join(words)} hydra.run.dir={failed[0].run_dir}")
    return "\n".join(lines)
