"""What is installed here, and the command that installs what is missing. Imports nothing of caco, so every part of caco
may use it.
"""

import importlib.util
import json
import shlex
import sys
import tomllib
import urllib.parse
from pathlib import Path

DISTRIBUTION = "caco-ssl"  # the name for pip; the package that is imported is called caco


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
