"""caco in different installations: the install command that messages name, a wheel, and an editable install used from
any folder.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import caco
from caco import errors, installed
from caco.installed import command_to_install, is_installed

ROOT = Path(installed.__file__).parents[1]
PARTS = (
    "caco",
    "conf",
    "hydra_plugins",
    "experiments",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)


@pytest.fixture
def as_if_in(monkeypatch, tmp_path):
    """`as_if_in("site")` makes caco believe that it is in tmp_path/site; returns that folder."""

    def place(name: str, *, prefix: str = sys.prefix, pyproject: bool = False) -> Path:
        folder = tmp_path / name
        (folder / "caco").mkdir(parents=True)
        if pyproject:
            (folder / "pyproject.toml").touch()
        monkeypatch.setattr(installed, "__file__", str(folder / "caco" / "installed.py"))
        monkeypatch.setattr(sys, "prefix", prefix)
        return folder

    monkeypatch.chdir(tmp_path)
    return place


def recorded(monkeypatch, origin: dict | None) -> None:
    """Set what pip has recorded about the origin of caco-ssl."""

    class Distribution:
        def read_text(self, name):
            assert name == "direct_url.json"
            return origin and json.dumps(origin)

    def distribution(name):
        assert name == "caco-ssl"
        return Distribution()

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


def test_the_version_is_that_of_the_project_also_where_nothing_is_installed(as_if_in, monkeypatch):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert caco.__version__ == declared
    assert f"\nversion: {declared}\n" in (ROOT / "CITATION.cff").read_text()
    (as_if_in("checkout") / "pyproject.toml").write_text('[project]\nversion = "7.1"\n')
    assert installed.version() == "7.1", "pip's record of another checkout must not matter"
    as_if_in("copy")
    monkeypatch.setattr(installed, "DISTRIBUTION", "caco-that-nobody-installed")
    assert installed.version() == "unknown"


def test_a_wheel_gets_its_parts_from_pip_under_its_own_name(as_if_in, monkeypatch):
    as_if_in("site-packages")
    recorded(monkeypatch, None)  # installed from an index
    assert command_to_install("slurm") == "pip install 'caco-ssl[slurm]'"
    assert command_to_install() == "pip install caco-ssl"
    recorded(
        monkeypatch, {"url": "file:///checkout", "dir_info": {}}
    )  # `pip install .` makes a copy, which no longer needs the checkout
    assert command_to_install("slurm") == "pip install 'caco-ssl[slurm]'"


def test_a_checkout_in_an_environment_of_ones_own_gets_them_from_pip_by_its_path(as_if_in, monkeypatch):
    folder = as_if_in("my clone", pyproject=True)
    assert command_to_install("slurm") == f"pip install -e '{folder}[slurm]'"
    monkeypatch.chdir(folder)
    assert command_to_install("slurm") == "pip install -e '.[slurm]'"
    assert command_to_install() == "pip install -e ."


def test_a_checkout_that_make_has_set_up_gets_them_from_make(as_if_in, monkeypatch, tmp_path):
    folder = as_if_in("clone", prefix=str(tmp_path / "clone" / ".venv"), pyproject=True)
    assert command_to_install("slurm") == f"make -C {folder} setup"
    assert command_to_install() == f"make -B -C {folder} setup", (
        "caco itself is installed, so only make -B installs it again"
    )
    monkeypatch.chdir(folder)
    assert command_to_install("slurm") == "make setup"
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".done").touch()
    assert command_to_install("slurm") == "make -B setup"


def test_a_job_that_runs_a_copy_of_a_checkout_names_the_checkout(as_if_in, monkeypatch):
    as_if_in("runs/caco/.code/0123")
    recorded(monkeypatch, {"url": "file:///home/me/my%20clone", "dir_info": {"editable": True}})
    assert command_to_install("ffcv") == "pip install -e '/home/me/my clone[ffcv]'"


def test_every_part_that_a_message_names_is_one_of_the_distribution():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == installed.DISTRIBUTION
    sources = [
        *ROOT.glob("caco/**/*.py"),
        *ROOT.glob("experiments/*.py"),
        *ROOT.glob("analysis/*.py"),
        *ROOT.glob("docs/*.md"),
        ROOT / "README.md",
    ]
    text = "\n".join(source.read_text() for source in sources)
    named = set(re.findall(r"""to_install\(["'](\w+)["']\)""", text))
    assert named == {"slurm", "ffcv", "mlflow", "analysis", "dense"} <= set(project["optional-dependencies"])
    assert "caco[" not in text, "the distribution is caco-ssl; caco[...] would be another project's"


@pytest.mark.parametrize(
    "module", ["caco.train", "caco.doctor", "caco.tracking.sync", "experiments.run", "analysis.table"]
)
def test_a_python_that_lacks_what_every_command_needs_says_in_a_sentence_what_to_do(tmp_path, module):
    """As Debian's own Python: without site-packages (-S), and with nothing but this checkout."""
    command = [sys.executable, "-S", "-m", module]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(
        f"caco: this Python ({sys.executable}) has no hydra, numpy, omegaconf, which caco needs; "
    )


def test_outside_the_environment_its_activation_is_named_or_else_how_it_is_made(as_if_in, monkeypatch):
    folder = as_if_in("clone", pyproject=True)
    assert f"; run make -C {folder} setup, " in installed.not_installed(["hydra"])
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert f" activate caco's environment (source {folder}/.venv/bin/activate), " in installed.not_installed(["hydra"])
    monkeypatch.chdir(folder)
    assert " (source .venv/bin/activate), " in installed.not_installed(["hydra"])
    as_if_in("site-packages")
    recorded(monkeypatch, None)
    assert installed.not_installed(["hydra"]).endswith(": pip install caco-ssl")


def test_a_missing_requirement_is_said_in_a_sentence_and_another_missing_module_is_a_bug(capsys):
    with pytest.raises(SystemExit) as end, errors.shown():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    assert end.value.code == 2 and " has no torch, which caco needs; " in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError), errors.shown():
        raise ModuleNotFoundError("No module named 'mine'", name="mine")


def test_a_folder_of_a_modules_name_does_not_install_it(monkeypatch, tmp_path):
    (tmp_path / "mlflow_store").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed("hydra") and not is_installed("mlflow_store") and not is_installed("never_made")


def wheel(checkout: Path, kind: str) -> Path:
    """The wheel that pip would make of a checkout, built by the same backend, but without the native parts."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77, as pyproject.toml says")
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    no_compiler = os.environ | {"CC": "false", "CXX": "false"}
    command = [sys.executable, "-c", code, str(checkout.parent)]
    done = subprocess.run(command, cwd=checkout, env=no_compiler, capture_output=True, text=True, check=True)
    return checkout.parent / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A checkout named caco, as `git clone` names it, that has a run in its folder runs/."""
    folder = tmp_path_factory.mktemp("above") / "caco"
    for part in PARTS:
        source, target = ROOT / part, folder / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", "records"))
        else:
            shutil.copy2(source, target)
    (folder / "runs" / "caco").mkdir(parents=True)
    return folder


def environment(folder: Path, installed_wheel: Path) -> Path:
    """A virtual environment with the unpacked wheel that also sees the packages of this environment; returns its
    Python.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    with zipfile.ZipFile(installed_wheel) as content:
        content.extractall(site)
    # A path in a .pth file adds the modules of that folder but not its .pth files, by which caco may be installed
    # there.
    (site / "zz_packages_of_the_tests.pth").write_text(
        "\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")})
    )
    return folder / "bin" / "python"


def from_folder(folder: Path, *command: str | Path) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run([*map(str, command)], cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_an_editable_install_works_from_every_folder_the_one_above_its_clone_included(clone, tmp_path):
    """In the folder above the clone, `caco` is a folder and not the package, and its runs/ is not
    caco/runs/identity.py.
    """
    python = environment(tmp_path / "venv", wheel(clone, "editable"))
    names = ("caco", "caco.runs.identity", "hydra_plugins.caco_launcher", "experiments.run")
    found = f"from importlib.util import find_spec; print(*(find_spec(name).origin for name in {names}), sep='\\n')"
    files = (
        "caco/__init__.py",
        "caco/runs/identity.py",
        "hydra_plugins/caco_launcher/__init__.py",
        "experiments/run.py",
    )
    expected = "".join(f"{clone}/{file}\n" for file in files)
    for folder in (clone.parent, clone, clone / "caco", clone / "runs", tmp_path, Path("/")):
        done = from_folder(folder, python, "-c", found)
        assert (done.stdout, done.stderr) == (expected, ""), folder
    done = from_folder(
        clone.parent, python, "-m", "caco.train", "bach=3", "data=digits", "augmentation=digits", "batch=64"
    )
    assert (done.returncode, done.stderr) == (2, "caco: bach: no such key; did you mean batch?\n")


def test_a_wheel_carries_its_configuration_and_nothing_beside_the_package(clone, tmp_path):
    made = wheel(clone, "wheel")
    with zipfile.ZipFile(made) as content:
        names = content.namelist()
    assert {name.partition("/")[0] for name in names} == {"caco", "hydra_plugins", "caco_ssl-0.1.0.dist-info"}
    configured = {file.relative_to(ROOT).as_posix() for file in (ROOT / "conf").rglob("*.yaml")}
    assert {name.removeprefix("caco/") for name in names if name.endswith(".yaml")} == configured
    python = environment(tmp_path / "venv", made)
    told = (
        "import caco; from caco.installed import command_to_install as c;"
        " from caco.config.composition import compose as d; print(c('mlflow'), d([]).seed, caco.__version__)"
    )
    done = from_folder(tmp_path, python, "-c", told)
    assert (done.stdout, done.stderr) == ("pip install 'caco-ssl[mlflow]' 0 0.1.0\n", "")
