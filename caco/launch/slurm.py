"""Runs jobs in SLURM's queue, through submitit."""

import math
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from caco.errors import UserError
from caco.launch.jobs import Job, check_ranks, demand, environment_of_jobs
from caco.ranges import AboveZero, Count, Natural, held

# States of a job that has ended; in every other state the sweep waits for it.
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED", "TIMEOUT",
}  # fmt: skip


class Slurm:
    """Jobs in SLURM's queue, one array per sweep.

    Args:
        partition, account, qos, constraint: as sbatch takes them; null leaves the choice to the cluster.
        nodes, gpus_per_node: of each job.
        tasks_per_node: number of processes on a node; null is one per GPU.
        cpus_per_task, mem_gb: CPUs of a process, and memory of a node; null is the cluster's default.
        hours: time limit of one turn in the queue; a run that needs longer saves and queues again.
        signal_minutes: minutes before the limit at which the run is told to save and stop.
        max_timeouts: the number of times that a run may reach the limit and queue again.
        max_crashes: the number of times that a killed job (out of memory, a lost process) queues again.
        parallel: number of jobs of the sweep that run at the same time.
        setup: shell lines before the job, such as `module load cuda`.
        sbatch: any other options of sbatch by their long names, or null.
        srun: further arguments of srun.
    Raises:
        ValueError: a number is out of its range.
    """

    needs_refill = False  # the queue takes any number of jobs; SLURM starts `parallel` of them at a time

    @held
    def __init__(
        self,
        *,
        partition: str | None,
        account: str | None,
        qos: str | None,
        constraint: str | None,
        nodes: Count,
        gpus_per_node: Natural,
        tasks_per_node: Count | None,
        cpus_per_task: Count | None,
        mem_gb: AboveZero | None,
        hours: AboveZero,
        signal_minutes: AboveZero,
        max_timeouts: Natural,
        max_crashes: Natural,
        parallel: Count,
        setup: list[str],
        sbatch: dict[str, Any] | None,
        srun: list[str],
    ):
        tasks = max(1, gpus_per_node) if tasks_per_node is None else tasks_per_node
        demand("nodes", nodes, nodes >= 1, "at least 1")
        demand("gpus_per_node", gpus_per_node, gpus_per_node >= 0, "0 or more")
        demand("tasks_per_node", tasks_per_node, tasks >= 1, "null or at least 1")
        demand("hours", hours, hours > 0, "more than 0")
        # Otherwise a turn could be over after a step or two. SLURM may send the signal up to a minute early.
        demand("signal_minutes", signal_minutes, 0 < signal_minutes <= hours * 30, "at most half of launcher.hours")
        demand("parallel", parallel, parallel >= 1, "at least 1")
        self.partition, self.ranks, self.cpus = partition, nodes * tasks, tasks * (cpus_per_task or 1)
        self.gpus_per_node = gpus_per_node
        self.requested: dict[str, float] = {"hours": hours, "gpus_per_node": gpus_per_node, "nodes": nodes}
        self.parallel, self.setup, self.max_timeouts, self.max_crashes = parallel, setup, max_timeouts, max_crashes
        wanted = {
            "partition": partition,
            "account": account,
            "qos": qos,
            "constraint": constraint,
            "nodes": nodes,
            "gpus_per_node": gpus_per_node or None,
            "ntasks_per_node": tasks,
            "cpus_per_task": cpus_per_task,
            "mem": None if mem_gb is None else f"{math.ceil(mem_gb * 1024)}MB",
            "time": math.ceil(hours * 60),
            "signal_delay_s": math.ceil(signal_minutes * 60),
            "array_parallelism": parallel,
            "additional_parameters": {"requeue": True, **(sbatch or {})},
            # If one rank fails, the others end at once. Ranks that linger keep their nodes busy; if they cannot be
            # killed, SLURM drains the nodes.
            "srun_args": ["--kill-on-bad-exit=1", "--open-mode=append", *srun],
        }
        self._wanted = {key: value for key, value in wanted.items() if value is not None}

    def check(self, cfg: DictConfig) -> None:
        """Refuse, before anything is queued, what this cluster cannot run.

        Raises:
            UserError: no SLURM on this machine, no such partition, more resources than it has, or a batch that the
                ranks cannot share.
        """
        if not all(shutil.which(command) for command in ("sbatch", "squeue", "sinfo", "scontrol")):
            raise UserError(
                "launcher=slurm needs SLURM's commands such as sbatch, which are not here: run this on a login node, or"
                " use launcher=local"
            )
        check_ranks(cfg, self.ranks, self.gpus_per_node)
        # One line for each kind of node: partition (* marks the default), its time limit, GPUs and the like on a node,
        # number of nodes, CPUs of a node.
        listed = [
            line.split("|") for line in _slurm("sinfo", "--noheader", "--format=%P|%l|%G|%D|%c").stdout.splitlines()
        ]
        names = {line[0].rstrip("*") for line in listed}
        default = {line[0].rstrip("*") for line in listed if line[0].endswith("*")}
        chosen = default if self.partition is None else set(self.partition.split(","))
        if not chosen <= names:
            raise UserError(f"launcher.partition: expected one of {', '.join(sorted(names))}, got {self.partition}")
        ours = [line[1:] for line in listed if line[0].rstrip("*") in chosen]
        if not ours:
            return  # without a default partition sbatch reports the error
        # Most clusters accept a job that exceeds these limits and let it wait for ever.
        has = {
            "hours": max(_hours(limit) for limit, *_ in ours),
            "gpus_per_node": max(
                sum(map(int, re.findall(r"\bgpu(?::[^:(,]+)?:(\d+)", kinds))) for _, kinds, *_ in ours
            ),
            "nodes": sum(int(nodes) for *_, nodes, _ in ours),
        }
        where = f"partition {','.join(sorted(chosen))}"
        for key, most in has.items():
            if self.requested[key] > most:
                raise UserError(
                    f"launcher.{key}: expected at most {most:g}, as {where} has, got {self.requested[key]:g}"
                )
        cpus = max(int(cpus.rstrip("+")) for *_, cpus in ours)
        if self.cpus > cpus:
            raise UserError(f"launcher: expected at most the {cpus} CPUs that a node of {where} has, got {self.cpus}")

    def submit(self, jobs: list[Job], folder: Path, code: Path) -> list[str]:
        """Queue the jobs, which run the copy of the code in `code`; returns their ids as squeue shows them.

        Raises:
            UserError: SLURM refuses the jobs; in SLURM's own words.
        """
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError

        folder.mkdir(parents=True, exist_ok=True)
        executor = SlurmExecutor(folder=folder / "%j", max_num_timeout=self.max_timeouts)
        executor.update_parameters(
            **self._wanted,
            job_name="caco",
            setup=[
                *self.setup,
                *(f"export {name}={shlex.quote(value)}" for name, value in environment_of_jobs(code).items()),
            ],
            teardown=self._teardown(folder),
        )
        try:
            return [job.job_id for job in executor.submit_array(jobs)]
        except FailedJobError as error:
            raise UserError(f"SLURM refuses the jobs: {_first_words(str(error))}") from error

    def states(self, ids: list[str]) -> dict[str, str]:
        """The state of each job and why it waits; UNKNOWN for all of them if SLURM does not answer."""
        command = ("squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%r|%N")
        try:
            listed = _slurm(*command).stdout.splitlines()
        except UserError:
            return {id: "UNKNOWN" for id in ids}  # the controller may be restarting, which does not disturb the jobs
        found = dict.fromkeys(ids, "ENDED")  # for jobs that ended so long ago that squeue does not list them
        for id, state, reason, nodes in (line.split("|") for line in listed):
            if id in found:
                more = nodes or reason
                found[id] = state if state in ENDED or more in ("", "None") else f"{state} ({more})"
        return found

    def log(self, folder: Path, id: str) -> Path:
        return folder / id / f"{id}_0_log.err"

    def _teardown(self, folder: Path) -> list[str]:
        """Shell lines after the job: it ends with the exit code of its ranks, and queues again if it was killed."""
        crashes = shlex.quote(str(folder)) + "/crashes_$job"
        return [
            "status=$?",
            # In the last task of an array, SLURM_JOB_ID is the id of the whole array.
            "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
            "# Above 128: ended by a signal. These are all but SIGTERM and those that people send.",
            "case $status in 132|134|135|136|137|139)",
            f'  echo "$status" >> {crashes}',
            f'  if [ "$(wc -l < {crashes})" -le {self.max_crashes} ] && scontrol requeue "$job"; then',
            '    echo "caco: killed by signal $((status - 128)); it goes back into the queue" >&2',
            "    sleep 600  # SLURM ends this script to requeue it",
            "  fi",
            "esac",
            "exit $status",
        ]


def _hours(limit: str) -> float:
    """SLURM's [days-]hours:minutes:seconds or minutes:seconds, or infinite."""
    if not re.fullmatch(r"[\d:-]+", limit):
        return math.inf
    days, _, rest = limit.rpartition("-")
    parts = [0, 0, 0, *(int(part) for part in rest.split(":"))][-3:]
    return int(days or 0) * 24 + parts[0] + parts[1] / 60 + parts[2] / 3600


def _slurm(*command: str) -> subprocess.CompletedProcess:
    """Run a command of SLURM. Raises UserError, with SLURM's own words, if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except subprocess.CalledProcessError as error:
        raise UserError(f"{command[0]}: {_first_words(error.stderr)}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} has not answered for a minute; is SLURM's controller running?") from error


def _first_words(text: str) -> str:
    """The error messages of a SLURM command in one line, without the Python text around them."""
    messages = [line.split("error: ", 1)[1] for line in text.splitlines() if re.match(r"\s*s\w+: error: ", line)]
    return "; ".join(messages) or text.strip()[-500:]
