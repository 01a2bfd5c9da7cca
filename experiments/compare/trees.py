"""The two commits' files, and the native parts that are compiled of them."""

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from experiments.compare.refusal import Refused


@dataclass
class Side:
    """One of the two that are compared. `changes`: of its command lines (see translated)."""

    label: str  # base or head
    name: str  # as typed, with the commit
    tree: Path
    changes: list[str]


def git(repository: Path, *arguments: str) -> bytes:
    """Raises: Refused: git has no such commit, this is no repository (in git's words), or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise Refused("git is not installed, and without it no commit can be had: install git") from error
    if done.returncode:
        raise Refused(f"git {' '.join(arguments)} failed: {done.stderr.decode().strip()}")
    return done.stdout


def check_out(repository: Path, commit: str | None, into: Path) -> str:
    """Write a commit's files, or for None those of the working tree that git does not ignore; returns what they are
    called.

    An archive and not `git worktree`: nothing is left in the repository, however this ends.
    """
    into.mkdir(parents=True)
    if commit is None:
        listed = git(repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0")
        for name in filter(None, listed):
            if (repository / name).is_file():  # one that was deleted is still listed
                (into / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(repository / name, into / name)
        changed = len(git(repository, "status", "--porcelain").splitlines())
        return (
            f"the working tree (at {git(repository, 'rev-parse', '--short', 'HEAD').decode().strip()}, {changed} files"
            " changed)"
        )
    sha = (
        git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}").decode().strip()
    )
    with tarfile.open(fileobj=io.BytesIO(git(repository, "archive", sha))) as archive:
        archive.extractall(into, filter="data")
    return commit if sha.startswith(commit) else f"{commit} ({sha[:7]})"


def native_digest(tree: Path) -> str:
    """Of everything that the compiled parts are made from."""
    digest = hashlib.sha256(
        f"{sys.implementation.cache_tag} {platform.machine()} {sysconfig.get_config_var('CXX')}".encode()
    )
    digest.update(json.dumps([os.environ.get(name) for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS")]).encode())
    for path in sorted(tree.rglob("*")):
        if path.name == "setup.py" or path.suffix in (".c", ".cc", ".cpp", ".h", ".hpp"):
            digest.update(f"\0{path.relative_to(tree)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build_native(tree: Path, cache: Path) -> list[str]:
    """Put the compiled parts into a tree; sources that were compiled before are not compiled again. Returns their
    names.

    Raises:
        Refused: nothing could be compiled; with the compiler's last words.
    """
    kept = cache / native_digest(tree)
    if not kept.is_dir():
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=tree,
            capture_output=True,
            text=True,
            check=False,
        )
        built = [path.relative_to(tree) for path in tree.rglob("*.so") if "build" not in path.relative_to(tree).parts]
        if not built:
            words = (done.stderr or done.stdout).strip()[-500:]
            raise Refused(f"the native parts could not be built (--no-native compares without them):\n{words}")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as aside:
            for name in built:
                (Path(aside) / "kept" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(tree / name, Path(aside) / "kept" / name)
            with contextlib.suppress(OSError):  # another comparison was faster
                (Path(aside) / "kept").rename(kept)
    shutil.copytree(kept, tree, dirs_exist_ok=True)
    return sorted(path.name.partition(".")[0] for path in kept.rglob("*.so"))
