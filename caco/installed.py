"""What is installed here, and the command that installs what is missing. Imports nothing of caco, so every part of caco
may use it.
"""

import importlib.util
import json
import shlex
import sys
import tomllib
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

DISTRIBUTION = "caco-ssl"  # the name for pip; the package that is imported is called caco
BASICS = ("hydra", "numpy", "omegaconf")  # every command needs them, before it can show an error itself
# What pyproject.toml requires, by the names under which it is imported.
REQUIRED = (*BASICS, "PIL", "psutil", "safetensors", "scipy", "sklearn", "threadpoolctl", "timm", "torch",
            "torchvision", "tqdm")  # fmt: skip
PROGRAMS = ("analysis", "benchmarks", "caco", "experiments")


def version() -> str:
    """caco's own version, from pyproject.toml; "unknown" in a copy of caco that was not installed.

    A checkout's own file comes before pip's record, which may be of another checkout or of an earlier version.
    """
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    import importlib.metadata  # not at the top of the file, because refusals do not need it

    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def is_installed(module: str) -> bool:
    """Whether a top-level module can be imported, without importing it. A folder without __init__.py does not count."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def require_the_basics() -> None:
    """End one of our commands (`python -m caco.train`) with a sentence and exit code 2 if this Python lacks a package
    that every command needs, as Debian's own Python does. Programs that import caco get Python's own error.
    """
    words = sys.orig_argv[1:]
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    missing = [name for name in BASICS if not is_installed(name)]
    if missing and module.partition(".")[0] in PROGRAMS:
        print(f"caco: {not_installed(missing)}", file=sys.stderr)
        sys.exit(2)


def not_installed(modules: Sequence[str]) -> str:
    """Says that this Python lacks modules that caco requires, and what to do about it."""
    folder = checkout()
    venv = None if folder is None else folder / ".venv"
    if venv is not None and venv.resolve() != Path(sys.prefix).resolve() and (venv / "bin" / "python").exists():
        shown = venv if folder != Path.cwd() else ".venv"
        how = (
            f"activate caco's environment (source {shlex.quote(f'{shown}/bin/activate')}), then give the command again"
        )
    elif folder is not None:
        where = "" if folder == Path.cwd() else f" -C {shlex.quote(str(folder))}"
        how = (
            f"run make{where} setup, which makes an environment for caco, and activate that (source"
            f" {shlex.quote(f'{venv}/bin/activate' if where else '.venv/bin/activate')}), or use another environment"
            " that has caco"
        )
    else:
        how = f"use the environment that has caco, or install what is missing: {command_to_install()}"
    return f"this Python ({sys.executable}) has no {', '.join(modules)}, which caco needs; {how}"


def command_to_install(extra: str = "") -> str:
    """The command that installs an optional part of caco, suited to how caco was installed: from a checkout or a wheel.

    Args:
        extra: the part's name in pyproject.toml, such as slurm; "" is caco without optional parts.
    """
    part = f"[{extra}]" if extra else ""
    folder = checkout()
    if folder is None:
        return f"pip install {shlex.quote(DISTRIBUTION + part)}"
    is_here = folder == Path.cwd()
    venv = folder / ".venv"
    if Path(sys.prefix).resolve() != venv.resolve():  # the user's own environment
        return f"pip install -e {shlex.quote(('.' if is_here else str(folder)) + part)}"
    # If make has already installed something, it needs -B to install it again.
    options = ["-B"] if not extra or (venv / ".done").exists() else []
    options += [] if is_here else ["-C", str(folder)]
    return shlex.join(["make", *options, "setup"])


def to_install(extra: str = "", *, package: str = "") -> str:
    """The end of a message that says that something is not installed: "; to install it: COMMAND".

    Args:
        extra: an optional part of caco, as for `command_to_install`.
        package: the name for pip of a package that no part of caco has; it takes precedence.
    """
    return f"; to install it: {f'pip install {shlex.quote(package)}' if package else command_to_install(extra)}"


def checkout() -> Path | None:
    """The checkout that caco runs from or is installed from; None if a wheel was installed."""
    parent = Path(__file__).resolve().parents[1]
    if (parent / "pyproject.toml").is_file():
        return parent
    # A launcher's job runs a copy of the package (caco/launch/snapshot.py); pip knows the checkout behind it.
    import importlib.metadata  # not at the top of the file, because refusals do not need it

    try:
        origin = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    about = json.loads(origin or "{}")
    is_editable = about.get("dir_info", {}).get("editable", False)
    return Path(urllib.parse.unquote(urllib.parse.urlparse(about["url"]).path)) if is_editable else None
