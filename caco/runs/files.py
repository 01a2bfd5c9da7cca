"""Small files that survive a kill at any instant, and locks that are released when their process dies."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caco.errors import FileError, UserError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the disk is full or not writable; the old file is still there.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise FileError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Like `write_text`, for a dict as JSON.

    Raises:
        ValueError: `content` holds an infinite or NaN float, which JSON cannot express.
        OSError: as in `write_text`.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


def read_json(path: Path) -> dict[str, Any]:
    """The content of `path`, or {} if there is no such file.

    Raises:
        UserError: the file is damaged, or may not be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(path)) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, or take it from a copy of the run") from error


def last_line(file: Path) -> str:
    """The last line of a text, "" where it has none: a full disk leaves failure.txt empty."""
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def remove_left_behind(folder: Path, *, of_others: tuple[str, ...] = (), others_s: float = 60.0) -> None:
    """Remove what a killed process was writing: `.NAME.PID` beside NAME, and `NAME.partial`, files and folders.

    Args:
        folder: a folder into which no other process writes now, except for `of_others`.
        of_others: names that other processes write there, or ("*",) for all names. Files of these names are removed
            only if they have not changed for `others_s` seconds.
        others_s: seconds.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        found = re.fullmatch(r"\.(.+)\.\d+|(.+)\.partial", path.name)
        if found is None:
            continue
        with contextlib.suppress(OSError):  # its writer has just finished it, or it belongs to another user
            mine = "*" not in of_others and found[1] not in of_others
            if mine or path.stat().st_mtime < time.time() - others_s:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes were writing for this file, `.NAME.PID` beside it. Only for the holder of a lock
    without which nobody writes it.
    """
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, wait_s: float) -> Iterator[None]:
    """Hold the lock `path` for the body; the kernel releases it when the process dies, however it dies.

    It is a POSIX lock and not flock, because forked loader workers do not inherit it: an orphaned worker cannot keep a
    dead trainer's lock. Two locks on one path within ONE process do not exclude each other.

    Raises:
        BlockingIOError: another process still holds it after `wait_s` seconds.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    break  # a file system without locks: running unlocked is better than not running
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise FileError(error.errno, error.strerror, str(path)) from error
                if time.monotonic() >= deadline:
                    raise BlockingIOError(errno.EAGAIN, "locked by another process", str(path)) from error
                time.sleep(0.05)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """For the body, the only process that writes results into this folder: two would write into one file.

    Raises:
        BlockingIOError: another one does.
    """
    path = folder / ".lock"
    with locked(path, wait_s=0):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def process_start(pid: int) -> str:
    """When process `pid` of this machine began, in the kernel's ticks: distinguishes it from a later process with the
    same number.

    "" if the process is gone or a zombie. Also "" if the machine has no /proc.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
