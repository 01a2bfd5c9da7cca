"""Functions that read image sets from disk or from installed packages; each returns `Splits`."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from caco.data.sets.choosing import choose
from caco.data.sets.class_folders import (
    class_folders,
    existing_folder,
    read_class_list,
    require_folders,
    require_known,
    unlabelled_images,
)
from caco.data.sets.image_files import ImageFiles
from caco.data.sets.imagenet100 import IMAGENET100_CLASSES
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.sources import Source, Splits, holds
from caco.data.sets.walking import folders_in
from caco.errors import FileError, UserError
from caco.ranges import AboveZero, Count, Finite, Natural, NumChannels, Pixels, ProperShare, Seed
from caco.runs.paths import expanded, read_text


@holds(1_400)
def digits(
    *, size: Pixels = 16, limit: Count | None = None, validation_fraction: ProperShare | None = None, seed: Seed = 0
) -> Splits:
    """scikit-learn's digits: 1,797 real scans of 8 x 8 pixels, inside its wheel; 1,400 for training, 397 for testing.

    Args:
        size: side in pixels to which the scans are enlarged once (bicubic).
        seed: seed of the split into training and test images, which is stratified by class.
        limit, validation_fraction: see `folder`.
    Raises:
        UserError: size is below 8.
    """
    from sklearn.datasets import load_digits

    if size < 8:
        raise UserError(f"data.size: expected at least the scans' own 8 pixels, got {size}")
    scans = load_digits()
    gray = np.round(scans.images * (255 / 16)).astype(np.uint8)
    larger = [Image.fromarray(scan).resize((size, size), Image.Resampling.BICUBIC) for scan in gray]
    images = np.stack([np.asarray(scan.convert("RGB")) for scan in larger])
    every = ImagesInMemory(images, name="digits", labels=scans.target, classes=[str(digit) for digit in range(10)])
    chosen = choose(every.labels, 397, len(every), seed=seed, balanced=False)
    train = every.part(np.setdiff1d(np.arange(len(every)), chosen), "digits/train")
    test = every.part(chosen, "digits/test")
    return reduced(train, test, name="digits", limit=limit, validation_fraction=validation_fraction, seed=seed)


def photo_tiles(
    *, size: Pixels = 32, limit: Count | None = None, validation_fraction: ProperShare | None = None, seed: Seed = 0
) -> Splits:
    """Square tiles of the two colour photographs inside scikit-learn's wheel, a temple and a flower. Tiles of 32 pixels
    are 416 for training and 104 for testing. This set only shows that a method runs, for methods that need larger
    images or more colour than digits have.

    Args:
        size: side of a tile in pixels, 8 to 128.
        seed: seed of the split into training and test tiles, which is stratified by photograph.
        limit, validation_fraction: see `folder`.
    Raises:
        UserError: size is out of its range.
    """
    from sklearn.datasets import load_sample_images

    if not 8 <= size <= 128:
        raise UserError(f"data.size: expected a tile of 8 to 128 pixels a side, got {size}")
    photos = load_sample_images().images
    down, across = (side // size for side in photos[0].shape[:2])
    tiles = np.concatenate(
        [
            photo[: down * size, : across * size]
            .reshape(down, size, across, size, 3)
            .swapaxes(1, 2)
            .reshape(-1, size, size, 3)
            for photo in photos
        ]
    )
    label = np.repeat(np.arange(2), down * across)
    every = ImagesInMemory(tiles, name="photo_tiles", labels=label, classes=["temple", "flower"])
    chosen = choose(every.labels, len(every) // 5, len(every), seed=seed, balanced=False)
    train = every.part(np.setdiff1d(np.arange(len(every)), chosen), "photo_tiles/train")
    test = every.part(chosen, "photo_tiles/test")
    return reduced(train, test, name="photo_tiles", limit=limit, validation_fraction=validation_fraction, seed=seed)


def folder(
    *,
    root: str | None,
    name: str = "folder",
    labelled_root: str | None = None,
    class_list: str | None = None,
    limit: Count | None = None,
    validation_fraction: ProperShare | None = None,
    seed: Seed = 0,
    in_memory_mb: Natural = 256,
    channels: NumChannels | None = None,
    mean: list[Finite] | None = None,
    std: list[AboveZero] | None = None,
) -> Splits:
    """Any folder of images, with or without class folders.

    Possible layouts of `root`: train/ with test/ (or val/), each of class folders; class folders alone; images alone,
    which have no labels. If test/ and val/ both hold class folders, test/ is used.

    Args:
        root: the folder.
        name: name of the set in messages.
        labelled_root: if given, pre-train on all images below `root`, whatever their folders, and evaluate on this
            labelled folder.
        class_list: a text file with the name of one class folder a line; only these classes are read.
        limit: number of training images, drawn equally from the classes.
        validation_fraction: hold this share of the training images out and evaluate on it instead of on the test
            images, to tune a recipe without seeing the test images. It is drawn before `limit`, so it is the same for
            every limit.
        seed: seed of both draws.
        in_memory_mb: keep a split's decoded images in memory if they take no more than this; 0 never does.
        channels: number of channels of images to read as they are stored, among them .npy files; None reads photographs
            as 8-bit RGB.
        mean, std: mean and standard deviation of each channel, with unsigned integers scaled to 0..1; None has them
            measured on the training images.
    Raises:
        FileError: no root was given, or nothing is there.
        UserError: there is no image, an image cannot be read, a class is unknown, or mean and std do not fit channels.
    """
    require_statistics_of(channels, mean, std)
    top = existing_root(root, example=f"data={name}")
    if labelled_root is None:
        train, test = _read_layout(top, name, class_list, channels)
        splits = _finish(train, test, name, limit, validation_fraction, seed, in_memory_mb)
        return dataclasses.replace(splits, mean=mean, std=std)
    unlabelled = unlabelled_images(top / "train" if (top / "train").is_dir() else top, f"{name}/unlabelled", channels)
    pretrain = limited(unlabelled, limit, seed=seed)
    train, test = _read_layout(
        existing_root(labelled_root, example=f"data={name}"), f"{name}/labelled", class_list, channels
    )
    if train.labels is None:
        raise UserError(f"data.labelled_root: expected class folders below {labelled_root}, got images without labels")
    labelled = _finish(train, test, f"{name}/labelled", None, validation_fraction, seed, in_memory_mb)
    return Splits(pretrain.in_memory(in_memory_mb), labelled.train, labelled.test, mean, std)


def require_statistics_of(channels: int | None, mean: list[float] | None, std: list[float] | None) -> None:
    """Raises UserError unless `mean` and `std` are both None or both have a value for each channel."""
    if (mean is None) != (std is None) or (
        mean is not None and (channels is None or not len(mean) == len(std or ()) == channels)
    ):
        raise UserError(
            f"data.mean and data.std: expected both, with a value for each of data.channels={channels}, or neither, so"
            f" that they are measured; got {mean} and {std}"
        )


def images(*, root: str | None, channels: NumChannels | None = None) -> Splits:
    """All images below a folder, whatever their folders are called, without labels and in the order of their names.

    Args:
        root: the folder.
        channels: as in `folder`.
    Raises:
        FileError: no root was given, or nothing is there.
        UserError: there is no image.
    """
    return Splits(unlabelled_images(existing_root(root, example="data=images"), "images", channels), None, None)


@holds(50_000)
def cifar10_jpeg75(
    *, root: str | None, limit: Count | None = None, validation_fraction: ProperShare | None = None, seed: Seed = 0
) -> Splits:
    """CIFAR-10 re-encoded as JPEG (quality 75, 4:2:0) and unpacked: train/ and test/ of class folders. Its pixels
    differ from CIFAR-10's, so results differ too.

    Args:
        root, limit, validation_fraction, seed: as in `folder`.
    """
    return folder(
        root=root,
        name="cifar10-jpeg75",
        limit=limit,
        validation_fraction=validation_fraction,
        seed=seed,
        in_memory_mb=256,
    )


@holds(1_281_167)
def imagenet(
    *,
    root: str | None,
    class_list: str | None = None,
    limit: Count | None = None,
    validation_fraction: ProperShare | None = None,
    seed: Seed = 0,
) -> Splits:
    """ImageNet (ILSVRC 2012): train/<wnid>/*.JPEG and val/<wnid>/*.JPEG; 1,281,167 and 50,000 images.

    Args:
        root, class_list, limit, validation_fraction, seed: as in `folder`.
    """
    names = None if class_list is None else read_class_list(class_list)
    return _imagenet(existing_root(root, example="data=imagenet"), "imagenet", names, limit, validation_fraction, seed)


def imagenet100(
    *, root: str | None, limit: Count | None = None, validation_fraction: ProperShare | None = None, seed: Seed = 0
) -> Splits:
    """The 100 ImageNet classes of CMC (arXiv 1906.05849), read from a copy of ImageNet; 5,000 validation images.

    Args:
        root, limit, validation_fraction, seed: as in `folder`.
    """
    top = existing_root(root, example="data=imagenet100")
    return _imagenet(top, "imagenet100", list(IMAGENET100_CLASSES), limit, validation_fraction, seed)


@holds(100_000)
def tiny_imagenet(
    *,
    root: str | None,
    limit: Count | None = None,
    validation_fraction: ProperShare | None = None,
    seed: Seed = 0,
    in_memory_mb: Natural = 2048,
) -> Splits:
    """Tiny-ImageNet as unpacked: train/<wnid>/images/*.JPEG, val/images/ with val_annotations.txt; 64 px, 200 classes.

    100,000 training images and 10,000 validation images, which serve as test images. Its test/ has no labels and is not
    read.
    Args:
        root, limit, validation_fraction, seed, in_memory_mb: as in `folder`.
    """
    top = existing_root(root, example="data=tiny_imagenet")
    train = class_folders(existing_folder(top / "train"), "tiny-imagenet/train")
    annotations = top / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise FileError(f"expected the validation labels in {annotations}, got no such file: unpack the set again")
    rows = sorted(line.split("\t")[:2] for line in read_text(annotations).splitlines() if line.strip())
    if wrong := [row for row in rows if len(row) != 2]:
        raise UserError(
            f"{annotations}: expected lines like `val_0.JPEG<tab>n03444034<tab>...`, got {wrong[0][0][:80]!r}: unpack"
            " the set again"
        )
    classes = train.classes or []
    require_known(sorted({wnid for _, wnid in rows}), classes, where=str(annotations))
    number = {wnid: i for i, wnid in enumerate(classes)}
    test = ImageFiles(
        top / "val" / "images",
        [file for file, _ in rows],
        name="tiny-imagenet/val",
        labels=np.array([number[wnid] for _, wnid in rows]),
        classes=train.classes,
    )
    return _finish(train, test, "tiny-imagenet", limit, validation_fraction, seed, in_memory_mb)


def existing_root(root: str | None, *, example: str) -> Path:
    """The root as a path.

    Args:
        example: the setting that chose the data set, for the error message.
    Raises:
        FileError: no root was given, or it is not a folder; the message shows how to give one.
    """
    got = "got none" if root is None else f"got {root}, which is not a folder"
    if root is None or not expanded(root).is_dir():
        raise FileError(
            f"{example} needs images: expected data.root=PATH, a folder on this machine, {got}.\n"
            "Without any data, preset=demo learns from scikit-learn's digits, which need none."
        )
    return expanded(root)


def reduced(
    train: Source, test: Source | None, *, name: str, limit: int | None, validation_fraction: float | None, seed: int
) -> Splits:
    """Splits that pre-train on `train`. First `validation_fraction` of it is held out and replaces `test`; then the
    rest is cut to `limit` images.

    Raises:
        UserError: validation_fraction or limit is out of its range.
    """
    if validation_fraction is not None:
        count = round(validation_fraction * len(train))
        if not 0 < validation_fraction < 1 or not 0 < count < len(train):
            raise UserError(
                f"data.validation_fraction: expected a share in (0, 1) of the {len(train)} images, got"
                f" {validation_fraction}"
            )
        held_out = choose(train.labels, count, len(train), seed=seed, balanced=False)
        test = train.part(held_out, f"{name}/validation")
        train = train.part(np.setdiff1d(np.arange(len(train)), held_out), train.name)
    train = limited(train, limit, seed=seed)
    return Splits(train, train if train.labels is not None else None, test)


def limited(source: Source, limit: int | None, *, seed: int) -> Source:
    """`limit` of the images, equally many of each class; all images for None. Raises UserError out of 1..N."""
    if limit is None:
        return source
    if not 1 <= limit <= len(source):
        raise UserError(f"data.limit: expected a number of images in 1..{len(source)}, got {limit}")
    return source.part(choose(source.labels, limit, len(source), seed=seed, balanced=True), source.name)


def _finish(
    train: ImageFiles,
    test: ImageFiles | None,
    name: str,
    limit: int | None,
    validation_fraction: float | None,
    seed: int,
    in_memory_mb: int,
) -> Splits:
    splits = reduced(train, test, name=name, limit=limit, validation_fraction=validation_fraction, seed=seed)
    return in_memory(splits, in_memory_mb)


def in_memory(splits: Splits, max_mb: int) -> Splits:
    """The same splits, each decoded once if it takes at most `max_mb`. The images to pre-train on also serve as
    labelled training images, if they have labels.
    """
    pretrain = splits.pretrain.in_memory(max_mb)
    held_out = None if splits.test is None else splits.test.in_memory(max_mb)
    return Splits(pretrain, pretrain if pretrain.labels is not None else None, held_out)


def _imagenet(
    top: Path, name: str, classes: list[str] | None, limit: int | None, validation_fraction: float | None, seed: int
) -> Splits:
    train = class_folders(existing_folder(top / "train"), f"{name}/train", classes)
    validation = existing_folder(top / "val")
    if not folders_in(validation):
        wanted = "expected class folders, got images without labels: sort them into val/<wnid>/ first"
        raise UserError(f"{validation}: {wanted}")
    require_folders(validation, train)
    test = class_folders(validation, f"{name}/val", train.classes)
    return reduced(train, test, name=name, limit=limit, validation_fraction=validation_fraction, seed=seed)


def _read_layout(
    top: Path, name: str, class_list: str | None, channels: int | None
) -> tuple[ImageFiles, ImageFiles | None]:
    classes = None if class_list is None else read_class_list(class_list)
    split = (top / "train").is_dir()
    below = top / "train" if split else top
    train_name = f"{name}/train" if split else name
    if not folders_in(below):
        if classes is not None:
            raise UserError(f"data.class_list: expected class folders in {below}, got images without labels")
        return unlabelled_images(below, train_name, channels), None
    train = class_folders(below, train_name, classes, channels)
    for held_out in ("test", "val") if split else ():
        if (top / held_out).is_dir() and folders_in(top / held_out):
            subfolders = folders_in(top / held_out)
            if classes is None:
                require_known(subfolders, train.classes or [], where=str(below))
            require_folders(top / held_out, train)
            return train, class_folders(top / held_out, f"{name}/{held_out}", train.classes, channels)
    return train, None
