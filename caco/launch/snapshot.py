"""Copies caco's code for jobs that start later, when the checkout may have been edited."""

import hashlib
import os
import shutil
from pathlib import Path

from caco.config import folders
from caco.config.folders import CONF
from caco.runs.environment import SOURCE, environment
from caco.runs.files import remove_left_behind, write_json

OWN = "config_dir"  # name of the user's own folder within a copy


def snapshot(folder: Path) -> Path:
    """Copy caco, conf and the folder of --config-dir into a subfolder of `folder` that is named by content and commit.
    Jobs must have the returned path first on Python's import path.

    The copy has no Git repository; its source.json records the commit, and whether files were changed since
    (caco/runs/environment.py).
    """
    package = Path(__file__).parents[1]
    parts = {package: "caco"} if CONF.is_relative_to(package) else {package: "caco", CONF: "conf"}
    files = {f"{name}/{path.relative_to(part)}": path for part, name in parts.items() for path in _files(part)}
    own = folders.config_dir()
    if own is not None:
        files |= {f"{OWN}/{path.relative_to(own)}": path for path in folders.files(Path(own))}
    known = environment()
    source = {key: known[key] for key in ("git_sha", "git_dirty")}
    content = hashlib.sha256(repr(source).encode())
    for name, path in sorted(files.items()):
        content.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    target = folder / content.hexdigest()[:16]
    remove_left_behind(folder, of_others=("*",), others_s=600)
    if not target.exists():
        aside = folder / f".{target.name}.{os.getpid()}"
        for name, path in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, aside / name)
        write_json(aside / SOURCE, source)
        try:
            aside.rename(target)
        except OSError:
            shutil.rmtree(aside)  # another sweep has made the same copy in the meantime
            if not target.exists():
                raise
    return target


def _files(part: Path) -> list[Path]:
    return [path for path in part.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
