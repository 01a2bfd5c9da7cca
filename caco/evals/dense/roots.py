"""Finds the folders of sets with dense labels, and reports everything that a set lacks in a single error."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from caco.errors import UserError
from caco.runs.paths import expanded


def existing(root: str | None, evaluator: str, layout: str) -> Path:
    """The folder that the setting `root` of an evaluator names.

    Args:
        evaluator: the evaluator's name, for the error message.
        layout: the expected layout of the folder, for the error message.
    Raises:
        UserError: no folder is named, or it does not exist.
    """
    if root is None or not expanded(root).is_dir():
        raise UserError(
            f"root: expected the folder that holds the set, as eval.{evaluator}.root=PATH, got {root}. Expected below"
            f" it:\n{layout}"
        )
    return expanded(root)


def first_with(candidates: Sequence[Path], inside: str) -> Path | None:
    """The first of these folders that contains this file or folder; None if none does."""
    return next((folder for folder in candidates if (folder / inside).exists()), None)


def absent(folder: Path, files: Iterable[str]) -> list[str]:
    """The files that a folder lacks. The folder is listed once, because a query for each of ten thousand files takes
    long on a network share.
    """
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    return [file for file in files if file not in there]


def refuse_missing(name: str, root: Path, missing: Sequence[str], layout: str) -> None:
    """Refuse an incomplete set.

    Args:
        missing: a line for each missing part; nothing happens if it is empty.
        layout: the expected layout of the set, and the archives that contain it.
    Raises:
        UserError: something is missing; the message has all of these lines.
    """
    if missing:
        listed = "".join(f"\n  {line}" for line in missing)
        raise UserError(f"root: {name} is incomplete below {root}. Missing:{listed}\nExpected below root:\n{layout}")
