"""FFCV's file format, .beton: one file of images, which is read by mapping it into memory. Neither reading nor writing
it needs FFCV.

The file has a header, the fields' names, one record for each image (its kind, size and place, and its label), the
images in pages, and a table of all places. FFCV's loader reads what `python -m caco.write` writes, and this module
reads what FFCV writes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from caco.data.sets.content import LOOK_BYTES, cache_key_of, in_threads, look_at
from caco.data.sets.folders import existing_root, limited, reduced
from caco.data.sets.reading import MAX_ASPECT, MAX_PIXELS, rgb
from caco.data.sets.sources import Source, Splits, UnreadableImage
from caco.data.views import native
from caco.errors import FileError, UserError
from caco.ranges import Count, ProperShare, Seed

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table_at", "<u8")],
    align=True,
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
# FFCV does not align the members of this one.
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
RECORD = np.dtype([("image", _IMAGE), ("label", "<i8")], align=True)
PLACE = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])
VERSION, INTEGER_FIELD, IMAGE_FIELD, JPEG, RAW = 2, 1, 2, 0, 1
_UNLABELLED = -1
MAX_CLASSES = 2**24


class BetonImages(Source):
    """The images of a .beton that has an `image` field of RGB images and an integer `label` field.

    Args:
        file: the .beton.
        name: name of the set.
        at: int64 [N], the numbers in the file of the images that this set has; None takes all.
    Raises:
        UserError: the file has another format or other fields, or ends before its images do.
    """

    def __init__(self, file: Path, *, name: str, at: np.ndarray | None = None):
        self.file, self.name = Path(file), name
        self._bytes, records, self._sizes = _read(self.file)
        self.at = np.arange(len(records)) if at is None else at
        self.records = records
        sidecar = _sidecar(self.file)
        _check_labels(self.file, records["label"], sidecar.get("classes"))
        self._checksum = sidecar.get("checksum")
        if "bytes" in sidecar and sidecar["bytes"] != len(self._bytes):
            raise UserError(
                f"{self.file}: expected the {sidecar['bytes']} bytes that {sidecar_path(self.file).name} names, got "
                f"{len(self._bytes)}. Write it again with python -m caco.write."
            )
        labels = records["label"][self.at]
        self.labels = labels.astype(np.int64) if len(labels) and labels.min() > _UNLABELLED else None
        self.classes = sidecar.get("classes")

    def __len__(self) -> int:
        return len(self.at)

    @property
    def packed(self) -> "BetonImages":
        return self

    def rows(self, indices: np.ndarray) -> np.ndarray:
        at = self.at[indices]
        made, images = np.empty(len(at), native.IMAGE), self.records["image"][at]
        made["data"] = self._bytes.ctypes.data + images["place"]
        made["bytes"] = np.where(images["mode"] == JPEG, self._sizes[at], 0)
        made["height"], made["width"] = images["height"], images["width"]
        return made

    def image(self, index: int) -> Image.Image:
        at = self.at[index]
        record = self.records["image"][at]
        content = self._content(int(at))
        if record["mode"] == RAW:
            return Image.fromarray(content.reshape(record["height"], record["width"], 3))
        try:
            return rgb(content.data, str(self.file), size=(int(record["width"]), int(record["height"])))
        except UnreadableImage:
            raise UnreadableImage(
                f"{self.file}: expected images that can be decoded, got a corrupt JPEG as number {self.at[index]}. "
                "Write the file again, or let another image stand in for it: loader.corrupt=skip."
            ) from None

    def part(self, indices: np.ndarray, name: str) -> "BetonImages":
        made = object.__new__(BetonImages)
        made.__dict__.update(self.__dict__)
        made.name, made.at = name, self.at[indices]
        made.labels = None if self.labels is None else self.labels[indices]
        return made

    def digest(self) -> str:
        state = hashlib.blake2b(digest_size=8)
        # Without a sidecar, hash everything but the pixels; reading these may take as long as an epoch.
        state.update((self._checksum or "").encode() or self.records.tobytes() + self._sizes.tobytes())
        # The sidecar may belong to another file of the same size, so also hash the looks at up to a thousand images.
        for at in np.unique(np.linspace(0, len(self.records) - 1, min(len(self.records), 1000)).astype(int)).tolist():
            state.update(look_at(self._content(at)))
        state.update(self.at.astype("<i8").tobytes())
        return state.hexdigest()

    def cache_key(self) -> str:
        status = os.stat(self.file)
        return cache_key_of(self.digest(), np.array([status.st_mtime_ns, status.st_ino & (2**63 - 1)], np.int64))

    def looks(self) -> np.ndarray | None:
        if (self.records["image"]["mode"][self.at] != JPEG).any():
            return None  # raw pixels are not the bytes of an image file
        made = in_threads(lambda i: look_at(self._content(int(self.at[i]))), len(self))
        return np.frombuffer(b"".join(made), np.uint8).reshape(-1, LOOK_BYTES)

    def _content(self, at: int) -> np.ndarray:
        """The bytes of the image with this number in the file."""
        return self._bytes[int(self.records["image"]["place"][at]) :][: self._sizes[at]]


def beton(
    *, root: str | None, limit: Count | None = None, validation_fraction: ProperShare | None = None, seed: Seed = 0
) -> Splits:
    """Read what `python -m caco.write ... out=ROOT` wrote: train.beton and, if they exist, test.beton and
    pretrain.beton.

    Args:
        root: the folder.
        limit, validation_fraction, seed: see caco.data.sets.folders.folder.
    Raises:
        FileError: no root was given, or train.beton is not there.
    """
    top = existing_root(root, example="data=beton")
    if not (top / "train.beton").is_file():
        raise FileError(
            f"data=beton: expected {top / 'train.beton'}, got no such file; python -m caco.write ... out={top}"
            " writes it"
        )
    made = {
        split: BetonImages(top / f"{split}.beton", name=f"{top.name}/{split}")
        for split in ("train", "test", "pretrain")
        if (top / f"{split}.beton").is_file()
    }
    pretrain = made.get("pretrain")
    splits = reduced(
        made["train"],
        made.get("test"),
        name=top.name,
        limit=limit if pretrain is None else None,
        validation_fraction=validation_fraction,
        seed=seed,
    )
    if pretrain is None:
        return splits
    return Splits(limited(pretrain, limit, seed=seed), splits.train, splits.test)


def write(
    file: Path,
    images: Iterable[tuple[int, int, int, bytes]],
    labels: np.ndarray | None,
    num_images: int,
    facts: dict[str, Any],
    *,
    page_size: int = 2**23,
) -> None:
    """Write a .beton and its sidecar. Each is written under a temporary name first and then renamed.

    Args:
        images: (JPEG or RAW, height, width, content) of each image, in order.
        labels: int64 [num_images], or None.
        facts: further entries of the sidecar.
        page_size: bytes of a page; no image crosses the border between pages.
    Raises:
        UserError: an image is larger than a page.
    """
    records = np.zeros(num_images, RECORD)
    records["label"] = _UNLABELLED if labels is None else labels
    places = np.zeros(num_images, PLACE)
    fields = np.zeros(2, FIELD)
    for field, kind, name in zip(fields, (IMAGE_FIELD, INTEGER_FIELD), (b"image", b"label"), strict=True):
        field["type"] = kind
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    aside = file.with_name(f".{file.name}.part")
    try:
        with open(aside, "wb") as out:
            begin = HEADER.itemsize + fields.nbytes + records.nbytes
            place = -(-begin // page_size) * page_size
            for i, (mode, height, width, content) in enumerate(images):
                if len(content) > page_size:
                    raise UserError(
                        f"image {i}: expected at most {page_size} bytes, got {len(content)}: lower max_resolution"
                    )
                # FFCV reads by pages, so no image may cross the border between two pages.
                if place // page_size != (place + len(content) - 1) // page_size:
                    place = -(-place // page_size) * page_size
                records["image"][i] = (mode, width, height, place)
                places[i] = (i, place, len(content))
                out.seek(place)
                out.write(content)
                place += len(content)
            table_at = -(-place // page_size) * page_size
            out.seek(table_at)
            out.write(places.tobytes())
            out.seek(0)
            header = np.array((VERSION, len(fields), page_size, num_images, table_at), HEADER)
            out.write(header.tobytes() + fields.tobytes() + records.tobytes())
            out.flush()
            os.fsync(out.fileno())
        with open(aside, "rb") as written:
            checksum = hashlib.file_digest(written, "sha256").hexdigest()
        facts = {
            "images": num_images,
            "labelled": labels is not None,
            **facts,
            "bytes": os.path.getsize(aside),
            "checksum": checksum,
        }
        sidecar_path(file).unlink(missing_ok=True)  # an older sidecar must not describe the new file
        os.replace(aside, file)
        note = sidecar_path(file).with_name(f".{sidecar_path(file).name}.part")
        note.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        os.replace(note, sidecar_path(file))
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise FileError(error.errno, error.strerror, str(file)) from error  # a full disk's error says not where
    finally:
        aside.unlink(missing_ok=True)


def sidecar_path(file: Path) -> Path:
    """The path of a .beton's sidecar, which holds counts, class names and a checksum."""
    return file.with_suffix(".json")


