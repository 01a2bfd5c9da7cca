"""What a run ran on: code, versions, machine. For environment.json and the tracker's tags; imports no torch."""

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

from caco import instructions
from caco.runs.files import read_json

_PACKAGES = {"torch": "torch", "torchvision": "torchvision", "timm": "timm", "hydra": "hydra-core", "mlflow": "mlflow"}
_PACKAGES |= {"ffcv": "ffcv", "numpy": "numpy"}
SOURCE = "source.json"  # beside the package in a copy for jobs, which has no Git repository (caco/launch/snapshot.py)


def environment() -> dict[str, str]:
    """Git SHA and state of caco's source, versions, machine, SLURM job; "unknown" for what cannot be determined.

    GPUs and PyTorch's instruction set are named only if torch is already imported, because importing it takes seconds.
    """
    folder = Path(__file__).parent
    # In a virtual environment, caco may lie inside some other repository, whose SHA would be misleading.
    # Without locks, because a process killed while `git status` writes the index would leave one in the repository.
    git = ("git", "--no-optional-locks", "-C", str(folder))
    is_ours = _output(*git, "ls-files", "--error-unmatch", Path(__file__).name) is not None
    sha = _output(*git, "rev-parse", "HEAD") if is_ours else None
    changes = _output(*git, "status", "--porcelain") if is_ours else None
    found = {
        "git_sha": sha or "unknown",
        "git_dirty": "unknown" if not sha or changes is None else str(bool(changes)).lower(),
        **read_json(folder.parents[1] / SOURCE),
        "python": platform.python_version(),
        **{name: _version(package) for name, package in _PACKAGES.items()},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _after_colon(Path("/proc/cpuinfo"), "model name") or platform.machine() or "unknown",
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        **instructions.record(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
    }
    # The number that squeue shows. A job of an array has one of its own besides the array's.
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        found["slurm_job_id"] = f"{array}_{task}"
    elif "SLURM_JOB_ID" in os.environ:
        found["slurm_job_id"] = os.environ["SLURM_JOB_ID"]
    return found


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # git or the repository is missing, as with an installed package
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _after_colon(path: Path, key: str) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _memory_gib() -> str:
    kilobytes = _after_colon(Path("/proc/meminfo"), "MemTotal").split()
    return f"{int(kilobytes[0]) / 2**20:.1f}" if kilobytes else "unknown"


def _gpus() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
