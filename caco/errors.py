"""What went wrong on the user's side, told apart from a bug by one class. Imports nothing that takes time."""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType

from caco.redaction import redacted


class UserError(ValueError):
    """Something that the person who uses caco asked for or supplied does not work: a setting, a file, a disk, a machine.

    The message stands alone: what happened, what was expected and got, what to do. Every command shows it without a
    traceback and ends with exit code 2; whatever else is raised is a bug, and keeps its traceback. A component of your own
    raises it too. What only a programmer can get wrong, such as the shape of a tensor, is a plain ValueError.
    """


class FileError(OSError, UserError):
    """A UserError about a file, a folder or a full disk; an OSError too, for those who handle these."""


class SweepFailed(RuntimeError):
    """Some jobs of a sweep have failed: no refusal, others may be done. Says which, why, and how to go on."""


def is_for_user(error: BaseException) -> bool:
    """Whether its message alone is shown. CACO_TRACEBACK=1 in the environment asks for the traceback of each error."""
    return isinstance(error, UserError) and os.environ.get("CACO_TRACEBACK") != "1"


def show(error: Exception) -> None:
    """Show the message, once: a job of a sweep tells it before the sweep ends with the same error."""
    if not getattr(error, "is_told", False):
        print(f"caco: {redacted(str(error))}", file=sys.stderr)
        setattr(error, "is_told", True)


def require_contract(key: str, part: object, contract: type) -> None:
    """Refuse a part that lacks a member of its contract (a Protocol), before it is used: mypy sees none that comes from elsewhere.

    Raises:
        UserError: what is missing, and what to derive from.
    """
    declared = {*contract.__annotations__, *(name for name in vars(contract) if not name.startswith("_"))}
    missing = sorted(name for name in declared if not hasattr(part, name))
    if missing:
        raise UserError(
            f"{key}: {type(part).__name__} has no {', '.join(missing)}; derive it from {contract.__module__}.{contract.__name__}, which says "
            "what that is and has defaults for all that not every one needs"
        )


def _without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python shows of a bug: an address with a password in it may be in the error."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


@contextlib.contextmanager
def shown(*, interrupted: str = "") -> Iterator[None]:
    """Around a command: a UserError is shown in its own words and ends the process with exit code 2, Ctrl-C with 130.

    Args:
        interrupted: what becomes of the work that Ctrl-C ends.
    """
    sys.excepthook = _without_secrets
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in a locale without umlauts they are shown as \\xfc, which is better than not at all
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        if not is_for_user(error):
            raise
        show(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("caco: interrupted" + (f"; {interrupted}" if interrupted else ""), file=sys.stderr)
        sys.exit(130)
