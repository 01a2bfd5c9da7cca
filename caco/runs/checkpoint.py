"""Checkpoints: one file with the whole state, written so that a kill at any instant leaves the previous one intact."""

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
    """The checkpoints of one run: the newest few, and milestones that are kept for good.

    Args:
        directory: the folder that holds them.
        keep: number of newest checkpoints to keep.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        if keep < 1:
            raise UserError(f"checkpoint.keep must be at least 1; got {keep}")
        self.directory, self.keep = Path(directory), keep

    def _files(self, kind: str = "") -> list[Path]:
        folder = self.directory / kind
        return sorted(p for p in folder.glob("step_*.pt") if NAME.fullmatch(p.name)) if folder.is_dir() else []

    def save(self, state: dict, step: int, *, milestone: bool = False) -> Path:
        """Write a checkpoint to a temporary name, sync it, rename it; then remove all but the newest `keep`.

        Args:
            state: only tensors, numbers, strings and containers of them.
            milestone: also keep this one for good, as a hard link where the file system has them, else as a copy.
        Raises:
            OSError: the disk is full or gone; the earlier checkpoints stay as they were.
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
            # torch's zip writer reports a failed write as a RuntimeError about positions, so look for its cause.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise FileError(
                f"checkpoint {path} could not be written ({cause}); the earlier checkpoints are untouched"
            ) from error
        _sync_directory(self.directory)
        for old in self._files()[: -self.keep]:
            old.unlink()
        return path

    def load_newest(self) -> tuple[dict, Path] | None:
        """The newest state that can be read completely, and its file; None if there is no checkpoint. A damaged file is
        reported on stderr, and the one before it is tried.

        Raises:
            OSError: there are checkpoints, but none can be read.
        """
        files = sorted(self._files() + self._files("milestones"), key=lambda p: p.name, reverse=True)
        for path in files:
            try:
                return load(path), path
            except UserError as error:
                print(f"caco: {error}; trying the checkpoint before it", file=sys.stderr)
        if files:
            raise FileError(
                f"none of the {len(files)} checkpoints in {self.directory} can be read; remove them to start anew"
            )
        return None


def load(path: Path) -> dict:
    """A checkpoint's state, on the CPU.

    Raises:
        UserError: the file is damaged, or would unpack to more bytes than it has.
    """
    state = contents(path)
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} is damaged (it holds a {type(state).__name__})")
    return state


def contents(path: Path) -> object:
    """The object that torch.save wrote into a file, with tensors on the CPU. No code from the file is run, and a
    damaged file is refused as in `load`.
    """
    try:
        with open(path, "rb") as file:
            # A file that does not start as a zip file but ends as one would be read as torch's format before 1.6.
            if file.read(4) != b"PK\x03\x04":
                raise UserError(f"checkpoint {path} is damaged (it does not begin like a file of torch.save)")
        # torch.save writes checksums, but torch.load does not verify them.
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
            if unpacked > path.stat().st_size:  # impossible in a file of torch.save, which does not compress
                raise UserError(f"checkpoint {path} would unpack to {unpacked:,} bytes and is no file of torch.save")
            # torch's reader returns uninitialised memory for an entry marked as a folder, whatever its checksum.
            damaged = (
                next((part.filename for part in archive.infolist() if part.external_attr & 0xFF or part.volume), None)
                or archive.testzip()
            )
            for part in archive.infolist():
                # Case is ignored, as torch's reader does.
                if damaged is None and part.filename.lower().endswith(".pkl"):
                    pickle_size.check(io.BytesIO(archive.read(part)), f"checkpoint {path}")
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file can make the zip and torch readers raise any type of error
        # Without torch's own message, which advises loading the file with the code in it.
        why = type(error).__name__ + (
            f": {str(error).splitlines()[0][:200]}" if isinstance(error, OSError | zipfile.BadZipFile) else ""
        )
        raise UserError(f"checkpoint {path} is damaged ({why})") from error
    raise UserError(f"checkpoint {path} is damaged (in {damaged})")


def _keep(path: Path, milestone: Path) -> None:
    """Give the file a second name; copy it if the file system has no links (exFAT, some network shares)."""
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
        aside.unlink(missing_ok=True)  # half a copy, or a link that os.replace leaves if both names are one file


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
