"""What every launcher runs: one command of a sweep, in a copy of the code, with what it needs in its environment."""

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
    """One run, as submitit pickles it; `overrides` are its command line."""

    overrides: tuple[str, ...]
    run_dir: Path

    def __call__(self) -> None:
        _export_ranks()
        quoted = str(self.run_dir).replace("\\", "\\\\").replace("'", "\\'")
        own = Path(__file__).parents[2] / OWN  # of the copy of the code that this is
        flag = ["--config-dir", str(own)] if own.is_dir() else []
        sys.argv = ["caco-train", *flag, *self.overrides, f"hydra.run.dir='{quoted}'"]
        runpy.run_module("caco.train", run_name="__main__")

    def checkpoint(self) -> Any:
        """What goes back into the queue when SLURM takes the node away: the same again, it finds its checkpoints."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _export_ranks() -> None:
    """What torchrun would export, where submitit has started several processes for this job."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    job = JobEnvironment()
    if job.num_tasks > 1:
        # Below the ports that kernels give out, and another one for each job that may share a node.
        os.environ["MASTER_PORT"] = str(10_000 + int(job.raw_job_id) % 20_000)
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def environment_of_jobs(code: Path) -> dict[str, str]:
    """So that a job imports caco from `code` and not, which `python -m` prefers, from the directory it starts in.

    And knows its sweep and its instructions, also where sbatch hands no environment on.
    """
    level = {} if instructions.LEVEL is None else {instructions.VARIABLE: instructions.LEVEL}
    # The copy of the user's own folder, too, comes before what is there otherwise, that folder itself perhaps.
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
        raise UserError(f"device={cfg.device} and GPUs of the launcher: expected both or neither, got {gpus} GPUs")
