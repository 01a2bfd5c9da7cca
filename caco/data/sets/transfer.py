"""The eleven sets of transfer evaluation (the paper's Table V), in the folders that torchvision's downloads use.

Labels are int64 [N] in [0, C). VOC2007 has int64 [N, 20]: 1 means present, 0 absent, and -1 marked difficult, which is
ignored in the score.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from caco.data.sets.folders import class_folders
from caco.data.sets.sources import ImageFiles, ImagesInMemory, Source, choose
from caco.errors import FileError, UserError
from caco.runs.paths import read_text

Metric = Literal["top1", "mean_per_class", "map11"]
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CALTECH_TRAINING_IMAGES = 30


@dataclass(frozen=True)
class TransferSet:
    """Training, validation and test images of one set, and the metric by which it is scored."""

    name: str
    train: Source
    validation: Source
    test: Source
    metric: Metric


class MissingSet(FileError):
    """A set is not there; the message says what to download and where to put it."""


def load(name: str, root: Path, *, seed: int) -> TransferSet:
    """Read one of the eleven sets, or a folder of your own below `root` that has train/ and test/ of class folders.

    Args:
        name: one of READERS, or the name of your folder.
        root: the folder that has all sets.
        seed: seed of the draws that the protocol leaves open: validation images if none are published, and
            Caltech-101's split.
    Raises:
        MissingSet: the set is not below root.
        UserError: its files are not as published.
    """
    if name in READERS:
        return READERS[name](root, seed)
    top = root / name
    if not (top / "train").is_dir() or not (top / "test").is_dir():
        raise MissingSet(
            f"{name}: expected one of {', '.join(READERS)}, or a folder of your own: {top}/train and {top}/test of"
            " class folders"
        )
    train = class_folders(top / "train", f"{name}/train")
    return _with_held_out(name, train, class_folders(top / "test", f"{name}/test", train.classes), "top1", 0.1, seed)


def food101(root: Path, seed: int) -> TransferSet:
    """Food-101: 75,750 training and 25,250 test images; a tenth of the training images is held out. Top-1."""
    top = _there("food101", root / "food-101", "Food101")

    def part(split: str) -> ImageFiles:
        listed = json.loads(read_text(top / "meta" / f"{split}.json"))
        classes = sorted(listed)
        files = [f"{image}.jpg" for name in classes for image in listed[name]]
        return _files(
            top / "images",
            files,
            f"food101/{split}",
            [c for c, name in enumerate(classes) for _ in listed[name]],
            classes,
        )

    return _with_held_out("food101", part("train"), part("test"), "top1", 0.1, seed)


def cifar10(root: Path, seed: int) -> TransferSet:
    """CIFAR-10: 50,000 training and 10,000 test images; a tenth of the training images is held out. Top-1."""
    return _cifar("cifar10", "CIFAR10", "cifar-10-batches-py", root, seed)


def cifar100(root: Path, seed: int) -> TransferSet:
    """CIFAR-100, divided and scored as `cifar10`."""
    return _cifar("cifar100", "CIFAR100", "cifar-100-python", root, seed)


def sun397(root: Path, seed: int) -> TransferSet:
    """SUN397, partition 1 by its published lists: 19,850 training and 19,850 test images; a fifth of the training
    images is held out. Top-1."""
    top = _there(
        "sun397",
        root / "SUN397",
        "SUN397",
        also="and Partitions.zip of the same page (Training_01.txt, Testing_01.txt) unpacked into it",
    )
    classes = [line.strip() for line in read_text(top / "ClassName.txt").splitlines() if line.strip()]
    number = {name: c for c, name in enumerate(classes)}

    def part(split: str, file: str) -> ImageFiles:
        lists = [folder / file for folder in (top, top / "Partitions") if (folder / file).is_file()]
        if not lists:
            raise MissingSet(f"sun397: expected {top / file} of Partitions.zip, from the set's page; got no such file")
        images = [line.strip() for line in read_text(lists[0]).splitlines() if line.strip()]
        return _files(
            top,
            [image.lstrip("/") for image in images],
            f"sun397/{split}",
            [number[image.rpartition("/")[0]] for image in images],
            classes,
        )

    return _with_held_out("sun397", part("train", "Training_01.txt"), part("test", "Testing_01.txt"), "top1", 0.2, seed)


def cars(root: Path, seed: int) -> TransferSet:
    """Stanford Cars: 8,144 training and 8,041 test images; a fifth of the training images is held out. Top-1."""
    from scipy.io import loadmat

    top = _there(
        "cars",
        root / "stanford_cars",
        None,
        also=(
            "holding cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat (the original server is gone:"
            " from a copy)"
        ),
    )
    classes = [str(name) for name in loadmat(top / "devkit" / "cars_meta.mat", squeeze_me=True)["class_names"].tolist()]

    def part(split: str, file: str) -> ImageFiles:
        path = top / file if (top / file).is_file() else _file("cars", top / "devkit" / file)
        rows = np.atleast_1d(loadmat(path, squeeze_me=True)["annotations"])
        files = [f"cars_{split}/{row['fname']}" for row in rows]
        return _files(top, files, f"cars/{split}", [int(row["class"]) - 1 for row in rows], classes)

    test = part("test", "cars_test_annos_withlabels.mat")
    return _with_held_out("cars", part("train", "cars_train_annos.mat"), test, "top1", 0.2, seed)


def aircraft(root: Path, seed: int) -> TransferSet:
    """FGVC Aircraft, variants: 3,334 training, 3,333 validation and 3,333 test images, divided as published. Mean
    accuracy per class."""
    top = _there("aircraft", root / "fgvc-aircraft-2013b", "FGVCAircraft") / "data"
    classes = [line.strip() for line in read_text(top / "variants.txt").splitlines() if line.strip()]
    number = {name: c for c, name in enumerate(classes)}

    def part(split: str) -> ImageFiles:
        rows = [line.strip().split(" ", 1) for line in read_text(top / f"images_variant_{split}.txt").splitlines()]
        files = [f"images/{image}.jpg" for image, _ in rows]
        return _files(top, files, f"aircraft/{split}", [number[variant] for _, variant in rows], classes)

    return TransferSet("aircraft", part("train"), part("val"), part("test"), "mean_per_class")


def voc2007(root: Path, seed: int) -> TransferSet:
    """PASCAL VOC 2007 classification: 2,501 training, 2,510 validation and 4,952 test images of 20 classes; an image
    may have several. 11-point mAP."""
    top = _there(
        "voc2007",
        root / "VOCdevkit" / "VOC2007",
        None,
        also="as VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar unpack",
    )

    def part(split: str) -> ImageFiles:
        columns, files = [], []
        for name in VOC_CLASSES:
            listed = read_text(_file("voc2007", top / "ImageSets" / "Main" / f"{name}_{split}.txt")).splitlines()
            rows = [line.split() for line in listed if line.strip()]
            files.append([f"JPEGImages/{image}.jpg" for image, _ in rows])
            # Published marks: 1 present, -1 absent, 0 only objects that are marked difficult.
            columns.append([{"1": 1, "-1": 0, "0": -1}[mark] for _, mark in rows])
        if any(column != files[0] for column in files):
            raise UserError(
                f"voc2007: expected the same images in every list of {split}, got others in {top / 'ImageSets'}"
            )
        return _files(top, files[0], f"voc2007/{split}", np.array(columns).T, list(VOC_CLASSES))

    return TransferSet("voc2007", part("train"), part("val"), part("test"), "map11")


def dtd(root: Path, seed: int) -> TransferSet:
    """Describable Textures, partition 1: 1,880 training, 1,880 validation and 1,880 test images. Top-1."""
    top = _there("dtd", root / "dtd" / "dtd" if (root / "dtd" / "dtd").is_dir() else root / "dtd", "DTD")
    lists = {split: read_text(top / "labels" / f"{split}1.txt").split() for split in ("train", "val", "test")}
    classes = sorted({image.partition("/")[0] for image in lists["train"]})
    number = {name: c for c, name in enumerate(classes)}
    parts = {
        split: _files(
            top / "images", images, f"dtd/{split}", [number[image.partition("/")[0]] for image in images], classes
        )
        for split, images in lists.items()
    }
    return TransferSet("dtd", parts["train"], parts["val"], parts["test"], "top1")


def pets(root: Path, seed: int) -> TransferSet:
    """Oxford-IIIT Pets, 37 breeds: 3,680 training and 3,669 test images; a fifth of the training images is held out.
    Mean accuracy per class.
    """
    top = _there("pets", root / "oxford-iiit-pet", "OxfordIIITPet")

    def part(split: str, file: str) -> ImageFiles:
        rows = [line.split() for line in read_text(top / "annotations" / file).splitlines() if line.strip()]
        files = [f"images/{image}.jpg" for image, *_ in rows]
        labels = [int(breed) - 1 for _, breed, *_ in rows]
        names = {int(breed) - 1: image.rpartition("_")[0] for image, breed, *_ in rows}
        return _files(top, files, f"pets/{split}", labels, [names.get(c, str(c)) for c in range(max(names) + 1)])

    return _with_held_out("pets", part("train", "trainval.txt"), part("test", "test.txt"), "mean_per_class", 0.2, seed)


def caltech101(root: Path, seed: int) -> TransferSet:
    """Caltech-101: 30 training images are drawn from each of its 102 classes, the background class among them; all
    other images are test images.

    A fifth of the training images is held out. Mean accuracy per class.
    """
    top = _there("caltech101", root / "caltech101" / "101_ObjectCategories", "Caltech101")
    every = class_folders(top, "caltech101")
    rng = np.random.default_rng(seed)
    classes = range(len(every.classes or ()))
    of_each = [rng.permutation(np.flatnonzero(every.labels == c))[:CALTECH_TRAINING_IMAGES] for c in classes]
    chosen = np.sort(np.concatenate(of_each))
    train = every.part(chosen, "caltech101/train")
    test = every.part(np.setdiff1d(np.arange(len(every)), chosen), "caltech101/test")
    return _with_held_out("caltech101", train, test, "mean_per_class", 0.2, seed)


def flowers(root: Path, seed: int) -> TransferSet:
    """Oxford Flowers-102: 1,020 training, 1,020 validation and 6,149 test images, divided as published. Mean accuracy
    per class."""
    from scipy.io import loadmat

    top = _there("flowers", root / "flowers-102", "Flowers102")
    labels = np.atleast_1d(loadmat(top / "imagelabels.mat", squeeze_me=True)["labels"]).astype(np.int64) - 1
    ids = loadmat(top / "setid.mat", squeeze_me=True)

    def part(split: str, key: str) -> ImageFiles:
        numbers = np.atleast_1d(ids[key]).astype(np.int64)
        files = [f"jpg/image_{number:05d}.jpg" for number in numbers]
        return _files(
            top, files, f"flowers/{split}", labels[numbers - 1], [str(c + 1) for c in range(int(labels.max()) + 1)]
        )

    return TransferSet("flowers", part("train", "trnid"), part("val", "valid"), part("test", "tstid"), "mean_per_class")


READERS: dict[str, Callable[[Path, int], TransferSet]] = {
    "food101": food101,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "sun397": sun397,
    "cars": cars,
    "aircraft": aircraft,
    "voc2007": voc2007,
    "dtd": dtd,
    "pets": pets,
    "caltech101": caltech101,
    "flowers": flowers,
}


def _there(name: str, top: Path, torchvision_name: str | None, *, also: str = "") -> Path:
    if top.is_dir():
        return top
    root = top
    while root.name and not root.is_dir():
        root = root.parent
    fetch = (
        f'; torchvision fetches it: python -c "from torchvision.datasets import {torchvision_name} as D;'
        f' D({str(root)!r}, download=True)"'
    )
    raise MissingSet(
        f"{name}: expected {top} {also}".rstrip() + ", got no such folder" + (fetch if torchvision_name else "")
    )


def _file(name: str, path: Path) -> Path:
    if not path.is_file():
        raise MissingSet(f"{name}: expected {path}, got no such file: download the complete set")
    return path


def _files(
    root: Path, files: list[str], name: str, labels: Sequence[int] | np.ndarray, classes: list[str]
) -> ImageFiles:
    """The images that a published list names.

    Raises:
        UserError: an image of the list is missing.
    """
    missing = [file for file in files if not (root / file).is_file()]
    if missing or not files:
        raise UserError(
            f"{name}: expected the {len(files)} images of the published list below {root}, got {len(missing)} of them"
            f" not there ({', '.join(missing[:3])}): unpack the set again"
        )
    return ImageFiles(root, files, name=name, labels=np.asarray(labels, dtype=np.int64), classes=classes)


def _with_held_out(name: str, train: Source, test: Source, metric: Metric, share: float, seed: int) -> TransferSet:
    """Hold a share of the training images out for validation, stratified by class and drawn with the seed, so that test
    images are never used to choose settings."""
    held_out = choose(train.labels, round(share * len(train)), len(train), seed=seed, balanced=False)
    rest = np.setdiff1d(np.arange(len(train)), held_out)
    return TransferSet(name, train.part(rest, train.name), train.part(held_out, f"{name}/validation"), test, metric)


def _cifar(name: str, torchvision_name: str, folder: str, root: Path, seed: int) -> TransferSet:
    import torchvision.datasets

    _there(name, root / folder, torchvision_name)
    dataset = getattr(torchvision.datasets, torchvision_name)
    try:
        parts = {split: dataset(root, train=split == "train") for split in ("train", "test")}
    except RuntimeError as error:
        raise UserError(f"{name}: expected the published files in {root / folder}, got others: {error}") from error
    train, test = (
        ImagesInMemory(part.data, name=f"{name}/{split}", labels=np.array(part.targets), classes=part.classes)
        for split, part in parts.items()
    )
    return _with_held_out(name, train, test, "top1", 0.1, seed)
