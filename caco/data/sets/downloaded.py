"""The sets that torchvision can fetch: CIFAR-10, CIFAR-100, STL-10."""

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from caco.data.sets.folders import limited, reduced
from caco.data.sets.sources import ImagesInMemory, Splits, holds
from caco.errors import FileError, UserError
from caco.ranges import Count, ProperShare, Seed
from caco.runs.files import locked
from caco.runs.paths import expanded

CONNECT_TIMEOUT_SECONDS = 20
FETCH_PATIENCE_S = 6 * 3600  # for another process to fetch the set: STL-10 over a slow line


@holds(50_000)
def cifar10(
    *,
    root: str | None,
    download: bool = True,
    limit: Count | None = None,
    validation_fraction: ProperShare | None = None,
    seed: Seed = 0,
) -> Splits:
    """CIFAR-10 as published (the Python version): 50,000 and 10,000 images of 32 px.

    Args:
        root: where cifar-10-batches-py/ is, or where it is put.
        download: fetch it if it is not there.
        limit, validation_fraction, seed: see caco.data.sets.folders.folder.
    Raises:
        FileError: it is not there and cannot be fetched.
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
    """CIFAR-100 with its fine labels; arguments as of `cifar10`."""
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
    """STL-10, 96 px: pre-train on its 100,000 unlabelled images, evaluate with its 5,000 and 8,000 labelled ones.

    Args:
        pretrain: the images to pre-train on.
        limit: how many of them.
        validation_fraction: hold out this share of the labelled training images in place of the test images.
        root, download, seed: see `cifar10`.
    Raises:
        FileError: it is not there and cannot be fetched.
    """
    from torchvision.datasets import STL10

    if pretrain not in ("unlabeled", "train"):
        raise UserError(f"data.pretrain: expected unlabeled or train, got {pretrain!r}")
    train, test = (
        ImagesInMemory(part.data.transpose(0, 2, 3, 1), name=f"stl10/{split}", labels=part.labels, classes=part.classes)
        for split, part in _open("stl10", root, download, lambda **where: {s: STL10(split=s, **where) for s in ("train", "test")})
    )
    if pretrain == "train":
        return reduced(train, test, name="stl10", limit=limit, validation_fraction=validation_fraction, seed=seed)
    labelled = reduced(train, test, name="stl10", limit=None, validation_fraction=validation_fraction, seed=seed)
    # Mapped, not read: 2.8 GB that all processes of a machine share. An image lies in the file column by column.
    assert root is not None, "_open has refused it"
    file = expanded(root) / STL10.base_folder / STL10.train_list[2][0]
    images = np.memmap(file, np.uint8, mode="r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    unlabelled = ImagesInMemory(images, name="stl10/unlabeled")
    return replace(labelled, pretrain=limited(unlabelled, limit, seed=seed))


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
    """The parts that `read(root=, download=)` gives, fetched first where they are missing, by one process at a time."""
    if root is None:
        raise FileError(
            f"data={name} needs its files: expected data.root=PATH, a folder that holds them or where to put them, got none.\n"
            "Without any data, preset=demo learns from scikit-learn's digits, which need none."
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
        f"data={name}: expected its files below data.root={root}, or a network to fetch them; got {type(problem).__name__}: "
        f"{problem}.\nWhere there is no network, fetch the set elsewhere and point data.root to it; preset=demo needs no data."
    ) from problem


def _fetch(top: Path, read: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    top.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    with locked(top / ".download.lock", wait_s=FETCH_PATIENCE_S):
        socket.setdefaulttimeout(CONNECT_TIMEOUT_SECONDS)  # torchvision sets none: a silent firewall would hold it for minutes
        try:
            return read(root=top, download=True)
        finally:
            socket.setdefaulttimeout(before)
