"""Errors that the user can fix, distinguished from bugs by the class UserError. Imports only fast modules."""

import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType

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
    return isinstance(error, UserError) or of_the_machine(error) is not None


def message(error: BaseException) -> str:
    """The text that is shown of an error that is for the user."""
    if isinstance(error, UserError) and not (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE):
        return str(error)
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


@contextlib.contextmanager
def shown(*, interrupted: str = "") -> Iterator[None]:
    """A context for a command. A UserError, or an error of the machine such as a full disk or a read-only folder, is
    shown as a message and ends the process with exit code 2; Ctrl-C ends it with 130.

    Args:
        interrupted: says what becomes of the work that Ctrl-C ends.
    """
    sys.excepthook = _without_secrets
    for stream in (sys.stdout, sys.stderr):
        # In a locale without umlauts, show these as \\xfc, which is better than failing.
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # flushing earlier output may fail, for example on a full disk
                stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except Exception as error:
        if not is_for_user(error):
            raise
        show(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("caco: interrupted" + (f"; {interrupted}" if interrupted else ""), file=sys.stderr)
        sys.exit(130)
