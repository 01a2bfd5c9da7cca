"""Paths as a user types them: ~ means the home folder, whether or not a shell has replaced it, and a path that cannot
exist is refused with an explanation.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from caco.errors import FileError, UserError
from caco.redaction import redacted

_MAX_NAME, _MAX_PATH = 255, 4000  # in bytes, within the limits of the file systems that runs are kept on


def expanded(path: str | Path) -> Path:
    """The path with its ~ replaced.

    Raises:
        UserError: there is no such home folder.
    """
    text = str(path)
    full = os.path.expanduser(text)
    if text.startswith("~") and full.startswith("~"):
        whose = (
            "this user has no home folder (HOME is not set)"
            if text in ("~", "~/") or text.startswith("~/")
            else "there is no such user here"
        )
        raise UserError(f"{text}: {whose}; write the whole path")
    return Path(full)


def is_possible(path: str | Path) -> bool:
    """Whether a file system can have a file of this name: not too long, and without NUL bytes."""
    text = os.fsencode(os.path.expanduser(str(path)))
    return b"\0" not in text and len(text) <= _MAX_PATH and all(len(part) <= _MAX_NAME for part in text.split(b"/"))


def require_writable(folder: Path, key: str) -> None:
    """Refuse a directory that cannot be made or written into, before anything is computed.

    Args:
        key: the setting that chooses the directory, for the message.
    Raises:
        UserError: names the folder that is the cause.
    """
    if not is_possible(folder):
        raise UserError(
            f"{redacted(str(folder))[:80]}...: this name is too long for a file system; choose another one with {key}"
        )
    for path in (folder.absolute(), *folder.absolute().parents):
        try:
            if not os.path.lexists(path):
                continue
        except OSError as error:
            raise FileError(error.errno, f"{error.strerror}; choose another folder with {key}", str(path)) from error
        if not path.is_dir():
            raise FileError(f"{folder} cannot be made: {path} is not a folder; choose another one with {key}")
        if not os.access(path, os.W_OK | os.X_OK):
            raise FileError(
                f"{folder} cannot be written: this user may not write into {path}; choose another folder with {key}"
            )
        return


def as_typed(path: str | Path) -> str:
    """A path as one would type it here: relative to the working directory if it lies below it, else absolute."""
    current, absolute = Path.cwd(), Path(path).absolute()
    below = absolute != current and absolute.is_relative_to(current)
    return str(absolute.relative_to(current) if below else absolute)


def make_folder(folder: Path, key: str) -> None:
    """Make a folder and its parents, if they do not exist yet.

    Args:
        key: the setting that chooses another folder.
    Raises:
        FileError: the folder cannot be made, for example in /proc or on a share that is gone.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder} cannot be made ({error.strerror}); choose another one with {key}") from error


def read_text(file: Path) -> str:
    """The content of a user's text file in any of the usual encodings: UTF-8 with or without byte order mark, UTF-16
    with one, else the encoding of Windows in western Europe (cp1252), or Latin-1.

    Raises:
        FileError: the file cannot be read.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(file)) from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    for encoding in ("utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return content.decode(encoding)
    return content.decode("latin-1")


def with_home(overrides: Sequence[str]) -> list[str]:
    """A command line with ~ replaced in the directories of runs. Hydra makes these directories itself, and would make a
    folder named "~".

    Raises:
        UserError: there is no such home folder.
    """
    taken = []
    for item in overrides:
        key, equals, value = item.partition("=")
        bare = value.strip("'\"")
        if (
            equals
            and key.lstrip("+") in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
            and bare.startswith("~")
        ):
            quoted = str(expanded(bare)).replace("\\", "\\\\").replace("'", "\\'")
            item = f"{key}='{quoted}'"
        taken.append(item)
    return taken
