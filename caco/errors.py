"""What went wrong on the user's side, told apart from a bug by one class. Imports nothing that takes time."""

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

from caco.redaction import redacted


class UserError(ValueError):
    """Something that the person who uses caco asked for or supplied does not work: a setting, a file, a disk, a
    machine.

    The message stands alone: what happened, what was expected and got, what to do. Every command shows it without a
    traceback and ends with exit code 2; whatever else is raised is a bug, and keeps its traceback. A component of your
    own raises it too. What only a programmer can get wrong, such as the shape of a tensor, is a plain ValueError.
    """


class FileError(OSError, UserError):
    """A UserError about a file, a folder or a full disk; an OSError too, for those who handle these."""


class SweepFailed(RuntimeError):
    """Some jobs of a sweep have failed: no refusal, others may be done. Says which, why, and how to go on."""


# What a machine says when it cannot, wherever a file is opened, read or written.
_OF_THE_MACHINE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or ask for a larger quota",
    errno.EFBIG: "files there, or those of this shell (ulimit -f), may not grow so large",
    errno.ENOTDIR: "choose a place below a folder",
    errno.EISDIR: "give the name of a file",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may use, or ask for the right to",
    errno.EPERM: "choose a place that you may use, or ask for the right to",
    errno.EIO: "the disk or the network storage fails: see to it first",
    errno.ESTALE: "the network storage has lost it: see that it is mounted",
    errno.ENOTCONN: "the network storage has lost it: see that it is mounted",
    errno.ENODEV: "the storage is gone: see that it is mounted",
    errno.EMFILE: "more files are open than this shell allows (ulimit -n): raise that",
    errno.ENFILE: "more files are open than this machine allows: end what holds them",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.EAGAIN: "wait for what holds it, or end that",
    errno.ENOMEM: "there is not so much memory: see what else runs",
}


def of_the_machine(error: BaseException | None) -> OSError | None:
    """The error of this kind that an error is, or was raised from: libraries wrap them in their own."""
    while error is not None and not (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE):
        error = error.__cause__
    return error


def is_for_user(error: BaseException) -> bool:
    """Whether its message alone is shown. CACO_TRACEBACK=1 in the environment asks for the traceback of each error."""
    if os.environ.get("CACO_TRACEBACK") == "1":
        return False
    return isinstance(error, UserError) or of_the_machine(error) is not None or _is_out_of_memory(error)


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's and NumPy's own, PyTorch's for a processor, and for a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def message(error: BaseException) -> str:
    """What is shown of an error that is for the user."""
    if isinstance(error, UserError) and not (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE):
        return str(error)
    if _is_out_of_memory(error):
        got = " ".join(str(error).split())[:200] or "out of memory"
        return (
            f"there is not so much memory as this asks for ({got}); what was written before is untouched. A smaller"
            " batch, bank or model needs less, and python -m caco.plan says how much"
        )
    found = of_the_machine(error)
    if found is None or found.errno is None:  # of a sweep some of whose jobs have failed
        return str(error)
    where = f"{os.fsdecode(found.filename)}: " if isinstance(found.filename, str | bytes) else ""
    return (
        f"{where}{found.strerror}; what was written before is untouched. {_OF_THE_MACHINE[found.errno].capitalize()},"
        " then give the same command again"
    )


def show(error: Exception) -> None:
    """Show the message, once: a job of a sweep tells it before the sweep ends with the same error."""
    if not getattr(error, "is_told", False):
        print(f"caco: {redacted(message(error))}", file=sys.stderr)
        setattr(error, "is_told", True)


def require_contract(key: str, part: object, contract: type) -> None:
    """Refuse a part that lacks a member of its contract (a Protocol), before it is used: mypy sees none that comes from
    elsewhere.

    Raises:
        UserError: what is missing, and what to derive from.
    """
    declared = {*contract.__annotations__, *(name for name in vars(contract) if not name.startswith("_"))}
    missing = sorted(name for name in declared if not hasattr(part, name))
    if missing:
        raise UserError(
            f"{key}: {type(part).__name__} has no {', '.join(missing)}; derive it from"
            f" {contract.__module__}.{contract.__name__}, which says what that is and has defaults for all that not"
            " every one needs"
        )


def _without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python shows of a bug: an address with a password in it may be in the error."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


class _Lasting:
    """Standard error whose reader may go (`2>&1 | head`, a connection without a terminal that is lost): what is said
    then goes nowhere, and the work that says it goes on.
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
    """End the process, quietly and as a signal would, where what it writes to standard output has no reader any
    more.

    Args:
        failed: whether something has found a pipe without a reader, which need not be this one.
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
            _to_nowhere(stream)  # or the interpreter complains about what is left when it ends
        sys.exit(128 + signal.SIGPIPE)


def _has_no_reader(stream: TextIO) -> bool:
    asked = select.poll()
    try:
        asked.register(stream.fileno(), 0)
    except (OSError, ValueError):  # no file of the system's
        return False
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in asked.poll(0))


@contextlib.contextmanager
def shown(*, interrupted: str = "") -> Iterator[None]:
    """Around a command: a UserError is shown in its own words and ends the process with exit code 2, and so is what the
    machine cannot do (a full disk, a folder that is read-only); Ctrl-C ends it with 130. Who reads its standard error
    may go; where nobody reads its results any more it ends with 141, as by SIGPIPE.

    Args:
        interrupted: what becomes of the work that Ctrl-C ends.
    """
    sys.excepthook = _without_secrets
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # in a locale without umlauts they are shown as \\xfc, which is better than not at all
            with contextlib.suppress(OSError):  # what was written before may not go out: a full disk, say
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