def _sidecar(file: Path) -> dict[str, Any]:
    """The entries of the sidecar; {} if there is none.

    Raises:
        UserError: it is damaged, or an entry has another type than `write` gives it.
    """
    path = sidecar_path(file)
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        kinds: dict[str, Any] = {"bytes": int, "checksum": str, "classes": (list, type(None))}
        right = isinstance(facts, dict) and all(
            isinstance(facts[key], kind) for key, kind in kinds.items() if key in facts
        )
        if not right or not all(isinstance(name, str) for name in facts.get("classes") or ()):
            raise ValueError("entries that python -m caco.write does not write")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: expected the file that python -m caco.write writes beside {file.name}, got {error}. Write"
            " both again."
        ) from error
    return facts


def _check_labels(file: Path, labels: np.ndarray, classes: list[str] | None) -> None:
    """Check that either all images are labelled or none is, and that labels are plausible: a label of 2^60 would make a
    classifier of as many classes.

    Raises:
        UserError: a label is wrong; the message names the first such record.
    """
    unlabelled = labels == _UNLABELLED
    if unlabelled.all():
        return
    num_classes = MAX_CLASSES if classes is None else len(classes)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise UserError(
            f"{file}: expected a label in 0..{num_classes - 1} for every image, or {_UNLABELLED} for all of them, got"
            f" {labels[wrong[0]]} in record {wrong[0]}. Copy it, or write it, again."
        )


