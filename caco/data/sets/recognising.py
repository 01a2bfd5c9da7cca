"""Recognises, by the names of files and folders alone, which option of `data` reads the images in a folder."""

import os
import re
from pathlib import Path

from caco.data.sets.reading import EXTENSIONS


def dataset_at(root: Path) -> str:
    """The option of `data` that reads the folder, with settings that it needs; "" if none does."""
    for option, part in {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "stl10": "stl10_binary",
                         "fashion_mnist": "FashionMNIST"}.items():  # fmt: skip
        if (root / part).is_dir():
            return option
    if (root / "t10k-images-idx3-ubyte.gz").is_file():
        return "fashion_mnist"
    if (root / "wnids.txt").is_file() and (root / "train").is_dir():
        return "tiny_imagenet"
    train = _classes(root / "train")
    tests = {name: _classes(root / name) for name in ("test", "val")}
    if len([name for name in train if re.fullmatch(r"n\d{8}", name)]) >= 1000:
        # If val/ is not sorted into class folders, some training images take the place of its images.
        return "imagenet" if tests["val"] else "folder data.validation_fraction=0.1"
    if train and any(tests.values()):
        return "folder"
    if train or _classes(root) or _has_images(root):
        return "folder data.validation_fraction=0.1" if train or _classes(root) else "folder eval=[]"
    return ""


def _classes(folder: Path) -> list[str]:
    """The names of the subfolders, if the first of them holds images; else []."""
    if not folder.is_dir():
        return []
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    return names if names and _has_images(folder / names[0]) else []


def _has_images(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(EXTENSIONS) for entry in entries)
