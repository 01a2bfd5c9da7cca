"""A run's directory: held by one process at a time, with a record of what runs there and on which machine."""

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

_locks: dict[Path, int] = {}  # open until the process ends, because closing a descriptor releases its lock
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of a file system without locks
_BEAT_S = 4.0
_PATIENCE_S = 20.0  # several beats, and longer than a network file system keeps a file in its cache
_MOMENT_S = 1.0


def open_run(run_dir: Path | str, cfg: DictConfig | Mapping[str, Any], code: Mapping[str, str] = {}) -> None:
    """Reserve run_dir for this run as long as this process lives. Writes environment.json into it, and config.yaml if
    the run is new.

    Args:
        code: what the run uses besides caco, for environment.json.
    Raises:
        UserError: another process trains there now, or the directory holds a run of another identity or of an earlier
            version.
    """
    run_dir = Path(run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    hold(run_dir)
    record = run_dir / "config.yaml"
    if record.exists():
        if renamed.is_old(run_dir):
            raise UserError(
                f"{run_dir} holds a run of {_version(run_dir)}; this version can show, evaluate and export it but not"
                " continue it: finish it with that version, or choose another hydra.run.dir to train anew"
            )
        changed = differences(identity(read_recorded(record)), identity(cfg))
        if changed:
            shown = "\n".join(f"  {line}" for line in changed[:20])
            more = f"\n  and {len(changed) - 20} more" if len(changed) > 20 else ""
            raise UserError(f"{run_dir} holds another run; choose another hydra.run.dir. What differs:\n{shown}{more}")
    else:
        _name_what_is_left_behind(run_dir, cfg)
        write_config(run_dir, cfg)
    for name in ("failure.txt", "stopped.txt"):
        (run_dir / name).unlink(missing_ok=True)
    if not (run_dir / "summary.json").exists():  # a finished run keeps the record of where it ran
        write_environment(run_dir, code)


def write_config(run_dir: Path, cfg: DictConfig | Mapping[str, Any]) -> None:
    """Write config.yaml. If a run goes on, this is called only once its images are known to be the same, so that a
    refused command leaves the record as it is.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain(cfg))))


def _version(run_dir: Path) -> str:
    return (
        f"an earlier version of caco (commit {read_json(run_dir / 'environment.json').get('git_sha', 'unknown')[:10]})"
    )


def _name_what_is_left_behind(run_dir: Path, cfg: DictConfig | Mapping[str, Any]) -> None:
    """Report if the same run was begun in a directory beside this one: by an earlier version with another hash in its
    name, or with other words and the same hash.
    """
    words, _, _ = run_dir.name.rpartition("-")
    for other in sorted(run_dir.parent.glob(f"{glob.escape(words)}-*")) if words else ():
        if other != run_dir and renamed.is_old(other) and run_hash(renamed.read_config(other)) == run_hash(cfg):
            print(
                f"caco: {other} is the same run made by {_version(other)}, which cannot be continued: it starts anew in"
                f" {run_dir}",
                file=sys.stderr,
            )
    digits = run_hash(cfg)
    for other in sorted(run_dir.parent.glob(f"*-{digits}")) if run_dir.name.endswith(f"-{digits}") else ():
        if other != run_dir and (other / "config.yaml").is_file() and not renamed.is_old(other):
            print(
                f"caco: {other} is the same run, begun with other words or by an earlier version; here it starts anew"
                f" in {run_dir.name}. To go on with the other one instead, stop this run and add"
                f" {shlex.quote(f'hydra.run.dir={other}')}",
                file=sys.stderr,
            )


def write_environment(run_dir: Path, code: Mapping[str, str] = {}) -> dict[str, str]:
    """Write environment.json with the code, the machine and the command of this run; returns all but the command."""
    run_dir.mkdir(parents=True, exist_ok=True)
    found = {**environment(), **code}
    write_json(run_dir / "environment.json", {**found, "command": command()})
    return found


def command() -> str:
    """The command line as a user would type it, however the program was started."""
    program, *arguments = map(redacted, sys.argv)
    if Path(program).parts[-2:-1] == ("caco",) and Path(program).suffix == ".py":
        return shlex.join(["python", "-m", f"caco.{Path(program).stem}", *arguments])
    return shlex.join([Path(program).name, *arguments])


def record_failure(run_dir: Path, text: str) -> None:
    """Write failure.txt unless another rank has: the first failure is the cause, later ones follow from it."""
    with contextlib.suppress(OSError), open(run_dir / "failure.txt", "x", encoding="utf-8") as file:
        file.write(redacted(text.rstrip()) + "\n")


def record_stop(run_dir: Path, text: str) -> None:
    """Write stopped.txt, which says that the run obeyed a signal to stop and has saved itself."""
    with contextlib.suppress(OSError):
        write_text(run_dir / "stopped.txt", f"{text}; the same command goes on from there\n")


def discard(run_dir: Path) -> bool:
    """Remove the directory of a run that was refused before it wrote any results; returns whether it was removed.

    Not used for a launcher's job, because its sweep reads there why the job failed.
    """
    ours = {"config.yaml", "environment.json", ".lock"}
    run_dir = run_dir.absolute()
    if not is_first_rank() or not {path.name for path in run_dir.iterdir()} <= ours:
        return False
    for name in ours:
        (run_dir / name).unlink(missing_ok=True)
    if (lock := _locks.pop(run_dir, None)) is not None:
        os.close(lock)
    with contextlib.suppress(OSError):  # the folder holds something new by now, or a parent holds other runs
        run_dir.rmdir()
        for folder in run_dir.parents:
            if Path.cwd() not in folder.parents:
                break
            folder.rmdir()
    return True


def is_first_rank() -> bool:
    """Whether this process is the one that writes, of those that train one run together. Needs no torch.

    Processes work together if their environment says so, as torchrun and the launchers arrange (caco/distributed.py).
    Processes that srun alone has started are separate runs, each of which needs its own directory.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) <= 1 or int(os.environ.get("RANK", "0")) == 0


