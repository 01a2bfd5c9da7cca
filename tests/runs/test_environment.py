"""The record of machine, versions and code is made without torch; what cannot be found is recorded as unknown."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from caco.runs import environment as module
from caco.runs.environment import environment

ROOT = Path(__file__).parents[2]


def test_versions_machine_and_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    found = environment()
    import torch

    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert int(found["cores"]) >= 1
    assert float(found["memory_gib"]) > 0
    assert found["slurm_job_id"] == "77"
    assert (found["gpus"] == "none") == (not torch.cuda.is_available())
    assert found["instructions_torch"] == torch.backends.cpu.get_cpu_capability()
    assert {found["instructions_bank"], found["instructions_views"]} <= {
        "plain",
        "avx2",
        "avx512",
        "amx",
        "off",
        "not built",
    }
    assert all(isinstance(value, str) and value for value in found.values())
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert environment()["slurm_job_id"] == "70_3"


def git(directory, *arguments):
    command = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(directory), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source tree that contains this module."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    file = tmp_path / "environment.py"
    file.write_text("")
    monkeypatch.setattr(module, "__file__", str(file))
    git(tmp_path, "init", "-q")
    return tmp_path


def test_the_source_is_named_by_its_sha_and_changes_to_it_are_seen(source):
    git(source, "add", ".")
    git(source, "commit", "-qm", "one")
    found = environment()
    assert (found["git_sha"], found["git_dirty"]) == (git(source, "rev-parse", "HEAD"), "false")
    (source / "environment.py").write_text("changed")
    assert environment()["git_dirty"] == "true"


def test_looking_at_the_source_never_locks_or_writes_its_repository(source):
    """A run that is killed meanwhile would leave the lock behind, and no commit could be made any more."""
    git(source, "add", ".")
    git(source, "commit", "-qm", "one")
    os.utime(source / "environment.py", (1, 1))  # `git status` would note this in the index
    index = (source / ".git" / "index").read_bytes()
    assert environment()["git_dirty"] == "false"
    assert (source / ".git" / "index").read_bytes() == index
    git(source, "status")
    assert (source / ".git" / "index").read_bytes() != index, "git still writes what this test looks for"


def test_a_repository_around_an_installed_caco_says_nothing_about_it(source):
    (source / "other").write_text("")
    git(source, "add", "other")
    git(source, "commit", "-qm", "one")
    found = environment()
    assert (found["git_sha"], found["git_dirty"]) == ("unknown", "unknown")


def test_a_machine_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git_sha"] == "unknown"


def test_it_imports_none_of_what_it_names():
    code = (
        "import sys; from caco.runs.environment import environment; environment()\n"
        "sys.exit(bool({'torch', 'torchvision', 'timm', 'hydra', 'mlflow', 'ffcv', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
