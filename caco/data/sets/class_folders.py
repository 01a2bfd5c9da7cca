"""Lists the images of a folder: with one subfolder for each class, or without labels; and checks class names."""

import difflib
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from caco.data.sets.image_files import ImageFiles
from caco.data.sets.reading import EXTENSIONS
from caco.data.sets.stored import EXTENSIONS as STORED
from caco.data.sets.walking import Walk, folders_in
from caco.errors import FileError, UserError
from caco.runs.paths import expanded, read_text


def class_folders(top: Path, name: str, classes: list[str] | None = None, channels: int | None = None) -> ImageFiles:
    """All images below each class folder of `top`, in sorted order, labelled by their class folder.

    Args:
        classes: read only these folders, and number the classes in this order; None reads all, sorted.
        channels: as in `folder`.
    Raises:
        UserError: a class folder is missing (the message shows similar names) or holds no image, or a link makes images
            occur twice.
    """
    found = folders_in(top)
    if classes is None:
        classes = found
    else:
        require_known(classes, found, where=str(top))
    files, labels, walk = list[str](), list[int](), Walk(top, _extensions(channels))
    for label, folder_name in enumerate(classes):
        images = walk.images_below(top / folder_name)
        if not images:
            raise UserError(
                f"{top / folder_name}: expected images ({', '.join(_extensions(channels))}), got none in this class"
                f" folder{_stored_alone(walk)}"
            )
        files += [f"{folder_name}/{file}" for file in images]
        labels += [label] * len(images)
    walk.refuse_repeats()
    return ImageFiles(top, files, name=name, labels=np.array(labels), classes=list(classes), channels=channels)


def unlabelled_images(top: Path, name: str, channels: int | None = None) -> ImageFiles:
    """All images below `top`, in sorted order, without labels; `channels` as in `folder`. Raises UserError for none."""
    walk = Walk(top, _extensions(channels))
    files = walk.images_below(top)
    walk.refuse_repeats()
    if not files:
        raise UserError(
            f"{top}: expected images ({', '.join(_extensions(channels))}) in it or in class folders, got"
            f" none{_stored_alone(walk)}"
        )
    return ImageFiles(top, files, name=name, channels=channels)


def _extensions(channels: int | None) -> tuple[str, ...]:
    return EXTENSIONS if channels is None else EXTENSIONS + STORED


def _stored_alone(walk: Walk) -> str:
    """A hint for the error message, if the walk passed .npy files, which are images only with data.channels."""
    return (
        "; there are .npy files: say how many channels these have, data.channels=N"
        if walk.passed_by.endswith(STORED)
        else ""
    )


def read_class_list(path: str) -> list[str]:
    """The names of class folders in a text file, one a line. Raises UserError if there are none or a name repeats."""
    if not expanded(path).is_file():
        raise FileError(f"data.class_list: expected a text file with a class folder's name a line, got {path}")
    names = [line.strip() for line in read_text(expanded(path)).splitlines() if line.strip()]
    if not names or len(set(names)) != len(names):
        raise UserError(
            f"data.class_list: expected distinct names, one a line, got {len(names)} with repeats in {path}"
        )
    return names


def require_folders(top: Path, train: ImageFiles) -> None:
    """Raise UserError if `top` lacks a folder for a class of the training images."""
    found, classes = set(folders_in(top)), train.classes or []
    if missing := [name for name in classes if name not in found]:
        shown = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{top}: no folder here for {len(missing)} of the {len(classes)} classes that are trained on: {shown};"
            f" expected one for each{_spelled_otherwise(missing, found)}"
        )


def require_known(names: list[str], known: list[str], *, where: str) -> None:
    """Raise UserError if some of the names are not known; the message shows names that are similar."""
    if not (unknown := [name for name in names if name not in set(known)]):
        return
    near = {name: difflib.get_close_matches(name, known, n=1) for name in unknown[:3]}
    shown = ", ".join(f"{name!r}" + (f" (near: {match[0]!r})" if match else "") for name, match in near.items())
    raise UserError(
        f"{where}: expected all of {len(names)} classes among the {len(known)} there, got {len(unknown)} unknown:"
        f" {shown}{', ...' if len(unknown) > 3 else ''}{_spelled_otherwise(unknown, known)}"
    )


def _spelled_otherwise(unknown: Iterable[str], known: Iterable[str]) -> str:
    """A hint for the error message, if an unknown name looks like a known one: Unicode has two spellings of a letter
    with an accent, one character or two, and file systems and editors choose differently."""
    composed = {unicodedata.normalize("NFC", name): name for name in known}
    for name in unknown:
        if (other := composed.get(unicodedata.normalize("NFC", name), name)) != name:
            return (
                f"; {name!r} and {other!r} look the same but have other characters ({ascii(name)}, {ascii(other)}:"
                " composed and decomposed Unicode): rename one like the other"
            )
    return ""


def existing_folder(path: Path) -> Path:
    """The path. Raises FileError if no folder is there."""
    if not path.is_dir():
        raise FileError(f"expected a folder {path}, but it does not exist; data.root must contain it")
    return path
