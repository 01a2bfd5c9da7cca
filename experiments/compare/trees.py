"""Check out the files of both commits, and compile their native code."""

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
    """One of the two commits. `changes` are applied to the overrides of its cases (see cases.translated)."""

    label: str  # "base" or "head"
    name: str  # the commit as the user typed it, with its hash
    tree: Path
    changes: list[str]


def git(repository: Path, *arguments: str) -> bytes:
    """Run git and return its output.

    Raises:
        Refused: git is not installed, or git failed, because there is no such commit or this is not a repository.
    """
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise Refused("git is not installed, and without it no commit can be had: install git") from error
    if done.returncode:
        raise Refused(f"git {' '.join(arguments)} failed: {done.stderr.decode().strip()}")
    return done.stdout


def check_out(repository: Path, commit: str | None, into: Path) -> str:
    """Write the files of a commit into a new folder; for None, the files of the working tree that git does not ignore.

    Returns a name for messages. This uses `git archive` and not `git worktree`, so that nothing is left in the
    repository even if the comparison is killed.
    """
    into.mkdir(parents=True)
    if commit is None:
        listed = git(repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0")
        for name in filter(None, listed):
            if (repository / name).is_file():  # git lists files that were deleted and not yet committed, too
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
    """A digest of everything that determines the compiled code: sources, compiler, its flags, Python and machine."""
    digest = hashlib.sha256(
        f"{sys.implementation.cache_tag} {platform.machine()} {sysconfig.get_config_var('CXX')}".encode()
    )
    digest.update(json.dumps([os.environ.get(name) for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS")]).encode())
    for path in sorted(tree.rglob("*")):
        if path.name == "setup.py" or path.suffix in (".c", ".cc", ".cpp", ".h", ".hpp"):
            digest.update(f"\0{path.relative_to(tree)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build_native(tree: Path, cache: Path) -> list[str]:
    """Compile the native code of a tree, or copy it from `cache` if the same sources were compiled before.

    Returns the names of the compiled modules.

    Raises:
        Refused: nothing could be compiled; the message quotes the end of the compiler's output.
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
            with contextlib.suppress(OSError):  # another comparison has put the same files there meanwhile
                (Path(aside) / "kept").rename(kept)
    shutil.copytree(kept, tree, dirs_exist_ok=True)
    return sorted(path.name.partition(".")[0] for path in kept.rglob("*.so"))
