"""Hugging Face `datasets` that were saved to a folder (`save_to_disk`) and are read with that library."""

import dataclasses
from typing import Any

import numpy as np

from caco.data.sets.encoded import EncodedImages
from caco.data.sets.folders import existing_root, in_memory, reduced, require_statistics_of
from caco.data.sets.labels import whole_labels
from caco.data.sets.sources import Splits
from caco.errors import FileError, UserError, of_the_machine
from caco.installed import is_installed, to_install
from caco.ranges import AboveZero, Count, Finite, Natural, NumChannels, ProperShare, Seed
from caco.saying import doing

_TESTS = ("test", "validation", "val", "valid")


def huggingface(
    *,
    root: str | None,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: Count | None = None,
    validation_fraction: ProperShare | None = None,
    seed: Seed = 0,
    in_memory_mb: Natural = 256,
    channels: NumChannels | None = None,
    mean: list[Finite] | None = None,
    std: list[AboveZero] | None = None,
) -> Splits:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote. From a dictionary, the part train is
    used, and as test images the part test or validation.

    Args:
        root: the folder.
        image_column: the column of encoded images (feature Image); None takes the only such column.
        label_column: the column of labels, which are whole numbers, class labels or texts. None takes `label`, or the
            only column of class labels; if there is neither, there are no labels.
        limit, validation_fraction, seed, in_memory_mb, channels, mean, std: as in `folder`.
    Raises:
        FileError: no root was given, or nothing saved in this way is there.
        UserError: `datasets` is not installed, or a column does not exist or is unsuitable.
    """
    require_statistics_of(channels, mean, std)
    top = existing_root(root, example="data=huggingface")
    if not is_installed("datasets"):
        raise UserError(f"data=huggingface: Hugging Face's datasets is not installed{to_install(package='datasets')}")
    with doing("loading Hugging Face's datasets"):
        import datasets

    try:
        # After flatten_indices the rows of the tables are in the order of the positions.
        read: Any = datasets.load_from_disk(str(top)).flatten_indices()
    except FileNotFoundError as error:
        raise FileError(
            f"data.root: expected a folder that datasets' save_to_disk wrote, got {top}: {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # pyarrow and datasets raise errors of any type if a file is damaged
        if of_the_machine(error) is not None:
            raise
        got = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise FileError(
            f"data.root: {top} holds a data set that cannot be opened ({got}): save or copy it again"
        ) from error
    parts: dict[str, Any] = dict(read) if isinstance(read, datasets.DatasetDict) else {"train": read}
    if "train" not in parts:
        raise UserError(f"{top}: expected a part called train, got {', '.join(parts)}")
    columns = image_column, label_column, channels
    name = next((name for name in _TESTS if name in parts), None)
    with doing(f"opening the data set in {top}"):
        train = _source(parts["train"], "huggingface/train", *columns)
        test = None if name is None else _source(parts[name], f"huggingface/{name}", *columns)
    if test is not None and (test.classes or []) != (train.classes or []):
        raise UserError(f"{top}: expected the same classes in train and {name}, got {train.classes} and {test.classes}")
    splits = reduced(train, test, name="huggingface", limit=limit, validation_fraction=validation_fraction, seed=seed)
    return dataclasses.replace(in_memory(splits, in_memory_mb), mean=mean, std=std)


def _source(
    read: Any, name: str, image_column: str | None, label_column: str | None, channels: int | None
) -> EncodedImages:
    import datasets

    image_column = _column(read, image_column, "image_column", datasets.Image)
    labels, classes = _labels(read, label_column)
    # The table is on the disk and mapped into memory: nothing is decoded or copied before an image is read.
    table = read.cast_column(image_column, datasets.Image(decode=False)).data.column(image_column)
    firsts = np.cumsum([0, *(len(chunk) for chunk in table.chunks)])

    def content(position: int) -> Any:
        chunk = int(np.searchsorted(firsts, position, side="right")) - 1
        cell = table.chunk(chunk)[position - int(firsts[chunk])]
        encoded = cell["bytes"].as_buffer() if cell.is_valid and cell["bytes"].is_valid else None
        if encoded is not None:
            return memoryview(encoded)
        path = cell["path"].as_py() if cell.is_valid else None
        if path is None:
            raise FileNotFoundError(0, "neither an image nor the path of one")
        with open(path, "rb") as file:
            return file.read()

    names = np.array([f"{name} row {row}".encode() for row in range(len(read))])
    return EncodedImages(content, names, name=name, labels=labels, classes=classes, channels=channels)


def _column(read: Any, given: str | None, setting: str, kind: type) -> str:
    fitting = [name for name, feature in read.features.items() if isinstance(feature, kind)]
    if given in fitting or (given is None and len(fitting) == 1):
        return given or fitting[0]
    got = "none" if not fitting else ", ".join(fitting)
    raise UserError(
        f"data.{setting}: expected the name of a column of {kind.__name__}s, of which there are: {got}; got {given}"
    )


def _labels(read: Any, given: str | None) -> tuple[np.ndarray | None, list[str] | None]:
    """Class numbers, int64 [N], and class names; each of them may be None."""
    import datasets

    if given is not None and given not in read.features:
        raise UserError(f"data.label_column: expected one of {', '.join(read.features)}, got {given}")
    of_classes = [name for name, feature in read.features.items() if isinstance(feature, datasets.ClassLabel)]
    column = given or ("label" if "label" in read.features else of_classes[0] if len(of_classes) == 1 else None)
    if column is None:
        return None, None
    values = np.asarray(read.data.column(column).to_pylist())
    feature = read.features[column]
    if values.dtype.kind in "US":
        classes, numbers = np.unique(values, return_inverse=True)
        return numbers.astype(np.int64), [str(name) for name in classes]
    if values.dtype.kind not in "iu" or values.ndim != 1 or values.min(initial=0) < -1:
        raise UserError(
            f"data.label_column: expected a whole number or a text for each image in {column}, got values such as"
            f" {values[:3].tolist()}"
        )
    if values.min(initial=0) < 0:
        return None, None  # -1 means withheld, as in published test sets
    return whole_labels(values, f"data.label_column: {column}"), list(feature.names) if isinstance(
        feature, datasets.ClassLabel
    ) else None