def hold(run_dir: Path) -> None:
    """Hold run_dir/.lock until this process ends, however it ends.

    Three things keep a second writer out. First, the kernel's lock, if the file system has locks and all machines share
    them. Second, a sign of life in the file, which its holder renews every few seconds, for file systems without locks
    or with locks for each machine by itself. Third, without locks, reading the file again a moment after writing it.

    Raises:
        UserError: another process holds the directory, or it cannot be written.
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
        # A POSIX record lock: forked loader workers do not inherit it, so a worker that outlives a killed run cannot
        # keep the next one out (with flock it would). From here on no other descriptor of this file may be closed,
        # because that would release the lock.
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
        time.sleep(_MOMENT_S)  # by now every process that writes at the same time has written; the last one wins
        if (found := _read_holder(lock)) and not found.is_same(own):
            os.close(lock)
            raise _in_use(run_dir, found)
    _remove_left_behind(run_dir)
    if not _locks:
        threading.Thread(target=_show_life, name="caco-lock", daemon=True).start()
        atexit.register(_leave)
    _locks[run_dir] = lock


def _remove_left_behind(run_dir: Path) -> None:
    """Remove files of writers that were killed. The holder is alone here, but for files of a sweep and a sync."""
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "checkpoints" / "milestones", run_dir / "evaluations"):
        remove_left_behind(folder, of_others=("job.json", "mlflow.json", "wandb.json"))
    remove_left_behind(run_dir / "figures", of_others=("*",))


@dataclass
class Holder:
    """The holder of a directory, as its lock file names it. `begun` distinguishes it from a later process with the same
    number; `beats` is its sign of life.
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
        return None  # no holder: a process that leaves empties the file
    return Holder(int(found[1]), found[2], "" if found[3] in (None, "-") else found[3], int(found[4] or 0))


def _read_holder(lock: int) -> Holder | None:
    return _parsed(os.pread(lock, 1000, 0))


def _holder(path: Path) -> Holder | None:
    """The holder, read through a new descriptor, which makes a network file system ask its server."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return None


def _shows_life(path: Path, before: Holder) -> bool:
    """Whether a holder on another machine renews its sign of life. Clocks and process tables of this machine cannot
    tell.
    """
    print(
        f"caco: {path.parent} was last held by process {before.pid} on {before.host}; checking for {_PATIENCE_S:g} s"
        " whether that process still runs",
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
            with contextlib.suppress(OSError):  # a full disk or an unreachable server: try again at the next beat
                Holder(os.getpid(), socket.gethostname(), process_start(os.getpid()), beats).write(lock)


def _leave() -> None:
    """Empty the lock files at the end of the process, so that the next holder need not wait for signs of life."""
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
        f"; srun has started {_tasks_of_srun()} processes, each a run of its own: use srun --ntasks=1, or instead of"
        " srun launcher=slurm, whose processes work together"
        if _tasks_of_srun() > 1
        else ""
    )
    return UserError(f"{run_dir} is in use: {who} trains or evaluates there now{many}")
