"""The eleven sets of transfer evaluation (the paper's Table V), in the folders that torchvision's downloads use.

Labels are int64 [N] in [0, C). VOC2007 has int64 [N, 20]: 1 means present, 0 absent, and -1 marked difficult, which is
ignored in the score.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from caco.data.sets.choosing import choose
from caco.data.sets.class_folders import class_folders
from caco.data.sets.image_files import ImageFiles
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.published import as_published
from caco.data.sets.sources import Source
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
    with _published("food101", top / "meta" / "train.json") as text:
        classes = sorted(json.loads(text))

    def part(split: str) -> ImageFiles:
        with _published("food101", top / "meta" / f"{split}.json") as text:
            listed = json.loads(text)
            if sorted(listed) != classes:  # their numbers would differ from train.json's
                raise ValueError("its classes are others than those of train.json")
            files = [f"{image}.jpg" for name in classes for image in listed[name]]
            labels = [c for c, name in enumerate(classes) for _ in listed[name]]
        return _files(top / "images", files, f"food101/{split}", labels, classes)

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
    with _published("sun397", top / "ClassName.txt") as text:
        classes = [line.strip() for line in text.splitlines() if line.strip()]
    number = {name: c for c, name in enumerate(classes)}

    def part(split: str, file: str) -> ImageFiles:
        lists = [folder / file for folder in (top, top / "Partitions") if (folder / file).is_file()]
        if not lists:
            raise MissingSet(f"sun397: expected {top / file} of Partitions.zip, from the set's page; got no such file")
        with _published("sun397", lists[0]) as text:
            images = [line.strip() for line in text.splitlines() if line.strip()]
            labels = [number[image.rpartition("/")[0]] for image in images]
        return _files(top, [image.lstrip("/") for image in images], f"sun397/{split}", labels, classes)

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
    meta = _file("cars", top / "devkit" / "cars_meta.mat")
    with as_published("cars", meta):
        classes = [str(name) for name in loadmat(meta, squeeze_me=True)["class_names"].tolist()]

    def part(split: str, file: str) -> ImageFiles:
        path = top / file if (top / file).is_file() else _file("cars", top / "devkit" / file)
        with as_published("cars", path):
            rows = np.atleast_1d(loadmat(path, squeeze_me=True)["annotations"])
            files = [f"cars_{split}/{row['fname']}" for row in rows]
            labels = [_counted_from_1(row["class"]) for row in rows]
        return _files(top, files, f"cars/{split}", labels, classes)

    test = part("test", "cars_test_annos_withlabels.mat")
    return _with_held_out("cars", part("train", "cars_train_annos.mat"), test, "top1", 0.2, seed)


def aircraft(root: Path, seed: int) -> TransferSet:
    """FGVC Aircraft, variants: 3,334 training, 3,333 validation and 3,333 test images, divided as published. Mean
    accuracy per class."""
    top = _there("aircraft", root / "fgvc-aircraft-2013b", "FGVCAircraft") / "data"
    with _published("aircraft", top / "variants.txt") as text:
        classes = [line.strip() for line in text.splitlines() if line.strip()]
    number = {name: c for c, name in enumerate(classes)}

    def part(split: str) -> ImageFiles:
        with _published("aircraft", top / f"images_variant_{split}.txt") as text:
            rows = [line.strip().split(" ", 1) for line in text.splitlines() if line.strip()]
            files = [f"images/{image}.jpg" for image, _ in rows]
            labels = [number[variant] for _, variant in rows]
        return _files(top, files, f"aircraft/{split}", labels, classes)

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
            with _published("voc2007", top / "ImageSets" / "Main" / f"{name}_{split}.txt") as text:
                rows = [line.split() for line in text.splitlines() if line.strip()]
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
    with _published("dtd", top / "labels" / "train1.txt") as text:
        classes = sorted({image.partition("/")[0] for image in text.split()})
    number = {name: c for c, name in enumerate(classes)}

    def part(split: str) -> ImageFiles:
        with _published("dtd", top / "labels" / f"{split}1.txt") as text:
            images = text.split()
            labels = [number[image.partition("/")[0]] for image in images]
        return _files(top / "images", images, f"dtd/{split}", labels, classes)

    return TransferSet("dtd", part("train"), part("val"), part("test"), "top1")


def pets(root: Path, seed: int) -> TransferSet:
    """Oxford-IIIT Pets, 37 breeds: 3,680 training and 3,669 test images; a fifth of the training images is held out.
    Mean accuracy per class.
    """
    top = _there("pets", root / "oxford-iiit-pet", "OxfordIIITPet")

    def part(split: str, file: str) -> ImageFiles:
        with _published("pets", top / "annotations" / file) as text:
            rows = [line.split() for line in text.splitlines() if line.strip()]
            files = [f"images/{image}.jpg" for image, *_ in rows]
            labels = [_counted_from_1(breed) for _, breed, *_ in rows]
            names = {_counted_from_1(breed): image.rpartition("_")[0] for image, breed, *_ in rows}
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
    of_labels, of_splits = (_file("flowers", top / name) for name in ("imagelabels.mat", "setid.mat"))
    with as_published("flowers", of_labels):
        labels = np.atleast_1d(loadmat(of_labels, squeeze_me=True)["labels"]).astype(np.int64) - 1
        classes = [str(c + 1) for c in range(int(labels.max()) + 1)]
    with as_published("flowers", of_splits):
        ids = loadmat(of_splits, squeeze_me=True)

    def part(split: str, key: str) -> ImageFiles:
        with as_published("flowers", of_splits):
            numbers = np.atleast_1d(ids[key]).astype(np.int64)
            if numbers.min() < 1:
                raise ValueError(f"images are counted from 1, and one of {key} is {numbers.min()}")
            of_split = labels[numbers - 1]
        files = [f"jpg/image_{number:05d}.jpg" for number in numbers]
        return _files(top, files, f"flowers/{split}", of_split, classes)

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


@contextlib.contextmanager
def _published(name: str, path: Path) -> Iterator[str]:
    """A context that gives the text of a published list; errors in using the text are refused as in `as_published`."""
    with as_published(name, path):
        yield read_text(_file(name, path))


def _counted_from_1(number: str | int) -> int:
    """The number from 0 of a class that a list counts from 1."""
    if int(number) < 1:
        raise ValueError(f"classes are counted from 1, and one is {number}")
    return int(number) - 1


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
