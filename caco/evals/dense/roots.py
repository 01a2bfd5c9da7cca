"""Sets of images with labels for places, where they lie, and one refusal that says all that is missing of one."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from caco.errors import UserError
from caco.runs.paths import expanded


def existing(root: str | None, evaluator: str, layout: str) -> Path:
    """The folder that a setting names.

    Args:
        layout: how the set should lie in it.
    Raises:
        UserError: none is named, or it is not there.
    """
    if root is None or not expanded(root).is_dir():
        raise UserError(
            f"root: expected the folder that holds the set, as eval.{evaluator}.root=PATH, got {root}. Expected below"
            f" it:\n{layout}"
        )
    return expanded(root)


def first_with(candidates: Sequence[Path], inside: str) -> Path | None:
    """The first folder that has this file or folder in it."""
    return next((folder for folder in candidates if (folder / inside).exists()), None)


def absent(folder: Path, files: Iterable[str]) -> list[str]:
    """Those of the files that are not in a folder, listed once: asking for each of ten thousand takes long on network
    shares.
    """
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    return [file for file in files if file not in there]


def refuse_missing(name: str, root: Path, missing: Sequence[str], layout: str) -> None:
    """
    Args:
        missing: a line each; nothing is refused where there are none.
        layout: how the set should lie, and which archives hold it.
    Raises:
        UserError: with all of it.
    """
    if missing:
        listed = "".join(f"\n  {line}" for line in missing)
        raise UserError(f"root: {name} is not whole below {root}. Missing:{listed}\nExpected below root:\n{layout}")
