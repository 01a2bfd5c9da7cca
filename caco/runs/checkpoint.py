"""Checkpoints: one file with everything, written so that a kill at any instant leaves the one before."""

import io
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import torch

from caco.errors import FileError, UserError
from caco.runs import pickle_size

NAME = re.compile(r"step_(\d{9})\.pt")


class Checkpoints:
    """The checkpoints of one run: the last few, and milestones that stay.

    Args:
        directory: where they are.
        keep: how many of the newest stay.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        if keep < 1:
            raise UserError(f"checkpoint.keep must be at least 1; got {keep}")
        self.directory, self.keep = Path(directory), keep

    def _files(self, kind: str = "") -> list[Path]:
        folder = self.directory / kind
        return sorted(p for p in folder.glob("step_*.pt") if NAME.fullmatch(p.name)) if folder.is_dir() else []

    def save(self, state: dict, step: int, *, milestone: bool = False) -> Path:
        """Write aside, sync, rename; then drop what is older than the last `keep`.

        Args:
            state: tensors, numbers, strings and containers of them only.
            milestone: keep this one for ever too, as a second name of the same file where it can have one.
        Raises:
            OSError: the disk is full or gone; the checkpoints that were there stay as they were.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step_{step:09d}.pt"
        aside = path.with_suffix(".partial")
        try:
            with open(aside, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            if milestone:
                _keep(path, self.directory / "milestones" / path.name)
        except (OSError, RuntimeError) as error:
            aside.unlink(missing_ok=True)
            # torch's zip writer turns a failed write into a RuntimeError, about positions.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise FileError(
                f"checkpoint {path} could not be written ({cause}); the ones before it are untouched"
            ) from error
        _sync_directory(self.directory)
        for old in self._files()[: -self.keep]:
            old.unlink()
        return path

    def load_newest(self) -> tuple[dict, Path] | None:
        """The newest state that can be read whole; a corrupt one is named on stderr and the one before is taken.

        Raises:
            OSError: there are checkpoints and none can be read.
        """
        files = sorted(self._files() + self._files("milestones"), key=lambda p: p.name, reverse=True)
        for path in files:
            try:
                return load(path), path
            except UserError as error:
                print(f"caco: {error}; falling back to the one before", file=sys.stderr)
        if files:
            raise FileError(
                f"none of the {len(files)} checkpoints in {self.directory} can be read; remove them to start anew"
            )
        return None


def load(path: Path) -> dict:
    """A checkpoint's state, on the CPU.

    Raises:
        UserError: the file is damaged, or would unpack to more than it is.
    """
    state = contents(path)
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} is damaged (it holds a {type(state).__name__})")
    return state


def contents(path: Path) -> object:
    """What torch.save wrote into a file, on the CPU; nothing in it is run, and what is damaged is refused, as by
    `load`.
    """
    try:
        with open(path, "rb") as file:
            if (
                file.read(4) != b"PK\x03\x04"
            ):  # torch.load would take it for a file of before 1.6, whatever zip file it ends with
                raise UserError(f"checkpoint {path} is damaged (it does not begin as a file of torch.save does)")
        # torch.load does not look at the checksums that torch.save writes.
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
            if unpacked > path.stat().st_size:  # torch.save compresses nothing
                raise UserError(f"checkpoint {path} would unpack to {unpacked:,} bytes and is no file of torch.save")
            # torch's reader gives uninitialised memory for what calls itself a folder, whatever its checksum.
            damaged = (
                next((part.filename for part in archive.infolist() if part.external_attr & 0xFF or part.volume), None)
                or archive.testzip()
            )
            for part in archive.infolist():
                if damaged is None and part.filename.lower().endswith(
                    ".pkl"
                ):  # torch's reader finds names of other case, too
                    pickle_size.check(io.BytesIO(archive.read(part)), f"checkpoint {path}")
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file leads the readers of zip files and of torch into errors of any type
        # In short, and not torch's own advice, which is to load it with the code in it.
        why = type(error).__name__ + (
            f": {str(error).splitlines()[0][:200]}" if isinstance(error, OSError | zipfile.BadZipFile) else ""
        )
        raise UserError(f"checkpoint {path} is damaged ({why})") from error
    raise UserError(f"checkpoint {path} is damaged (in {damaged})")


def _keep(path: Path, milestone: Path) -> None:
    """Give the file a second name, or copy it where the file system knows no links (exFAT, some network shares)."""
    milestone.parent.mkdir(exist_ok=True)
    aside = milestone.with_suffix(".partial")
    aside.unlink(missing_ok=True)
    try:
        try:
            os.link(path, aside)
        except OSError:
            shutil.copyfile(path, aside)
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
        os.replace(aside, milestone)
    finally:
        aside.unlink(missing_ok=True)  # half a copy; or a name that stays where the milestone is this very file already


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
