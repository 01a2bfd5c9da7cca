"""Runs jobs as processes of this machine, through submitit."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from caco.launch.jobs import Job, check_ranks, demand, environment_of_jobs
from caco.ranges import Count, Natural, held


class Local:
    """Jobs as processes of this machine, a few at a time.

    Args:
        gpus_per_job: number of GPUs of a job. Every job sees the same first ones.
        tasks_per_job: number of processes of a job; null is one per GPU.
        parallel: number of jobs at the same time.
        setup: shell lines before each job.
    """

    needs_refill = True

    @held
    def __init__(self, *, gpus_per_job: Natural, tasks_per_job: Count | None, parallel: Count, setup: list[str]):
        tasks = max(1, gpus_per_job) if tasks_per_job is None else tasks_per_job
        demand("gpus_per_job", gpus_per_job, gpus_per_job >= 0, "0 or more")
        demand("tasks_per_job", tasks_per_job, tasks >= 1, "null or at least 1")
        demand("parallel", parallel, parallel >= 1, "at least 1")
        self.gpus, self.ranks, self.parallel, self.setup = gpus_per_job, tasks, parallel, setup
        self._running: dict[str, Any] = {}

    def check(self, cfg: DictConfig) -> None:
        """Refuse a batch that the ranks cannot share, GPUs that would not be used, and more GPUs than there are."""
        check_ranks(cfg, self.ranks, self.gpus)
        if self.gpus:
            import torch  # takes seconds, so only if GPUs are asked for

            demand(
                "gpus_per_job",
                self.gpus,
                self.gpus <= (n := torch.cuda.device_count()),
                f"at most {n}, the number of this machine's GPUs",
            )

    def submit(self, jobs: list[Job], folder: Path, code: Path) -> list[str]:
        """Start the jobs, which run the copy of the code in `code`; returns their process ids."""
        from submitit import LocalExecutor
        from submitit.core.utils import environment_variables

        folder.mkdir(parents=True, exist_ok=True)
        executor = LocalExecutor(folder=folder / "%j", max_num_timeout=10**6)
        executor.update_parameters(
            gpus_per_node=self.gpus, tasks_per_node=self.ranks, timeout_min=10**6, setup=self.setup
        )
        with environment_variables(**environment_of_jobs(code)):
            started = executor.submit_array(jobs)
        self._running |= {job.job_id: job for job in started}
        return [job.job_id for job in started]

    def states(self, ids: list[str]) -> dict[str, str]:
        return {id: "ENDED" if id not in self._running or self._running[id].done() else "RUNNING" for id in ids}

    def log(self, folder: Path, id: str) -> Path:
        return folder / id / f"{id}_0_log.err"
