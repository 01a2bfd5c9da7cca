"""Errors that the user can fix, distinguished from bugs by the class UserError. Imports only fast modules."""

import contextlib
import errno
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO, cast

from caco.installed import REQUIRED, not_installed
from caco.redaction import redacted


class UserError(ValueError):
    """Something that the user asked for or supplied does not work: a setting, a file, a disk, a machine.

    The message must be understandable alone: what happened, what was expected and given, what to do. Every command
    shows it without a traceback and ends with exit code 2. Any other exception is a bug and keeps its traceback. The
    user's own components may raise UserError too. Mistakes that only a programmer can make, such as a tensor of a wrong
    shape, raise a plain ValueError.
    """


class FileError(OSError, UserError):
    """A UserError about a file, a folder or a full disk. It is also an OSError, for code that handles those."""


class SweepFailed(RuntimeError):
    """Some jobs of a sweep have failed; others may have finished. The message says which, why, and how to go on."""


# Advice for errors of the machine, which can occur wherever a file is opened, read or written.
_OF_THE_MACHINE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or ask for a larger quota",
    errno.EFBIG: "files there, or files of this shell (ulimit -f), may not grow so large",
    errno.ENOTDIR: "choose a place below a folder",
    errno.EISDIR: "give the name of a file",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may use, or ask for the right to",
    errno.EPERM: "choose a place that you may use, or ask for the right to",
    errno.EIO: "the disk or the network storage fails: repair it first",
    errno.ESTALE: "the network storage has lost it: check that it is mounted",
    errno.ENOTCONN: "the network storage has lost it: check that it is mounted",
    errno.ENODEV: "the storage is gone: check that it is mounted",
    errno.EMFILE: "more files are open than this shell allows (ulimit -n): raise that limit",
    errno.ENFILE: "more files are open than this machine allows: end the programs that hold them",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.EAGAIN: "wait for the program that holds it, or end that program",
    errno.ENOMEM: "there is not enough memory: check what else is running",
}


def of_the_machine(error: BaseException | None) -> OSError | None:
    """The OSError listed above that `error` is or was raised from, because libraries wrap it in their own; else
    None.
    """
    while error is not None and not (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE):
        error = error.__cause__
    return error


def is_for_user(error: BaseException) -> bool:
    """Whether only the error's message is shown. CACO_TRACEBACK=1 in the environment asks for every traceback."""
    if os.environ.get("CACO_TRACEBACK") == "1":
        return False
    return (
        isinstance(error, UserError)
        or of_the_machine(error) is not None
        or _is_out_of_memory(error)
        or _lacks(error) is not None
    )


def _lacks(error: BaseException) -> str | None:
    """The module that this Python lacks although caco requires it: the environment is another or an incomplete one."""
    return error.name if isinstance(error, ModuleNotFoundError) and error.name in REQUIRED else None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether it is such an error of Python or NumPy, or of PyTorch for a processor or a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def message(error: BaseException) -> str:
    """The text that is shown of an error that is for the user."""
    if isinstance(error, UserError) and not (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE):
        return str(error)
    if _is_out_of_memory(error):
        got = " ".join(str(error).split())[:200] or "out of memory"
        return (
            f"there is not so much memory as this asks for ({got}); what was written before is untouched. A smaller"
            " batch, bank or model needs less, and python -m caco.plan says how much"
        )
    if lacking := _lacks(error):
        return not_installed([lacking])
    found = of_the_machine(error)
    if found is None or found.errno is None:  # such as SweepFailed
        return str(error)
    where = f"{os.fsdecode(found.filename)}: " if isinstance(found.filename, str | bytes) else ""
    return (
        f"{where}{found.strerror}; what was written before is untouched. {_OF_THE_MACHINE[found.errno].capitalize()},"
        " then give the same command again"
    )


def show(error: Exception) -> None:
    """Print the message once: a job of a sweep prints it before the sweep ends with the same error."""
    if not getattr(error, "is_told", False):
        print(f"caco: {redacted(message(error))}", file=sys.stderr)
        setattr(error, "is_told", True)


def require_contract(key: str, part: object, contract: type) -> None:
    """Refuse a part that lacks a member of its contract (a Protocol), before it is used: mypy does not see the user's
    own components.

    Raises:
        UserError: names the missing members, and the class to derive from.
    """
    declared = {*contract.__annotations__, *(name for name in vars(contract) if not name.startswith("_"))}
    missing = sorted(name for name in declared if not hasattr(part, name))
    if missing:
        raise UserError(
            f"{key}: {type(part).__name__} has no {', '.join(missing)}; derive it from"
            f" {contract.__module__}.{contract.__name__}, which describes them and has defaults for the"
            " optional ones"
        )


def _without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a bug's traceback as Python does, but redacted: the error may contain an address with a password."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


class _Lasting:
    """Standard error whose reader may go away (`2>&1 | head`, or a lost connection without a terminal). Later text is
    then discarded, and the work goes on.
    """

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._or_nowhere():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_nowhere():
            self._stream.flush()

    @contextlib.contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            _to_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _to_nowhere(stream: io.TextIOWrapper) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _end_if_nobody_reads(stream: TextIO | None, *, failed: bool = False) -> None:
    """End the process, quietly and as a signal would, if its standard output has no reader any more.

    Args:
        failed: whether something found a pipe without a reader. The pipe may be another one than this.
    """
    if stream is None:  # closed from the start (>&-)
        return
    try:
        stream.flush()
        gone = failed and _has_no_reader(stream)
    except BrokenPipeError:
        gone = True
    if gone:
        if isinstance(stream, io.TextIOWrapper):
            _to_nowhere(stream)  # else the interpreter complains at its end about unwritten text
        sys.exit(128 + signal.SIGPIPE)


def _has_no_reader(stream: TextIO) -> bool:
    asked = select.poll()
    try:
        asked.register(stream.fileno(), 0)
    except (OSError, ValueError):  # not a file of the operating system
        return False
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in asked.poll(0))


@contextlib.contextmanager
def shown(*, interrupted: str = "") -> Iterator[None]:
    """A context for a command. A UserError, or an error of the machine such as a full disk or a read-only folder, is
    shown as a message and ends the process with exit code 2; Ctrl-C ends it with 130. The command goes on if the reader
    of its standard error goes away. If the reader of its results goes away, it ends with 141, as SIGPIPE would end it.

    Args:
        interrupted: says what becomes of the work that Ctrl-C ends.
    """
    sys.excepthook = _without_secrets
    for stream in (sys.stdout, sys.stderr):
        # In a locale without umlauts, show these as \\xfc, which is better than failing.
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # flushing earlier output may fail, for example on a full disk
                stream.reconfigure(errors="backslashreplace")
    said_to = sys.stderr
    if isinstance(said_to, io.TextIOWrapper):
        sys.stderr = cast(TextIO, _Lasting(said_to))
    try:
        yield
        _end_if_nobody_reads(sys.stdout)
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            _end_if_nobody_reads(sys.stdout, failed=True)
        if not is_for_user(error):
            raise
        show(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("caco: interrupted" + (f"; {interrupted}" if interrupted else ""), file=sys.stderr)
        sys.exit(130)
    finally:
        sys.stderr = said_to
