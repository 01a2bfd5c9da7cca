"""Walks over folders of images: symbolic links are followed, and refused where images would come twice or lead
nowhere.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from caco.data.sets.sources import EXTENSIONS
from caco.errors import FileError, UserError
from caco.runs.directory import is_first_rank

# The images of folders walked over inside `kept`, for the next walk alone; by folder and by what counts as an image.
_kept: dict[tuple[Path, tuple[str, ...]], list[str]] = {}
_keeping = False
_QUIET_S = 2.0


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What is found inside is handed to the next walk over the same folder in this process, which looks no second
    time.
    """
    global _keeping
    _keeping = True
    try:
        yield
    finally:
        _keeping = False


def folders_in(top: Path) -> list[str]:
    """The names of a folder's folders, sorted, without those that are hidden."""
    return sorted(entry.name for entry in _entries(top) if entry.is_dir())


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, without what is hidden.

    Raises:
        FileError: the folder cannot be read, or holds a link that leads nowhere.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in found:
            if entry.is_symlink():
                os.stat(entry.path)
    except OSError as error:
        of = error.filename or folder
        link = f", a link to {os.readlink(of)}" if os.path.islink(of) else ""
        raise FileError(
            f"{of}{link}: expected a folder or an image that can be read, got: {error.strerror}. Mend or remove it."
        ) from error
    return found


class Walk:
    """Walks over folders, into each of them once: symbolic links are followed, but not to where the walk comes by
    anyway.

    Args:
        top: what holds all folders that are walked over.
        extensions: of the names of images.
    passed_by: the name of a file, in lower case, that was no image; "" where there was none.
    """

    def __init__(self, top: Path, extensions: tuple[str, ...] = EXTENSIONS):
        self._top, self._extensions, self.passed_by = top, extensions, ""
        self._above = {_identity(folder): folder for folder in (top.resolve(), *top.resolve().parents)}
        self._seen: dict[tuple[int, int], Path] = {}
        self._links: list[tuple[str, str]] = []  # to images below top, and what they lead to
        self._real = functools.lru_cache(maxsize=4096)(os.path.realpath)  # links to many images lead to few folders
        self._images, self._next_line = 0, time.monotonic() + _QUIET_S

    def images_below(self, folder: Path) -> list[str]:
        """All images, as paths relative to `folder`, sorted.

        Raises:
            FileError: a folder that cannot be read, a link that leads nowhere, an image that is no file.
            UserError: a link to a folder that holds it, or to one whose images are there already.
        """
        looked_for = (folder, self._extensions)
        if not _keeping and looked_for in _kept:
            return _kept.pop(looked_for)
        found: list[str] = []
        ahead = [(folder, "")]
        while ahead:
            current, prefix = ahead.pop()
            self._enter(current)
            self._say_how_far(len(found))
            for entry in _entries(current):
                if entry.is_dir():
                    ahead.append((current / entry.name, f"{prefix}{entry.name}/"))
                elif entry.name.lower().endswith(self._extensions):
                    if not entry.is_file():
                        raise FileError(f"{entry.path}: expected an image, got something that is no file. Remove it.")
                    if entry.is_symlink():
                        self._note(entry.path)
                    found.append(prefix + entry.name)
                else:
                    self.passed_by = entry.name.lower()
        self._images += len(found)
        found.sort()
        if _keeping:
            _kept[looked_for] = found
        return found

    def refuse_repeats(self) -> None:
        """At the end of the walks, when all folders that they enter are known.

        Raises:
            UserError: a link to an image that they came by, too, and that would be there twice.
        """
        for link, image in self._links:
            if _identity(Path(image).parent) in self._seen:
                raise UserError(
                    f"{link}: a link to {image}, which is among these images itself: it would come twice, perhaps as"
                    " one of another class. Remove the link."
                )

    def _note(self, link: str) -> None:
        """Of links to images elsewhere nothing: where files are kept by their content, as git-annex does, two images
        that are equal are links to one file.
        """
        folder, name = os.path.split(os.path.join(os.path.dirname(link), os.readlink(link)))
        image = os.path.join(self._real(folder), name)
        if os.path.islink(image):
            image = os.path.realpath(image)
        top = self._real(str(self._top))
        below = image.removeprefix(top.rstrip("/") + "/")
        is_passed = below != image and not any(part.startswith(".") for part in below.split("/"))
        if is_passed and image.lower().endswith(self._extensions):
            self._links.append((link, image))

    def _say_how_far(self, found: int) -> None:
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + 5
            if is_first_rank():
                print(
                    f"caco: looking through {self._top}: {self._images + found:,} images so far",
                    file=sys.stderr,
                    flush=True,
                )

    def _enter(self, folder: Path) -> None:
        identity = _identity(folder)
        if folder != self._top and identity in self._above:
            raise UserError(
                f"{folder}: a link to {self._above[identity]}, which holds it: its images would come again, as those of"
                " another class. Remove the link."
            )
        if identity in self._seen:
            raise UserError(
                f"{folder} and {self._seen[identity]} are one folder, by a link: its images would come twice. Remove"
                " one of them."
            )
        self._seen[identity] = folder


def _identity(folder: Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino
