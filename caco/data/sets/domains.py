"""PACS: seven classes in four domains, by its published lists. A method learns from three domains and is tested on the
fourth.
"""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from caco.data.sets.folders import existing_root, reduced
from caco.data.sets.image_files import ImageFiles
from caco.data.sets.reading import read_image
from caco.data.sets.sources import Splits, UnreadableImage
from caco.errors import FileError, UserError
from caco.ranges import Count, Natural, ProperShare, Seed
from caco.runs.directory import is_first_rank
from caco.runs.paths import read_text
from caco.saying import Say

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
# Number of images on the published train and crossval list of each domain.
PUBLISHED = {"art_painting": (1840, 208), "cartoon": (2107, 237), "photo": (1499, 171), "sketch": (3531, 398)}
LISTS = ("train", "crossval")
# Dassl leaves this image out because it is damaged; other users do not. Here it is kept if it can be decoded.
DAMAGED = "sketch/dog/n02103406_4068-1.png"
LAYOUTS = """\
  PACS/kfold/DOMAIN/CLASS/*.jpg    the original archive        PACS/DOMAIN/CLASS/*.jpg    its mirrors
  pacs/images/DOMAIN/CLASS/*.jpg   Dassl's                     (sketches are *.png; root is the folder above,
                                                               or PACS itself)
with the published lists DOMAIN_train_kfold.txt and DOMAIN_crossval_kfold.txt (a line is
`art_painting/dog/pic_001.jpg 1`) in splits/ or in "Train val splits and h5py files pre-read/" beside the images'
folder, or beside DOMAIN/"""


@dataclass(frozen=True)
class Pacs:
    """All images on the lists, from all domains.

    Attributes:
        every: the images, N of them, labelled by class.
        domain: int64 [N], each image's position in DOMAINS.
        train: bool [N], whether an image is on a train list; the others are on a crossval list.
    """

    every: ImageFiles
    domain: np.ndarray
    train: np.ndarray

    def at(self, domains: Sequence[str], which: Literal["all", "train", "crossval"] = "all") -> np.ndarray:
        """Positions of the images of these domains that are on these lists, int64 [n]."""
        of_domains = np.isin(self.domain, [DOMAINS.index(name) for name in domains])
        on_lists = np.ones(len(self.train), dtype=bool) if which == "all" else self.train == (which == "train")
        return np.flatnonzero(of_domains & on_lists)

    def part(self, domains: Sequence[str], which: Literal["all", "train", "crossval"] = "all") -> ImageFiles:
        """The images of these domains that are on these lists."""
        name = "+".join(domains) + ("" if which == "all" else f"/{which}")
        return self.every.part(self.at(domains, which), f"pacs/{name}")


def others_than(target: str) -> list[str]:
    """The three domains to learn from when this one is the target."""
    return [name for name in DOMAINS if name != target]


def pacs(
    *,
    root: str | None,
    target: Literal["art_painting", "cartoon", "photo", "sketch"] = "art_painting",
    limit: Count | None = None,
    validation_fraction: ProperShare | None = None,
    seed: Seed = 0,
    in_memory_mb: Natural = 256,
) -> Splits:
    """Pre-train without labels on the train lists of three domains, and test on all images of the fourth.

    Args:
        root: a folder with PACS in one of the published layouts.
        target: the domain to test on. Its images are used for nothing else.
        limit, validation_fraction, seed, in_memory_mb: see caco.data.sets.folders.folder.
    Raises:
        FileError: PACS is not there; the message shows the layouts.
        UserError: the lists and the images do not match.
    """
    if target not in DOMAINS:
        raise UserError(f"data.target: expected one of {', '.join(DOMAINS)}, got {target!r}")
    found = read(existing_root(root, example="data=pacs"), key="data.root", say=_say)
    train, test = found.part(others_than(target), "train"), found.part([target])
    splits = reduced(train, test, name="pacs", limit=limit, validation_fraction=validation_fraction, seed=seed)
    pretrain = splits.pretrain.in_memory(in_memory_mb)
    return Splits(pretrain, pretrain, None if splits.test is None else splits.test.in_memory(in_memory_mb))


def _say(text: str, passing: bool = False) -> None:
    if is_first_rank():
        print(f"caco: {text}", file=sys.stderr)


def read(root: Path, *, key: str, say: Say) -> Pacs:
    """Read PACS in any published layout. Harmless differences from the published lists are reported by `say`.

    Args:
        key: the setting that names the root, for messages.
    Raises:
        FileError: it is not there, or images are missing.
        UserError: a list cannot be read, or an image is on several lists.
    """
    images, lists = _find(root, key)
    files: list[str] = []
    domain: list[int] = []
    labels: list[int] = []
    train: list[bool] = []
    for number, name in enumerate(DOMAINS):
        for which, published in zip(LISTS, PUBLISHED[name], strict=True):
            listed = _read_list(lists / f"{name}_{which}_kfold.txt", name, say)
            if len(listed) != published:
                say(
                    f"{key}: {name}_{which}_kfold.txt: the published list has {published:,} images, this one"
                    f" {len(listed):,}"
                )
            files += listed
            domain += [number] * len(listed)
            labels += [CLASSES.index(file.split("/")[1]) for file in listed]
            train += [which == "train"] * len(listed)
    keep = _kept(images, files, key, say)
    if len(set(files)) < len(files):
        twice = [file for file, count in Counter(files).items() if count > 1]
        raise UserError(f"{key}: expected each image on one list, got {len(twice)} on several: {', '.join(twice[:3])}")
    every = ImageFiles(
        images, [file for file, kept in zip(files, keep, strict=True) if kept], name="pacs",
        labels=np.array(labels)[keep],
        classes=list(CLASSES),
    )  # fmt: skip
    return Pacs(every, np.array(domain)[keep], np.array(train)[keep])


def _find(root: Path, key: str) -> tuple[Path, Path]:
    """The folder that has the domains' folders, and the folder that has the lists."""
    tops = [root, root / "PACS", root / "pacs"]
    images = [top / below for top in tops for below in ("kfold", "images", "PACS", "")]
    there = [folder for folder in images if all((folder / name).is_dir() for name in DOMAINS)]
    beside = ("splits", "Train val splits and h5py files pre-read", "")
    near = there[0] if there else root
    places = [top / below for top in dict.fromkeys([near, near.parent, *tops]) for below in beside]
    names = [f"{name}_{which}_kfold.txt" for name in DOMAINS for which in LISTS]
    lists = [folder for folder in places if all((folder / name).is_file() for name in names)]
    if there and lists:
        return there[0], lists[0]
    missing = []
    if not there:
        missing.append(f"no folder with {', '.join(f'{name}/' for name in DOMAINS)}")
    if not lists:
        most = max(places, key=lambda folder: sum((folder / name).is_file() for name in names))
        absent = [name for name in names if not (most / name).is_file()]
        some = len(absent) < len(names)
        missing.append(f"in {most} not {', '.join(absent)}" if some else f"no lists ({names[0]}, ...)")
    raise FileError(f"{key}: expected PACS below {root}, got {' and '.join(missing)}. Layouts:\n{LAYOUTS}")


def _read_list(file: Path, domain: str, say: Say) -> list[str]:
    """The images of a list as DOMAIN/CLASS/FILE. The folder decides the class, not the number in the list."""
    rows = [line.rsplit(None, 1) for line in read_text(file).splitlines() if line.strip()]
    listed, offsets = [], []
    for row in rows:
        parts = row[0].replace("\\", "/").split("/")[-3:]
        if (
            len(row) != 2
            or len(parts) != 3
            or parts[0] != domain
            or parts[1] not in CLASSES
            or not row[1].lstrip("-").isdecimal()
        ):
            example = f"expected lines like `{domain}/dog/pic_001.jpg 1`, with one of {', '.join(CLASSES)}"
            raise UserError(f"{file}: {example}, got {' '.join(row)!r}")
        listed.append("/".join(parts))
        offsets.append(int(row[1]) - CLASSES.index(parts[1]))
    if not listed:
        raise UserError(f"{file}: expected lines like `{domain}/dog/pic_001.jpg 1`, got none")
    usual = Counter(offsets).most_common(1)[0][0]  # some copies of the lists number the classes from 1, others from 0
    wrong = [name for name, offset in zip(listed, offsets, strict=True) if offset != usual]
    if wrong:
        say(f"{file}: the number of {', '.join(wrong[:3])} is another class's than the folder's; the folder counts")
    return listed


def _kept(images: Path, files: list[str], key: str, say: Say) -> np.ndarray:
    """bool [N]: False for the one damaged image if it cannot be decoded, True for all others.

    Raises:
        FileError: another image is missing.
    """
    missing = [file for file in files if file != DAMAGED and not os.path.isfile(images / file)]
    if missing:
        raise FileError(
            f"{key}: expected the {len(files):,} images of the lists below {images}, got {len(missing):,} of them not"
            f" there ({', '.join(missing[:3])}): unpack the set again"
        )
    keep = np.ones(len(files), dtype=bool)
    if DAMAGED in files:
        try:
            read_image(images / DAMAGED)
        except UnreadableImage:
            keep[files.index(DAMAGED)] = False
            say(f"{key}: left out {DAMAGED}, which is damaged or not there, as Dassl does")
    return keep
