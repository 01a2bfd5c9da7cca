"""Images with a class for every pixel: PASCAL VOC 2012 with the additional labels of SBD, read from the layouts in
which they are commonly stored.

Labels are uint8 [H, W]: 0 is the background, 1 to 20 are the classes, and 255 marks pixels that are ignored.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from caco.data.sets.image_files import ImageFiles
from caco.data.sets.reading import FORMATS, Refused, check_work
from caco.data.sets.sources import UnreadableImage
from caco.data.sets.transfer import VOC_CLASSES
from caco.evals.dense import roots
from caco.runs.paths import read_text

CLASSES = ("background", *VOC_CLASSES)
IGNORED = 255
NUM_IMAGES = {"train": 1_464, "trainaug": 10_582, "val": 1_449}  # as published

LAYOUT = """\
  VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg, SegmentationClass/2007_000032.png,
  ImageSets/Segmentation/train.txt and val.txt
as VOCtrainval_11-May-2012.tar unpacks; VOC2012 may be in root itself, or be root. For train=trainaug, one of
  VOCdevkit/VOC2012/SegmentationClassAug/2008_000002.png, with the list ImageSets/Segmentation/trainaug.txt or without
  benchmark_RELEASE/dataset/cls/2008_000002.mat, img/2008_000002.jpg, train.txt and val.txt, as SBD's benchmark.tgz
    unpacks; dataset may also be root/dataset, root/SBD, VOCdevkit/VOCaug/dataset or root itself"""


@dataclass(frozen=True)
class LabelledPixels:
    """Image files, and for each a file with the class of every pixel.

    Attributes:
        files: the images.
        labels: PNG or .mat files. They have digests in the same way as images.
    """

    files: ImageFiles
    labels: ImageFiles

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The image, RGB, and its labels, uint8 [H, W].

        Raises:
            UnreadableImage: one of the files cannot be read, their sizes differ, or the labels are not classes.
        """
        image, path = self.files.image(index), self.labels.path(index)
        labels = read_labels(path)
        if labels.shape != (image.height, image.width):
            raise UnreadableImage(
                f"{path}: expected labels of {image.width} x {image.height} pixels, as {self.files.path(index)} has,"
                f" got {labels.shape[1]} x {labels.shape[0]}"
            )
        return image, labels

    def digest(self) -> str:
        """A short hash that changes when images, labels or their order change."""
        return hashlib.blake2b((self.files.digest() + self.labels.digest()).encode(), digest_size=8).hexdigest()

    def cache_key(self) -> str:
        """Like `digest`, but it also changes when files are rewritten on this machine; for caches of computed
        results."""
        return hashlib.blake2b((self.files.cache_key() + self.labels.cache_key()).encode(), digest_size=8).hexdigest()


def read_labels(path: Path) -> np.ndarray:
    """Read labels, uint8 [H, W], from a PNG whose pixels are class numbers (palette or grey), or from a .mat file of
    SBD.

    Raises:
        UnreadableImage: the file cannot be read, or does not hold class numbers.
    """
    try:
        if path.suffix == ".mat":
            from scipy.io import loadmat

            labels = loadmat(path, mat_dtype=True)["GTcls"][0, 0]["Segmentation"].astype(np.uint8)
        else:
            with Image.open(path, formats=FORMATS) as image:
                check_work(*image.size, b"")
                if image.mode not in ("P", "L"):
                    raise Refused(f"colours ({image.mode}) and not numbers of classes; take the file as published")
                labels = np.array(image)
    except Exception as error:  # SciPy and Pillow raise errors of many types for damaged files
        raise UnreadableImage(
            f"{path}: expected the class of every pixel, got {type(error).__name__}: {error}"
        ) from error
    strange = np.setdiff1d(labels, [*range(len(CLASSES)), IGNORED])
    if labels.ndim != 2 or len(strange):
        raise UnreadableImage(
            f"{path}: expected classes 0 to {len(CLASSES) - 1}, and {IGNORED} for what is not labelled, got"
            f" {strange[:5].tolist()}"
        )
    return labels


@dataclass(frozen=True)
class SegmentationSet:
    """The images to train on and the images to test on."""

    train: LabelledPixels
    test: LabelledPixels


