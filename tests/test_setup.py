"""make installs what a target needs, and only once. pip and apt-get are replaced by programs that record how they are
called.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from caco.installed import BASICS

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
TORCH, NEEDS, CACO, MLFLOW, REST = (
    "torch torchvision",
    "@ @analysis",
    "--no-deps -e .",
    "@mlflow hydra-core omegaconf",
    "@slurm @dense @test",
)


@pytest.fixture
def made(tmp_path):
    """`made("demo")` runs `make demo` in a copy of the files that make reads; returns what was installed and
    printed.
    """
    folder, programs = tmp_path / "clone", tmp_path / "bin"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy2(ROOT / name, folder)
    for name in ("caco/banks/kernels/kernel.cpp", "caco/banks/kernels/kernel.h"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    calls = tmp_path / "calls"
    for program in (folder / ".venv" / "bin" / "python", programs / "apt-get", programs / "sudo"):
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$*" >> {calls}\ntest {program.name} = python\n')
        program.chmod(0o755)

    def make(*arguments: str) -> tuple[list[str], str]:
        calls.write_text("")
        # Without the variables that an outer make, which may run these tests, has set.
        variables = {
            name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        }
        variables["PATH"] = f"{programs}:{variables['PATH']}"
        command = ["make", *arguments, f"PYTHON={sys.executable}"]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=True)
        installed = [
            line.split(" ", 3)[3]
            for line in calls.read_text().splitlines()
            if line.startswith("scripts/pip_install.py")
        ]
        return [words for words in installed if words != "--upgrade pip"], done.stderr

    make.folder = folder
    return make


def test_the_demo_gets_what_it_needs_and_everything_else_comes_later_and_nothing_twice(made):
    installed, told = made("demo")
    assert installed == [TORCH, NEEDS, CACO]
    assert "setup 2 of 4: PyTorch" in told and "setup 4 of 4: caco itself" in told
    assert made("demo") == ([], "") == made("study")
    assert made("dashboard")[0] == [MLFLOW]
    installed, told = made("setup")
    assert len(installed) == 2 and installed[0].startswith("@docs ") and installed[1].endswith(REST)
    assert made("setup") == ([], "") == made("demo")


def test_the_dashboard_alone_needs_no_torch(made):
    assert made("dashboard")[0] == [MLFLOW]
    assert set(BASICS) == {"hydra", "numpy", "omegaconf"}, (
        "MLflow brings NumPy, and make dashboard has to bring the rest"
    )


def test_all_is_done_again_by_make_b_and_when_what_it_is_made_from_changes(made):
    assert made("demo")[0] == [TORCH, NEEDS, CACO] == made("-B", "demo")[0]
    os.utime(made.folder / "caco" / "banks" / "kernels" / "kernel.h", (time.time() + 10,) * 2)
    assert CACO in made("demo")[0]


def test_a_commit_is_checked_by_the_commands_of_make_lint():
    rule = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == [line.strip() for line in rule[1].splitlines()]
    assert local["repo"] == "local", "the hooks must be local, so that nothing is downloaded"
    assert {(hook["language"], hook["pass_filenames"]) for hook in local["hooks"]} == {("system", False)}


def test_what_contributing_names_is_there():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:caco|conf|tests|experiments|benchmarks|\.ci)/[\w./-]+|\w+\.(?:toml|txt))`", page)
    assert len(paths) > 40
    assert [path for path in paths if not re.search("NAME|SCALE", path) and not (ROOT / path).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"lint", "test", "test-long"} <= set(re.findall(r"(?:`|\$ )make ([a-z-]+)", page)) <= targets


def test_clean_leaves_the_runs(made):
    (made.folder / "runs").mkdir()
    made("demo")
    made("clean")
    assert not (made.folder / ".venv").exists() and (made.folder / "runs").is_dir()


def test_large_wheels_are_read_from_what_pip_prints(tmp_path):
    spec = importlib.util.spec_from_file_location("pip_install", ROOT / "scripts" / "pip_install.py")
    pip_install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pip_install)
    local = tmp_path / "scikit_learn-1.9.1-cp311-none-any.whl"
    local.write_bytes(bytes(2_000_000))
    assert pip_install.wheel("  Downloading torch-2.14.1-cp311-manylinux_2_28_x86_64.whl (555.4 MB)\n") == (
        "torch",
        555.4,
    )
    assert pip_install.wheel("  Using cached nvidia_cudnn_cu13-9.2-py3-none-any.whl (553 kB)\n") == (
        "nvidia-cudnn-cu13",
        0.553,
    )
    assert pip_install.wheel(f"Processing {local} (from caco-ssl)\n") == ("scikit-learn", 2.0)
    assert pip_install.wheel("  Downloading torch-2.14.1-cp311-any.whl.metadata (30 kB)\n") is None
    assert "torch" in " ".join(pip_install.needs("@")) and pip_install.needs("@slurm") == ["submitit>=1.5"]
