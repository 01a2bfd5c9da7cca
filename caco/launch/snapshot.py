"""A copy of this code, for jobs that start later than it may be edited."""

import hashlib
import os
import shutil
from pathlib import Path

from caco.config.composition import CONF
from caco.runs.environment import SOURCE, environment
from caco.runs.files import write_json


def snapshot(folder: Path) -> Path:
    """Copy caco and conf into a folder of `folder`, named by content and commit; what Python's path must begin with.

    The copy has no Git: its source.json says which commit it is, and whether with changes (caco/runs/environment.py).
    """
    package = Path(__file__).parents[1]
    parts = {package: "caco"} if CONF.is_relative_to(package) else {package: "caco", CONF: "conf"}
    files = {f"{name}/{path.relative_to(part)}": path for part, name in parts.items() for path in _files(part)}
    known = environment()
    source = {key: known[key] for key in ("git_sha", "git_dirty")}
    content = hashlib.sha256(repr(source).encode())
    for name, path in sorted(files.items()):
        content.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    target = folder / content.hexdigest()[:16]
    if not target.exists():
        aside = folder / f".{target.name}.{os.getpid()}"
        for name, path in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, aside / name)
        write_json(aside / SOURCE, source)
        try:
            aside.rename(target)
        except OSError:
            shutil.rmtree(aside)  # another sweep was quicker
            if not target.exists():
                raise
    return target


def _files(part: Path) -> list[Path]:
    return [path for path in part.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