def _read(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map a .beton into memory and check it: the file's bytes, its records, and each image's size in bytes, int64 [N].

    After the checks, every place that the records and the table name is inside the file. So every reader that follows
    them, FFCV too, stays inside the file.

    Raises:
        UserError: the file is damaged or no such .beton; the message names the record if one is wrong.
    """

    def wrong(got: str) -> UserError:
        return UserError(f"{file}: expected a .beton with the fields image (RGB) and label (integer), got {got}")

    try:
        content = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise FileError(f"{file}: expected a .beton that can be read, got: {error.strerror}") from error
    content = content.view(np.ndarray)
    begin = HEADER.itemsize + 2 * FIELD.itemsize
    if len(content) < begin:
        raise wrong(f"{len(content)} bytes")
    header = content[: HEADER.itemsize].view(HEADER)[0]
    if header["version"] != VERSION or header["num_fields"] != 2:
        raise wrong(f"version {header['version']} with {header['num_fields']} fields")
    fields = content[HEADER.itemsize : begin].view(FIELD)
    found = [(int(field["type"]), bytes(field["name"]).rstrip(b"\0")) for field in fields]
    if found != [(IMAGE_FIELD, b"image"), (INTEGER_FIELD, b"label")]:
        raise wrong(", ".join(f"{name.decode(errors='replace')} (type {kind})" for kind, name in found))
    count, table_at, page = int(header["num_samples"]), int(header["table_at"]), int(header["page_size"])
    records_end = begin + count * RECORD.itemsize
    if table_at == 0 or len(content) < max(table_at + count * PLACE.itemsize, records_end):
        raise UserError(
            f"{file}: expected a complete .beton of {count} images, got one that ends after {len(content)} bytes. "
            "Copy it, or write it, again."
        )
    # FFCV takes everything from here to the end of the file as the table.
    if count == 0 or page == 0 or table_at < records_end or table_at + count * PLACE.itemsize != len(content):
        raise wrong(
            f"{count} images in pages of {page} bytes, whose table is at {table_at} of {len(content)} bytes. Copy it,"
            " or write it, again"
        )
    records = content[begin:records_end].view(RECORD)
    places = content[table_at:].view(PLACE)
    images = records["image"]
    order = np.argsort(places["place"], kind="stable")
    at = order[np.searchsorted(places["place"][order], images["place"]).clip(max=count - 1)]
    place, size = places["place"][order], places["size"][order]
    inside = (
        (place >= records_end) & (place <= table_at) & (size <= table_at - np.minimum(place, table_at)) & (size > 0)
    )
    _refuse(
        file, order[~inside], "a place inside the file", lambda i: f"{places['size'][i]} bytes at {places['place'][i]}"
    )
    apart = (place[1:] >= place[:-1] + size[:-1]) & (place[:-1] // page == (place[:-1] + size[:-1] - 1) // page)
    _refuse(
        file,
        order[:-1][~apart],
        "a place of its own in one page",
        lambda i: f"{places['size'][i]} bytes at {places['place'][i]}",
    )
    width, height = images["width"].astype(np.int64), images["height"].astype(np.int64)
    sizes, raw = places["size"][at].astype(np.int64), images["mode"] == RAW
    usual = (
        (width > 0)
        & (height > 0)
        & (width * height <= MAX_PIXELS)
        & (np.maximum(width, height) <= MAX_ASPECT * np.minimum(width, height))
    )
    known = (
        (places["place"][at] == images["place"])
        & (places["sample"][at] == np.arange(count))
        & (raw | (images["mode"] == JPEG))
    )
    right = usual & known & (~raw | (sizes == 3 * width * height))
    _refuse(
        file,
        np.flatnonzero(~right),
        "a JPEG or pixels that the table has",
        lambda i: (
            f"{width[i]} x {height[i]} pixels of mode {images['mode'][i]}, {sizes[i]} bytes at {images['place'][i]}"
        ),
    )
    return content, records, sizes


def _refuse(file: Path, wrong: np.ndarray, expected: str, describe: Callable[[int], str]) -> None:
    if len(wrong):
        raise UserError(
            f"{file}: expected {expected} for each image, got of record {wrong.min()}: {describe(int(wrong.min()))}."
            " Copy it, or write it, again."
        )
