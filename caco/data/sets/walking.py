"""Finds the images in folders. Symbolic links are followed; a link that would make images occur twice, or that leads
nowhere, is an error.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from caco.data.sets.reading import EXTENSIONS
from caco.errors import FileError, UserError
from caco.runs.directory import is_first_rank

# The images that walks inside `kept` found, by folder and extensions; each entry serves the next walk and is then
# removed.
_kept: dict[tuple[Path, tuple[str, ...]], list[str]] = {}
_keeping = False
_QUIET_S = 2.0


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep what walks inside this context find. The next walk over the same folder in this process then takes the
    result without looking again.
    """
    global _keeping
    _keeping = True
    try:
        yield
    finally:
        _keeping = False


def folders_in(top: Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones."""
    return sorted(entry.name for entry in _entries(top) if entry.is_dir())


def _entries(folder: Path) -> list[os.DirEntry]:
    """The entries of a folder, without hidden ones.

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
            f"{of}{link}: expected a folder or an image that can be read, got: {error.strerror}. Repair or remove it."
        ) from error
    return found


class Walk:
    """Walks over several folders, and visits each folder once. Symbolic links are followed, but a link must not lead to
    a folder that the walk visits anyway.

    Args:
        top: the folder above all folders to walk over.
        extensions: the file names of images end in one of these.
    Attributes:
        passed_by: lower-case name of a file that is not an image, the last one seen; "" if there was none.
    """

    def __init__(self, top: Path, extensions: tuple[str, ...] = EXTENSIONS):
        self._top, self._extensions, self.passed_by = top, extensions, ""
        self._above = {_identity(folder): folder for folder in (top.resolve(), *top.resolve().parents)}
        self._seen: dict[tuple[int, int], Path] = {}
        self._links: list[tuple[str, str]] = []  # links to images below top, with their targets
        self._real = functools.lru_cache(maxsize=4096)(os.path.realpath)  # links to many images lead to few folders
        self._images, self._next_line = 0, time.monotonic() + _QUIET_S

    def images_below(self, folder: Path) -> list[str]:
        """The paths of all images below `folder`, relative to it, sorted.

        Raises:
            FileError: a folder cannot be read, a link leads nowhere, or an image is not a file.
            UserError: a link leads to a folder above it, or to one that was visited already.
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
                        raise FileError(
                            f"{entry.path}: expected an image, got something that is not a file. Remove it."
                        )
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
        """Refuse links that repeat an image. Call it after the walks, when all folders that they enter are known.

        Raises:
            UserError: a link leads to an image that the walks also found itself, so the image would be there twice.
        """
        for link, image in self._links:
            if _identity(Path(image).parent) in self._seen:
                raise UserError(
                    f"{link}: a link to {image}, which is among these images itself: it would come twice, perhaps as"
                    " one of another class. Remove the link."
                )

    def _note(self, link: str) -> None:
        """Remember a link to an image below top. Links to images elsewhere are not remembered: a store that keeps
        files by their content, such as git-annex, has links to one file for two equal images.
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
                f"{folder} is a link to {self._above[identity]}, a folder above it, so images would occur twice, the"
                " second time in another class. Remove the link."
            )
        if identity in self._seen:
            raise UserError(
                f"{folder} and {self._seen[identity]} are the same folder, because of a link, so its images would occur"
                " twice. Remove one of them."
            )
        self._seen[identity] = folder


def _identity(folder: Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino
