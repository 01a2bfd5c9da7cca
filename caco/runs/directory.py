"""A run's directory: held by one process at a time, with a record of what runs there and on what."""

import atexit
import contextlib
import errno
import fcntl
import glob
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from caco.errors import FileError, UserError
from caco.redaction import redacted
from caco.runs import renamed
from caco.runs.environment import environment
from caco.runs.files import process_start, read_json, remove_left_behind, write_json, write_text
from caco.runs.identity import differences, identity, plain, read_recorded, run_hash

_locks: dict[Path, int] = {}  # held until the process ends: closing one would give the lock up
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system
_BEAT_S = 4.0
_PATIENCE_S = 20.0  # some beats, and what a network file system keeps in its cache
_MOMENT_S = 1.0


def open_run(run_dir: Path | str, cfg: DictConfig | Mapping[str, Any], code: Mapping[str, str] = {}) -> None:
    """Make run_dir this run's, for as long as this process lives, and write config.yaml (of a new run) and
    environment.json into it.

    Args:
        code: what it runs besides caco, for environment.json.
    Raises:
        ValueError: another process trains there now, or the directory holds a run of another identity, or of an earlier
            version.
    """
    run_dir = Path(run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    hold(run_dir)
    record = run_dir / "config.yaml"
    if record.exists():
        if renamed.is_old(run_dir):
            raise UserError(
                f"{run_dir} holds a run of {_version(run_dir)}, which this version shows, evaluates and exports but"
                " cannot go on with: finish it with that version, or choose another hydra.run.dir to train anew"
            )
        changed = differences(identity(read_recorded(record)), identity(cfg))
        if changed:
            shown = "\n".join(f"  {line}" for line in changed[:20])
            more = f"\n  and {len(changed) - 20} more" if len(changed) > 20 else ""
            raise UserError(f"{run_dir} holds another run; choose another hydra.run.dir. What differs:\n{shown}{more}")
    else:
        _name_what_is_left_behind(run_dir, cfg)
        write_config(run_dir, cfg)
    (run_dir / "failure.txt").unlink(missing_ok=True)
    if not (run_dir / "summary.json").exists():  # else it is done, and was where its record says
        write_environment(run_dir, code)


def write_config(run_dir: Path, cfg: DictConfig | Mapping[str, Any]) -> None:
    """Write config.yaml. Of a run that goes on only once its images are known to be the same: what is refused leaves
    the record alone.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain(cfg))))


def _version(run_dir: Path) -> str:
    return (
        f"an earlier version of caco (commit {read_json(run_dir / 'environment.json').get('git_sha', 'unknown')[:10]})"
    )


def _name_what_is_left_behind(run_dir: Path, cfg: DictConfig | Mapping[str, Any]) -> None:
    """Say that an earlier version has begun this very run, beside it and with another hash in its name."""
    words, _, _ = run_dir.name.rpartition("-")
    for other in sorted(run_dir.parent.glob(f"{glob.escape(words)}-*")) if words else ():
        if other != run_dir and renamed.is_old(other) and run_hash(renamed.read_config(other)) == run_hash(cfg):
            print(
                f"caco: {other} is this run by {_version(other)} and cannot be gone on with: it starts anew in"
                f" {run_dir}",
                file=sys.stderr,
            )


def write_environment(run_dir: Path, code: Mapping[str, str] = {}) -> dict[str, str]:
    """Write environment.json, what the run runs, what it runs on and its command; returns the first two."""
    run_dir.mkdir(parents=True, exist_ok=True)
    found = {**environment(), **code}
    write_json(run_dir / "environment.json", {**found, "command": command()})
    return found


def command() -> str:
    """The command line as one types it, whichever way the program was started."""
    program, *arguments = map(redacted, sys.argv)
    if Path(program).parts[-2:-1] == ("caco",) and Path(program).suffix == ".py":
        return shlex.join(["python", "-m", f"caco.{Path(program).stem}", *arguments])
    return shlex.join([Path(program).name, *arguments])


def record_failure(run_dir: Path, text: str) -> None:
    """Write failure.txt, unless another rank has: the first to fail is the cause, others lose their peer."""
    with contextlib.suppress(OSError), open(run_dir / "failure.txt", "x", encoding="utf-8") as file:
        file.write(redacted(text.rstrip()) + "\n")


def discard(run_dir: Path) -> bool:
    """Remove the directory of a run that was refused before it wrote anything of its own; whether it was removed.

    Not that of a launcher's job, whose sweep reads there why it failed.
    """
    ours = {"config.yaml", "environment.json", ".lock"}
    run_dir = run_dir.absolute()
    if not is_first_rank() or not {path.name for path in run_dir.iterdir()} <= ours:
        return False
    for name in ours:
        (run_dir / name).unlink(missing_ok=True)
    if (lock := _locks.pop(run_dir, None)) is not None:
        os.close(lock)
    with contextlib.suppress(OSError):  # something has come there meanwhile, or other runs lie beside it
        run_dir.rmdir()
        for folder in run_dir.parents:
            if Path.cwd() not in folder.parents:
                break
            folder.rmdir()
    return True


def is_first_rank() -> bool:
    """Whether this process, of those that train one run together, is the one that writes; known before torch is.

    Processes work together where their environment says so, as torchrun's and a launcher's does (caco/distributed.py).
    What srun alone has started several times are so many runs, and each has to have a directory of its own.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) <= 1 or int(os.environ.get("RANK", "0")) == 0


