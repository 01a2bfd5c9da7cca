"""What is installed here, and the command that installs what is not. For every floor: imports nothing of caco."""

import importlib.util
import json
import shlex
import sys
import tomllib
import urllib.parse
from pathlib import Path

DISTRIBUTION = "caco-ssl"  # pip's name of it; what is imported is caco


def version() -> str:
    """caco's own version, which pyproject.toml has; "unknown" in a copy of caco that nobody has installed.

    A checkout's file comes before what pip has noted: pip may have noted it of another checkout, or of an earlier one.
    """
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    import importlib.metadata  # here and not above: refusals need none of it

    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def is_installed(module: str) -> bool:
    """Whether a top-level module can be imported, without importing it. A mere folder of its name is none."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def command_to_install(extra: str = "") -> str:
    """The command that adds an optional part to caco, right for how caco was installed: from a checkout or as a wheel.

    Args:
        extra: the part's name in pyproject.toml, such as slurm; "" is caco without any.
    """
    part = f"[{extra}]" if extra else ""
    folder = checkout()
    if folder is None:
        return f"pip install {shlex.quote(DISTRIBUTION + part)}"
    is_here = folder == Path.cwd()
    venv = folder / ".venv"
    if Path(sys.prefix).resolve() != venv.resolve():  # an environment of the user's own
        return f"pip install -e {shlex.quote(('.' if is_here else str(folder)) + part)}"
    # What make has installed, it installs again only if it must.
    options = ["-B"] if not extra or (venv / ".done").exists() else []
    options += [] if is_here else ["-C", str(folder)]
    return shlex.join(["make", *options, "setup"])


def checkout() -> Path | None:
    """The checkout that caco runs from, or that this environment has it from; None where a wheel was installed."""
    parent = Path(__file__).resolve().parents[1]
    if (parent / "pyproject.toml").is_file():
        return parent
    # A launcher's job runs a copy of the package (caco/launch/snapshot.py); pip knows what that is a copy of.
    import importlib.metadata  # here and not above: refusals need none of it

    try:
        origin = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    about = json.loads(origin or "{}")
    is_editable = about.get("dir_info", {}).get("editable", False)
    return Path(urllib.parse.unquote(urllib.parse.urlparse(about["url"]).path)) if is_editable else None
