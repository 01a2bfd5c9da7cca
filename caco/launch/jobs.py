"""What every launcher runs: one command of a sweep, with a copy of the code and the environment variables it needs."""

import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from caco import instructions
from caco.errors import UserError
from caco.launch.labels import SWEEP
from caco.launch.snapshot import OWN


@dataclass(frozen=True)
class Job:
    """One run, in the form that submitit pickles; `overrides` are its command line."""

    overrides: tuple[str, ...]
    run_dir: Path

    def __call__(self) -> None:
        _export_ranks()
        quoted = str(self.run_dir).replace("\\", "\\\\").replace("'", "\\'")
        own = Path(__file__).parents[2] / OWN  # this file is in the copy of the code, which holds the user's folder too
        flag = ["--config-dir", str(own)] if own.is_dir() else []
        sys.argv = ["caco-train", *flag, *self.overrides, f"hydra.run.dir='{quoted}'"]
        runpy.run_module("caco.train", run_name="__main__")

    def checkpoint(self) -> Any:
        """What submitit queues again when SLURM takes the node away: the same job, which finds its checkpoints."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _export_ranks() -> None:
    """Export the variables that torchrun would set, if submitit has started several processes for this job."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    job = JobEnvironment()
    if job.num_tasks > 1:
        # Below the ports that kernels assign, and different for jobs that may share a node.
        os.environ["MASTER_PORT"] = str(10_000 + int(job.raw_job_id) % 20_000)
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def environment_of_jobs(code: Path) -> dict[str, str]:
    """The environment variables with which a job imports caco from `code`, and not, as `python -m` would prefer, from
    the directory in which it starts.

    They also tell a job its sweep and its instruction set, because sbatch may pass no environment on.
    """
    level = {} if instructions.LEVEL is None else {instructions.VARIABLE: instructions.LEVEL}
    # The copy of the user's own folder comes first too, because the original may be on the path as well.
    path = [str(code), str(code / OWN) if (code / OWN).is_dir() else "", os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONSAFEPATH": "1",
        SWEEP: os.environ.get(SWEEP, "null"),
        **level,
    }


def demand(key: str, got: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"launcher.{key}: expected {expected}, got {got}")


def check_ranks(cfg: DictConfig, ranks: int, gpus: int) -> None:
    if cfg.batch % ranks:
        raise UserError(f"batch: expected a multiple of the {ranks} processes of a job, got {cfg.batch}")
    if (cfg.device == "cpu") != (gpus == 0) and cfg.device != "auto":
        raise UserError(f"device={cfg.device}: expected launcher GPUs for cuda and none for cpu, got {gpus} GPUs")
