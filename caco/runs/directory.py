"""A run's directory: held by one process at a time, with a record of what runs there and on what."""

import contextlib
import errno
import fcntl
import glob
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from caco.errors import UserError
from caco.runs import renamed
from caco.runs.environment import environment
from caco.runs.files import read_json, write_json
from caco.runs.identity import differences, identity, plain, read_yaml, run_hash

_locks: dict[Path, int] = {}  # held until the process ends: closing one would give the lock up


def open_run(run_dir: Path | str, cfg: DictConfig | Mapping[str, Any], code: Mapping[str, str] = {}) -> None:
    """Make run_dir this run's, for as long as this process lives, and write config.yaml and environment.json into it.

    Args:
        code: what it runs besides caco, for environment.json.
    Raises:
        ValueError: another process trains there now, or the directory holds a run of another identity, or of an earlier version.
    """
    run_dir = Path(run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    hold(run_dir)
    record = run_dir / "config.yaml"
    if record.exists():
        if renamed.is_old(run_dir):
            raise UserError(
                f"{run_dir} holds a run of {_version(run_dir)}, which this version shows, evaluates and exports but cannot go on with: "
                "finish it with that version, or choose another hydra.run.dir to train anew"
            )
        changed = differences(identity(read_yaml(record)), identity(cfg))
        if changed:
            shown = "\n".join(f"  {line}" for line in changed[:20])
            more = f"\n  and {len(changed) - 20} more" if len(changed) > 20 else ""
            raise UserError(
                f"{run_dir} holds another run; choose another hydra.run.dir. What differs:\n{shown}{more}"
            )
    else:
        _name_what_is_left_behind(run_dir, cfg)
    (run_dir / "failure.txt").unlink(missing_ok=True)
    _write(record, OmegaConf.to_yaml(OmegaConf.create(plain(cfg))))
    if not (run_dir / "summary.json").exists():  # else it is done, and was where its record says
        write_environment(run_dir, code)


def _version(run_dir: Path) -> str:
    return f"an earlier version of caco (commit {read_json(run_dir / 'environment.json').get('git_sha', 'unknown')[:10]})"


def _name_what_is_left_behind(run_dir: Path, cfg: DictConfig | Mapping[str, Any]) -> None:
    """Say that an earlier version has begun this very run, beside it and with another hash in its name."""
    words, _, _ = run_dir.name.rpartition("-")
    for other in sorted(run_dir.parent.glob(f"{glob.escape(words)}-*")) if words else ():
        if other != run_dir and renamed.is_old(other) and run_hash(renamed.read_config(other)) == run_hash(cfg):
            print(f"caco: {other} is this run by {_version(other)} and cannot be gone on with: it starts anew in {run_dir}", file=sys.stderr)


def write_environment(run_dir: Path, code: Mapping[str, str] = {}) -> dict[str, str]:
    """Write environment.json, what the run runs, what it runs on and its command; returns the first two."""
    run_dir.mkdir(parents=True, exist_ok=True)
    found = {**environment(), **code}
    write_json(run_dir / "environment.json", {**found, "command": command()})
    return found


def command() -> str:
    """The command line as one types it, whichever way the program was started."""
    program, *arguments = sys.argv
    if Path(program).parts[-2:-1] == ("caco",) and Path(program).suffix == ".py":
        return shlex.join(["python", "-m", f"caco.{Path(program).stem}", *arguments])
    return shlex.join([Path(program).name, *arguments])


def record_failure(run_dir: Path, text: str) -> None:
    """Write failure.txt, unless another rank has: the first to fail is the cause, others lose their peer."""
    with contextlib.suppress(OSError), open(run_dir / "failure.txt", "x", encoding="utf-8") as file:
        file.write(text.rstrip() + "\n")


def is_first_rank() -> bool:
    """Whether this process, of those that train one run together, is the one that writes; known before torch is."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def hold(run_dir: Path) -> None:
    """Hold run_dir/.lock until this process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    run_dir = run_dir.absolute()
    if run_dir in _locks:
        return
    lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        # A POSIX record lock: forked loader workers do not inherit it, so a worker that outlives a killed run
        # cannot keep the next one out (flock would).
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(lock, 200).decode().strip() or "another process"
        os.close(lock)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{run_dir} is in use: {holder} trains or evaluates there now") from error
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return  # a file system without locks: better to run without than not at all
        raise
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _locks[run_dir] = lock


def _write(path: Path, text: str) -> None:
    """Replace path as a whole: a reader sees the old text or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