def voc2012(root: Path, train: Literal["trainaug", "train"]) -> SegmentationSet:
    """PASCAL VOC 2012. The test images are the 1,449 of its list val. The training images are the 1,464 of its list
    train, or 10,582 with those of SBD.

    SBD's own lists contain images of VOC's val, which are left out. For VOC's own training images, VOC's labels are
    used instead of SBD's. A folder SegmentationClassAug with a list trainaug.txt is different: it is taken as a whole.

    Args:
        root: the folder, see LAYOUT.
        train: "trainaug", as in papers, or "train".
    Raises:
        UserError: parts are missing, or the training list has images of val. The message lists all problems and the
            expected layout.
    """
    inside = (
        "VOCdevkit/VOC2012",
        "VOC2012",
        ".",
        "VOCtrainval_11-May-2012/VOCdevkit/VOC2012",
        "VOCtrainval_11-May-2012/VOC2012",
    )
    devkits = [root / folder for folder in inside]
    top = (
        roots.first_with(devkits, "ImageSets/Segmentation/val.txt")
        or roots.first_with(devkits, "SegmentationClass")
        or devkits[0]
    )
    missing: list[str] = []
    lists = top / "ImageSets" / "Segmentation"
    own, test = (_listed(lists / f"{name}.txt", missing) for name in ("train", "val"))
    labels = top / "SegmentationClass"
    parts = _augmented(root, top, own, test, missing) if train == "trainaug" else [(own, labels)]
    train_pairs = [pair for names, folder in parts for pair in _pairs(root, top, names, folder, missing)]
    test_pairs = _pairs(root, top, test, labels, missing)
    shared = sorted({name for names, _ in parts for name in names} & set(test))
    if shared:
        missing.append(f"a training list without images of val.txt: {len(shared)} are in both, {shared[0]} for example")
    roots.refuse_missing("VOC 2012", root, missing, LAYOUT)
    return SegmentationSet(_images(root, f"voc2012/{train}", train_pairs), _images(root, "voc2012/val", test_pairs))


def _augmented(
    root: Path, top: Path, own: list[str], test: list[str], missing: list[str]
) -> list[tuple[list[str], Path]]:
    """(names, folder of their labels) pairs for the training images with those of SBD."""
    labels, converted, known = top / "SegmentationClass", top / "SegmentationClassAug", {*own, *test}
    places = [top / "ImageSets" / folder for folder in ("Segmentation", "SegmentationAug")]
    whole = next(
        (file for place in places for file in (place / "trainaug.txt", place / "train_aug.txt") if file.is_file()), None
    )
    if converted.is_dir() and whole is not None:
        return [(_listed(whole, missing), converted)]
    if converted.is_dir():
        further = sorted(file.removesuffix(".png") for file in os.listdir(converted) if file.endswith(".png"))
        return [(own, labels), ([name for name in further if name not in known], converted)]
    sbd = _sbd(root)
    if sbd is None:
        missing.append(f"{converted}, or SBD (train=train needs neither, and has 1,464 images instead of 10,582)")
        return [(own, labels)]
    further = sorted({*_listed(sbd / "train.txt", missing), *_listed(sbd / "val.txt", missing)} - known)
    return [(own, labels), (further, sbd / "cls")]


def _sbd(root: Path) -> Path | None:
    inside = ("benchmark_RELEASE/dataset", "VOCdevkit/VOCaug/dataset", "VOCaug/dataset", "dataset", "SBD", "sbd", ".")
    return roots.first_with([root / folder for folder in inside], "cls")


def _listed(file: Path, missing: list[str]) -> list[str]:
    """The names of the images in a list, which has a name a line, or the paths of an image and its labels."""
    if not file.is_file():
        missing.append(str(file))
        return []
    names = [Path(line.split()[0]).stem for line in read_text(file).splitlines() if line.strip()]
    if not names:
        missing.append(f"{file} (it is empty)")
    return names


def _pairs(root: Path, top: Path, names: list[str], labels: Path, missing: list[str]) -> list[tuple[str, str]]:
    """(image, labels) files relative to root. SBD has the photographs that VOC lacks."""
    photos, extension = top / "JPEGImages", ".mat" if labels.name == "cls" else ".png"
    lost = roots.absent(photos, [f"{name}.jpg" for name in names])
    sbd, of_sbd = _sbd(root) if lost else None, set()
    if sbd is not None:
        of_sbd = set(lost) - set(lost := roots.absent(sbd / "img", lost))
    for folder, gone in ((photos, lost), (labels, roots.absent(labels, [name + extension for name in names]))):
        if gone:
            missing.append(f"{folder} ({len(gone)} of {len(names)} files, {gone[0]} for example)")

    def photo(name: str) -> Path:
        return sbd / "img" / name if sbd is not None and name in of_sbd else photos / name

    return [
        (str(photo(f"{name}.jpg").relative_to(root)), str((labels / f"{name}{extension}").relative_to(root)))
        for name in names
    ]


def _images(root: Path, name: str, pairs: list[tuple[str, str]]) -> LabelledPixels:
    images, labels = zip(*pairs, strict=True)
    return LabelledPixels(ImageFiles(root, images, name=name), ImageFiles(root, labels, name=f"{name}/labels"))
