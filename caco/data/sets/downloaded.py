"""The sets that torchvision can download: CIFAR-10, CIFAR-100, STL-10 and Fashion-MNIST (which Debian packages too)."""

import gzip
import socket
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from caco.data.sets.folders import limited, reduced
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.sources import Splits, holds
from caco.errors import FileError, UserError
from caco.ranges import Count, ProperShare, Seed
from caco.runs.files import locked
from caco.runs.paths import expanded

CONNECT_TIMEOUT_SECONDS = 20
FASHION_OF_DEBIAN = "/usr/share/datasets/fashion-mnist"  # the folder of Debian's package dataset-fashion-mnist
_MOST_BYTES = 2**28  # limit for an unpacked file of Fashion-MNIST: five times the size of the largest one
FETCH_PATIENCE_S = 6 * 3600  # longest wait for another process that downloads the set: STL-10 over a slow line


@holds(50_000)
def cifar10(
    *,
    root: str | None,
    download: bool = True,
    limit: Count | None = None,
    validation_fraction: ProperShare | None = None,
    seed: Seed = 0,
) -> Splits:
    """CIFAR-10 as published (the Python version): 50,000 training and 10,000 test images of 32 pixels.

    Args:
        root: the folder that has cifar-10-batches-py/, or to which it is downloaded.
        download: download the set if it is not there.
        limit, validation_fraction, seed: see caco.data.sets.folders.folder.
    Raises:
        FileError: the set is not there and cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, "cifar10", root, download, limit, validation_fraction, seed)


@holds(50_000)
def cifar100(
    *,
    root: str | None,
    download: bool = True,
    limit: Count | None = None,
    validation_fraction: ProperShare | None = None,
    seed: Seed = 0,
) -> Splits:
    """CIFAR-100 with its fine labels: 50,000 training and 10,000 test images of 32 pixels.

    Args:
        root: the folder that has cifar-100-python/, or to which it is downloaded.
        download, limit, validation_fraction, seed: as in `cifar10`.
    Raises:
        FileError: the set is not there and cannot be downloaded.
    """
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, "cifar100", root, download, limit, validation_fraction, seed)


@holds(100_000)
def stl10(
    *,
    root: str | None,
    pretrain: Literal["unlabeled", "train"] = "unlabeled",
    download: bool = True,
    limit: Count | None = None,
    validation_fraction: ProperShare | None = None,
    seed: Seed = 0,
) -> Splits:
    """STL-10, 96 pixels: pre-train on its 100,000 unlabelled images, evaluate with its 5,000 labelled training and
    8,000 test images.

    Args:
        pretrain: the images to pre-train on.
        limit: number of images to pre-train on.
        validation_fraction: hold this share of the labelled training images out and use it instead of the test images.
        root, download, seed: see `cifar10`.
    Raises:
        FileError: the set is not there and cannot be downloaded.
    """
    from torchvision.datasets import STL10

    if pretrain not in ("unlabeled", "train"):
        raise UserError(f"data.pretrain: expected unlabeled or train, got {pretrain!r}")
    train, test = (
        ImagesInMemory(part.data.transpose(0, 2, 3, 1), name=f"stl10/{split}", labels=part.labels, classes=part.classes)
        for split, part in _open(
            "stl10", root, download, lambda **where: {s: STL10(split=s, **where) for s in ("train", "test")}
        )
    )
    if pretrain == "train":
        return reduced(train, test, name="stl10", limit=limit, validation_fraction=validation_fraction, seed=seed)
    labelled = reduced(train, test, name="stl10", limit=None, validation_fraction=validation_fraction, seed=seed)
    # 2.8 GB, mapped so that all processes of a machine share it. The file stores each image column by column.
    assert root is not None, "_open has refused it"
    file = expanded(root) / STL10.base_folder / STL10.train_list[2][0]
    images = np.memmap(file, np.uint8, mode="r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    unlabelled = ImagesInMemory(images, name="stl10/unlabeled")
    return replace(labelled, pretrain=limited(unlabelled, limit, seed=seed))


@holds(60_000)
def fashion_mnist(
    *,
    root: str | None = FASHION_OF_DEBIAN,
    download: bool = True,
    limit: Count | None = None,
    validation_fraction: ProperShare | None = None,
    seed: Seed = 0,
) -> Splits:
    """Fashion-MNIST: 60,000 training and 10,000 test photographs of clothes, grey, 28 pixels, ten classes. The grey is
    repeated as red, green and blue.

    Args:
        root: a folder with the four published files (train-images-idx3-ubyte.gz, ...), as Debian's package has them; or
            the folder that has FashionMNIST/raw/, or to which torchvision downloads it.
        download: download the set if it is not there; never into the folder of Debian's package.
        limit, validation_fraction, seed: see caco.data.sets.folders.folder.
    Raises:
        FileError: the set is not there and cannot be downloaded, or a file is damaged.
    """
    from torchvision.datasets import FashionMNIST

    top = None if root is None else expanded(root)
    if top is not None and (top / "train-images-idx3-ubyte.gz").is_file():
        parts = [
            (split, _idx(top, prefix, "images", 3), _idx(top, prefix, "labels", 1))
            for split, prefix in (("train", "train"), ("test", "t10k"))
        ]
        for split, grey, labels in parts:
            if len(grey) != len(labels) or not len(labels) or labels.max() >= len(FashionMNIST.classes):
                raise FileError(
                    f"data=fashion_mnist: expected a label from 0 to 9 for each image of {split} in {top}, got"
                    f" {len(grey):,} images and {len(labels):,} labels up to {labels.max(initial=0)}; install or"
                    " download the files again"
                )
    elif root == FASHION_OF_DEBIAN:
        raise FileError(
            f"data=fashion_mnist: expected its files in {root}, where Debian's package puts them (apt install"
            " dataset-fashion-mnist), or data.root=PATH, a folder that holds them or that they are fetched into; got"
            " neither"
        )
    else:
        opened = _open(
            "fashion_mnist",
            root,
            download,
            lambda **where: {s: FashionMNIST(train=s == "train", **where) for s in ("train", "test")},
        )
        parts = [(split, part.data.numpy(), part.targets.numpy()) for split, part in opened]
    train, test = (
        ImagesInMemory(
            np.repeat(grey[..., None], 3, 3),
            name=f"fashion_mnist/{split}",
            labels=labels.astype(np.int64),
            classes=FashionMNIST.classes,
        )
        for split, grey, labels in parts
    )
    return reduced(train, test, name="fashion_mnist", limit=limit, validation_fraction=validation_fraction, seed=seed)


def _idx(top: Path, prefix: str, kind: str, dimensions: int) -> np.ndarray:
    """Read one file in MNIST's format: the bytes 0, 0, 8 and the number of dimensions, each size in four bytes, and
    then the values, which are returned as an array uint8.

    Raises:
        FileError: the file is missing or has another format.
    """
    path = top / f"{prefix}-{kind}-idx{dimensions}-ubyte.gz"
    try:
        with gzip.open(path) as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it unpacks to more than {_MOST_BYTES:,} bytes")
        shape = np.frombuffer(content, ">i4", dimensions, offset=4)
        if content[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"its first bytes are {content[:4]!r}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise FileError(
            f"data=fashion_mnist: {path} is not the published file of Fashion-MNIST ({error}); install or download"
            " it again"
        ) from error


def _cifar(
    dataset: Callable[..., Any],
    name: str,
    root: str | None,
    download: bool,
    limit: int | None,
    validation_fraction: float | None,
    seed: int,
) -> Splits:
    train, test = (
        ImagesInMemory(part.data, name=f"{name}/{split}", labels=np.array(part.targets), classes=part.classes)
        for split, part in _open(
            name, root, download, lambda **where: {s: dataset(train=s == "train", **where) for s in ("train", "test")}
        )
    )
    return reduced(train, test, name=name, limit=limit, validation_fraction=validation_fraction, seed=seed)


def _open(name: str, root: str | None, download: bool, read: Callable[..., dict[str, Any]]) -> list[tuple[str, Any]]:
    """The parts that `read(root=, download=)` gives. If they are missing, one process at a time downloads them first.

    Raises:
        FileError: no root was given, or the parts are missing and cannot be downloaded.
    """
    if root is None:
        raise FileError(
            f"data={name} needs its files: expected data.root=PATH, a folder that holds them or where to put them, got"
            " none.\nWithout any data, preset=demo learns from scikit-learn's digits, which need none."
        )
    top = expanded(root)
    try:
        return list(read(root=top, download=False).items())
    except RuntimeError as error:
        problem: Exception = error
    if download:
        try:
            return list(_fetch(top, read).items())
        except (OSError, RuntimeError) as error:
            problem = error
    raise FileError(
        f"data={name}: expected its files below data.root={root}, or a network to fetch them; got"
        f" {type(problem).__name__}: {' '.join(str(problem).split())}.\nWhere there is no network, fetch the set"
        " elsewhere and point data.root to it; preset=demo needs no data."
    ) from problem


def _fetch(top: Path, read: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    top.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    with locked(top / ".download.lock", wait_s=FETCH_PATIENCE_S):
        socket.setdefaulttimeout(
            CONNECT_TIMEOUT_SECONDS
        )  # torchvision sets no time limit, and a firewall that drops packets would block it for minutes
        try:
            return read(root=top, download=True)
        finally:
            socket.setdefaulttimeout(before)