def hold(run_dir: Path) -> None:
    """Hold run_dir/.lock until this process ends, however it ends.

    Three things keep a second writer out. The kernel's lock, where the file system has locks and all machines share
    them. A sign of life in the file, which its holder renews every few seconds, for file systems that have none, or
    lock on each machine by itself. And, without locks, another look at the file a moment after it was written.

    Raises:
        UserError: another process holds it; or the directory cannot be written.
    """
    run_dir = run_dir.absolute()
    if run_dir in _locks:
        return
    path = run_dir / ".lock"
    before = _holder(path)
    if before and before.host != socket.gethostname() and _shows_life(path, before):
        raise _in_use(run_dir, before)
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise FileError(
            error.errno, f"{error.strerror}: a run writes into its directory; choose another hydra.run.dir", str(path)
        ) from error
    has_locks = True
    try:
        # A POSIX record lock: forked loader workers do not inherit it, so a worker that outlives a killed run
        # cannot keep the next one out (flock would). No other descriptor of the file may be closed from here on: that
        # gives it up.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _read_holder(lock)
        has_locks = False
        if error.errno in (errno.EACCES, errno.EAGAIN) or (error.errno in _NO_LOCKS and holder and holder.lives_here()):
            os.close(lock)
            raise _in_use(run_dir, holder) from error
        if error.errno not in _NO_LOCKS:
            os.close(lock)
            raise FileError(error.errno, error.strerror, str(path)) from error
    own = Holder(os.getpid(), socket.gethostname(), process_start(os.getpid()))
    own.write(lock)
    if not has_locks or _tasks_of_srun() > 1:
        time.sleep(_MOMENT_S)  # who wrote at the same time has written by now, and the last one stays
        if (found := _read_holder(lock)) and not found.is_same(own):
            os.close(lock)
            raise _in_use(run_dir, found)
    _remove_left_behind(run_dir)
    if not _locks:
        threading.Thread(target=_show_life, name="caco-lock", daemon=True).start()
        atexit.register(_leave)
    _locks[run_dir] = lock


def _remove_left_behind(run_dir: Path) -> None:
    """Of writers that were killed: whoever holds the directory is alone with all but what a sweep and a sync write."""
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "checkpoints" / "milestones", run_dir / "evaluations"):
        remove_left_behind(folder, of_others=("job.json", "mlflow.json", "wandb.json"))
    remove_left_behind(run_dir / "figures", of_others=("*",))


@dataclass
class Holder:
    """Who holds a directory, as its lock file says: begun tells it from a later process of the same number, beats is
    its sign of life.
    """

    pid: int
    host: str
    begun: str
    beats: int = 0

    def write(self, lock: int) -> None:
        text = f"process {self.pid} on {self.host}\n{self.begun or '-'} {self.beats:012d}\n".encode()
        os.pwrite(lock, text, 0)
        os.ftruncate(lock, len(text))

    def lives_here(self) -> bool:
        return self.host == socket.gethostname() and self.begun != "" and process_start(self.pid) == self.begun

    def is_same(self, other: "Holder") -> bool:
        return (self.pid, self.host, self.begun) == (other.pid, other.host, other.begun)


def _parsed(content: bytes) -> Holder | None:
    found = re.fullmatch(r"process (\d+) on (\S+)\n(?:(\S+) (\d+)\n)?", content.decode(errors="replace"))
    if found is None:
        return None  # nobody: who leaves empties it
    return Holder(int(found[1]), found[2], "" if found[3] in (None, "-") else found[3], int(found[4] or 0))


def _read_holder(lock: int) -> Holder | None:
    return _parsed(os.pread(lock, 1000, 0))


def _holder(path: Path) -> Holder | None:
    """Read by a descriptor of its own, which network file systems take as a reason to ask the server."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return None


def _shows_life(path: Path, before: Holder) -> bool:
    """Whether a holder on another machine, of which no clock and no process table tells, renews its sign."""
    print(
        f"caco: {path.parent} was last held by process {before.pid} on {before.host}; looking for {_PATIENCE_S:g} s"
        " whether it lives",
        file=sys.stderr,
    )
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        time.sleep(_PATIENCE_S / 20)
        if (found := _holder(path)) != before:
            return found is not None
    return False


def _show_life() -> None:
    beats = 0
    while True:
        time.sleep(_BEAT_S)
        beats += 1
        for lock in list(_locks.values()):
            with contextlib.suppress(OSError):  # a full disk, a server that is away: it goes on when that is over
                Holder(os.getpid(), socket.gethostname(), process_start(os.getpid()), beats).write(lock)


def _leave() -> None:
    """At a process's end: the next holder, on whatever machine, need not wait for signs of life."""
    for lock in _locks.values():
        with contextlib.suppress(OSError):
            os.ftruncate(lock, 0)
    _locks.clear()


def _tasks_of_srun() -> int:
    """How many processes srun has started together with this one."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)


def _in_use(run_dir: Path, holder: Holder | None) -> UserError:
    who = f"process {holder.pid} on {holder.host}" if holder else "another process"
    many = (
        f"; srun has started {_tasks_of_srun()} of them, each a run of its own: say srun --ntasks=1, or leave srun out"
        " and take launcher=slurm, whose processes work together"
        if _tasks_of_srun() > 1
        else ""
    )
    return UserError(f"{run_dir} is in use: {who} trains or evaluates there now{many}")
