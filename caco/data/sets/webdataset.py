"""WebDataset shards: tar files of samples. The webdataset library groups the samples; caco reads them by position."""

import dataclasses
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from caco.data.sets.encoded import EncodedImages
from caco.data.sets.folders import existing_root, in_memory, reduced, require_statistics_of
from caco.data.sets.labels import whole_labels
from caco.data.sets.reading import EXTENSIONS
from caco.data.sets.sources import Splits
from caco.data.sets.stored import EXTENSIONS as STORED
from caco.errors import FileError, UserError
from caco.installed import is_installed, to_install
from caco.ranges import AboveZero, Count, Finite, Natural, NumChannels, ProperShare, Seed
from caco.runs.directory import is_first_rank
from caco.saying import Sometimes, counting, doing

_TESTS = ("test", "val", "validation", "valid")


def webdataset(
    *,
    root: str | None,
    label: str | None = "cls",
    limit: Count | None = None,
    validation_fraction: ProperShare | None = None,
    seed: Seed = 0,
    in_memory_mb: Natural = 256,
    channels: NumChannels | None = None,
    mean: list[Finite] | None = None,
    std: list[AboveZero] | None = None,
) -> Splits:
    """A folder of uncompressed tar files: train/*.tar and test/*.tar (or val/), or train-*.tar and test-*.tar, or any
    *.tar to train on.

    The shards are ordered by name. A sample consists of the files with the same name up to the extension, and has one
    image. Samples are read by position, in any order, and not as a stream, so the shards have to be on a disk.

    Args:
        root: the folder.
        label: where a sample's class, a whole number, is found. An extension such as cls names a file of the sample;
            json:KEY names a key in the sample's .json file; null means no labels.
        limit, validation_fraction, seed, in_memory_mb, channels, mean, std: as in `folder`.
    Raises:
        FileError: no root was given, no shards are there, or one is not a tar file.
        UserError: webdataset is not installed, or a sample has no image or no label.
    """
    require_statistics_of(channels, mean, std)
    top = existing_root(root, example="data=webdataset")
    if not is_installed("webdataset"):
        raise UserError(f"data=webdataset: WebDataset is not installed{to_install(package='webdataset')}")
    train_shards, test_shards, test_name = _shards(top)
    extensions = EXTENSIONS if channels is None else EXTENSIONS + STORED
    with doing(f"listing the contents of the shards below {top}"):
        train = _source(train_shards, top, "webdataset/train", label, extensions, channels)
        test = (
            None
            if not test_shards
            else _source(test_shards, top, f"webdataset/{test_name}", label, extensions, channels)
        )
    splits = reduced(train, test, name="webdataset", limit=limit, validation_fraction=validation_fraction, seed=seed)
    return dataclasses.replace(in_memory(splits, in_memory_mb), mean=mean, std=std)


def _shards(top: Path) -> tuple[list[Path], list[Path], str]:
    for pattern in ("{}/*.tar", "{}-*.tar"):
        train = sorted(top.glob(pattern.format("train")))
        if train:
            test_name = next((name for name in _TESTS if any(top.glob(pattern.format(name)))), "test")
            return train, sorted(top.glob(pattern.format(test_name))), test_name
    every = sorted(top.glob("*.tar"))
    if not every:
        packed = ", ".join(sorted({path.name for path in top.glob("*.tar.*")})[:3])
        raise FileError(
            f"{top}: expected *.tar, or train/*.tar and test/*.tar, got none"
            + (f" but {packed}: unpack them to .tar" if packed else "")
        )
    return every, [], "test"


def _source(
    shards: list[Path], top: Path, name: str, label: str | None, extensions: tuple[str, ...], channels: int | None
) -> EncodedImages:
    from webdataset.tariterators import group_by_keys

    places, names, labels = [], list[bytes](), list[int]()
    endings = tuple(extension.removeprefix(".") for extension in extensions)
    count = counting(Sometimes(is_first_rank()), f"shards of {name} whose contents are listed", len(shards))
    for number, shard in enumerate(shards):
        for sample in group_by_keys(_members(shard)):
            called = f"{shard.relative_to(top)}/{sample['__key__']}"
            images = [key for key in sample if not key.startswith("__") and key.rpartition(".")[2] in endings]
            if len(images) != 1:
                raise UserError(
                    f"{called}: expected one image ({', '.join(endings)}) in each sample, got"
                    f" {', '.join(images) or 'none'}"
                )
            places.append((number, *sample[images[0]]))
            names.append(f"{called}.{images[0]}".encode())
            if label is not None:
                labels.append(_label(shard, sample, label, called))
        count(1)
    place = np.array(places, np.int64).reshape(-1, 3)
    if not len(place):
        raise UserError(f"{shards[0]}: expected samples with images in it, got none")

    def content(position: int) -> bytes:
        number, first, size = place[position].tolist()
        return _read(shards[number], first, size)

    return EncodedImages(
        content,
        np.array(names),
        name=name,
        labels=None if label is None else whole_labels(labels, name),
        channels=channels,
    )


def _members(shard: Path) -> Iterator[dict[str, Any]]:
    """For each file of a shard, its name and the place of its content, (first byte, number of bytes). webdataset groups
    these as if the places were contents.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg():
                    yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": str(shard)}
                tar.members = []  # type: ignore[attr-defined] # as WebDataset does; tarfile would keep all of them
    except (tarfile.TarError, OSError) as error:
        raise FileError(f"{shard}: expected an uncompressed tar file, got {type(error).__name__}: {error}") from error


def _label(shard: Path, sample: dict[str, Any], label: str, called: str) -> int:
    ending, _, key = label.partition(":")
    if ending not in sample:
        raise UserError(
            f"{called}: expected its label in {called}.{ending}, got none: data.label=ENDING names another,"
            " data.label=null does without"
        )
    text = _read(shard, *sample[ending])
    try:
        given = json.loads(text)[key] if key else text
        number = int(given)
        if isinstance(given, bool) or (isinstance(given, float) and given != number):
            raise ValueError(f"{given} is no class's number")
        return number
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise UserError(
            f"{called}.{ending}: expected a whole number{f' as its {key}' if key else ''}, got {text[:40]!r}"
        ) from error


def _read(shard: Path, first: int, size: int) -> bytes:
    descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, first)
    finally:
        os.close(descriptor)
