"""Images with boxes: PASCAL VOC 2007 and 2012, and COCO 2017, read from their published layouts and those of their
mirrors.

Shapes: N images, M objects, R rings of polygons, P points. Boxes are x0, y0, x1, y1, two corners in pixels, with 0 at
the image's edge: a box over a whole image of width W reaches from 0 to W.
"""

import hashlib
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from caco.data.sets.image_files import ImageFiles
from caco.data.sets.published import as_published
from caco.data.sets.transfer import VOC_CLASSES
from caco.errors import UserError
from caco.evals.dense.roots import absent, first_with, refuse_missing
from caco.runs.paths import read_text


class Objects(NamedTuple):
    """The annotated objects of one image.

    Attributes:
        boxes: float32 [m, 4].
        labels: int64 [m], from 0 on.
        difficult: bool [m]; only VOC marks objects as difficult.
        polygons: the rings [points, 2] of each object, float32; None for VOC.
    """

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    polygons: list[list[np.ndarray]] | None


@dataclass(frozen=True)
class AnnotatedImages:
    """Image files and their objects, in a few flat arrays. With lists, counting references would make forked workers
    copy memory pages.

    Attributes:
        files: the images.
        names: [N], each image's name in the annotations: VOC's name or COCO's id.
        sizes: int32 [N, 2], width and height.
        first: int64 [N + 1]; the objects of image i are those from first[i] to first[i + 1] - 1.
        boxes, labels, difficult: [M, 4], [M], [M], as in Objects.
        first_ring, first_point, points: int64 [M + 1], int64 [R + 1], float32 [P, 2]: where each object's rings begin,
            where each ring's points begin, and the points; None without polygons.
    """

    files: ImageFiles
    names: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    first_ring: np.ndarray | None = None
    first_point: np.ndarray | None = None
    points: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def objects(self, index: int) -> Objects:
        """The objects of one image, in the order of its annotations."""
        own = slice(self.first[index], self.first[index + 1])
        return Objects(self.boxes[own], self.labels[own], self.difficult[own], self._polygons(own))

    def _polygons(self, own: slice) -> list[list[np.ndarray]] | None:
        if self.first_ring is None:
            return None
        assert self.first_point is not None and self.points is not None
        rings = self.first_ring[own.start : own.stop + 1]
        starts = [self.first_point[a : b + 1] for a, b in zip(rings[:-1], rings[1:], strict=True)]
        return [[self.points[a:b] for a, b in zip(s[:-1], s[1:], strict=True)] for s in starts]

    def digest(self) -> str:
        """A short hash that changes when images, their order or their objects change."""
        state = hashlib.blake2b(self.files.digest().encode(), digest_size=8)
        for array in (
            self.first,
            self.boxes,
            self.labels,
            self.difficult,
            self.first_ring,
            self.first_point,
            self.points,
        ):
            state.update(b"" if array is None else np.ascontiguousarray(array).data)
        return state.hexdigest()


@dataclass
class _Gathering:
    """Collects objects while annotations are read, one image after the other."""

    polygons: bool
    names: list[Any] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    first: list[int] = field(default_factory=lambda: [0])
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    first_ring: list[int] = field(default_factory=lambda: [0])
    first_point: list[int] = field(default_factory=lambda: [0])
    rings: list[np.ndarray] = field(default_factory=list)

    def object(
        self, box: list[float], label: int, *, difficult: bool = False, rings: Iterable[Sequence[float]] = ()
    ) -> None:
        self.boxes.append(box)
        self.labels.append(label)
        self.difficult.append(difficult)
        for ring in rings:
            self.rings.append(np.asarray(ring, dtype=np.float32).reshape(-1, 2))
            self.first_point.append(self.first_point[-1] + len(self.rings[-1]))
        self.first_ring.append(len(self.rings))

    def end_of_image(self, name: Any, size: tuple[int, int]) -> None:
        self.names.append(name)
        self.sizes.append(size)
        self.first.append(len(self.boxes))

    def of(self, files: ImageFiles) -> AnnotatedImages:
        points = np.concatenate(self.rings) if self.rings else np.zeros((0, 2), np.float32)
        return AnnotatedImages(
            files=files,
            names=np.array(self.names),
            sizes=np.array(self.sizes, dtype=np.int32).reshape(-1, 2),
            first=np.array(self.first, dtype=np.int64),
            boxes=np.array(self.boxes, dtype=np.float32).reshape(-1, 4),
            labels=np.array(self.labels, dtype=np.int64),
            difficult=np.array(self.difficult, dtype=bool),
            first_ring=np.array(self.first_ring, dtype=np.int64) if self.polygons else None,
            first_point=np.array(self.first_point, dtype=np.int64) if self.polygons else None,
            points=points if self.polygons else None,
        )


@dataclass(frozen=True)
class DetectionSet:
    """The images to train on and those to test on.

    Attributes:
        classes: the name of each label.
        truth: for COCO, the annotation file that its own evaluation reads.
        category_ids: for COCO, int64 [K], the published id of each label.
    """

    name: str
    train: AnnotatedImages
    test: AnnotatedImages
    classes: list[str]
    truth: Path | None = None
    category_ids: np.ndarray | None = None

    def inputs(self) -> list[Any]:
        """Plain values that results on this set depend on."""
        truth = None if self.truth is None else hashlib.blake2b(self.truth.read_bytes(), digest_size=8).hexdigest()
        return [self.name, self.train.digest(), self.test.digest(), truth]


# ----------------------------------------------------------------------------------------------------------------- VOC

# Each part: year, list, and the folder into which mirrors often unpack its archive.
_VOC_PARTS = {
    "2007 trainval": ("2007", "trainval", "VOCtrainval_06-Nov-2007"),
    "2012 trainval": ("2012", "trainval", "VOCtrainval_11-May-2012"),
    "2007 test": ("2007", "test", "VOCtest_06-Nov-2007"),
}
VOC_LAYOUT = """\
  VOCdevkit/VOC2007/Annotations/000005.xml, JPEGImages/000005.jpg, ImageSets/Main/trainval.txt and test.txt
  VOCdevkit/VOC2012/Annotations/2008_000008.xml, JPEGImages/2008_000008.jpg, ImageSets/Main/trainval.txt
as VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar and VOCtrainval_11-May-2012.tar unpack in one folder;
VOC2007 and VOC2012 may be in root itself, and each archive in a folder of its own name, as mirrors have it"""


def voc(root: Path) -> DetectionSet:
    """PASCAL VOC 07+12: 5,011 + 11,540 training images, the 4,952 test images of 2007, 20 classes.

    Difficult objects are kept, also in training, and marked. Published boxes count pixels from 1 and include both
    edges, so 1 is subtracted from their left and upper edges only.

    Raises:
        UserError: parts are missing; the message lists all of them and the expected layout.
    """
    found: dict[str, tuple[Path, list[str]]] = {}
    missing = []
    for part, (year, split, archive) in _VOC_PARTS.items():
        inside = [Path(), Path("VOCdevkit"), Path(archive, "VOCdevkit"), Path(archive)]
        tops = [root / folder / f"VOC{year}" for folder in inside]
        listed = f"ImageSets/Main/{split}.txt"
        top = first_with(tops, listed)
        if top is None:
            missing.append(f"{(first_with(tops, '') or tops[1]) / listed} (VOC {part})")
            continue
        names = [line.split()[0] for line in read_text(top / listed).splitlines() if line.strip()]
        if not names:
            missing.append(f"names of images in {top / listed} (VOC {part})")
        for folder, extension in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
            files = absent(top / folder, [name + extension for name in names])
            if files:
                missing.append(
                    f"{len(files)} of the {len(names)} files of VOC {part} in {top / folder}, {files[0]} for example"
                )
        found[part] = (top, names)
    refuse_missing("VOC", root, missing, VOC_LAYOUT)
    train = _voc_images(root, "voc/trainval0712", [found["2007 trainval"], found["2012 trainval"]])
    test = _voc_images(root, "voc/test07", [found["2007 test"]])
    return DetectionSet("voc", train, test, list(VOC_CLASSES))


def _voc_images(root: Path, name: str, parts: list[tuple[Path, list[str]]]) -> AnnotatedImages:
    gathering = _Gathering(polygons=False)
    files, number = [], {c: i for i, c in enumerate(VOC_CLASSES)}
    for top, names in parts:
        for image in names:
            path = top / "Annotations" / f"{image}.xml"
            try:
                _read_voc(path, image, gathering, number)
            except (ElementTree.ParseError, AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"VOC: {path} is not an annotation as published ({error!r}): unpack the set again"
                ) from error
            files.append(str((top / "JPEGImages" / f"{image}.jpg").relative_to(root)))
    return gathering.of(ImageFiles(root, files, name=name))


def _read_voc(path: Path, image: str, gathering: _Gathering, number: dict[str, int]) -> None:
    annotation = ElementTree.parse(path).getroot()

    def text(node: ElementTree.Element, key: str) -> str:
        found = node.findtext(key)
        if found is None:
            raise ValueError(f"no {key}")
        return found.strip()

    for thing in annotation.findall("object"):  # direct children only, because the parts of a person have boxes too
        x0, y0, x1, y1 = (float(text(thing, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
        difficult = (thing.findtext("difficult") or "0").strip() == "1"
        gathering.object([x0 - 1, y0 - 1, x1, y1], number[text(thing, "name")], difficult=difficult)
    gathering.end_of_image(image, (int(text(annotation, "size/width")), int(text(annotation, "size/height"))))


# ---------------------------------------------------------------------------------------------------------------- COCO

COCO_LAYOUT = """\
  annotations/instances_train2017.json and instances_val2017.json, train2017/000000000009.jpg, val2017/000000000139.jpg
as annotations_trainval2017.zip, train2017.zip and val2017.zip unpack in one folder, which is root or root/coco
(coco2017, COCO); the images may be in images/train2017 and images/val2017, as mirrors have it"""


def coco(root: Path) -> DetectionSet:
    """COCO 2017: 118,287 images to train on, all 5,000 of val2017 to test on, 80 classes, polygons.

    For training, crowds and objects without area are left out, and then images without objects. All test images are
    kept, because COCO's own annotation file is used for scoring.

    Raises:
        UserError: parts are missing; the message lists all of them and the expected layout.
    """
    tops = [root / name for name in ("", "coco", "coco2017", "COCO", "COCO2017", "coco-2017")]
    top = first_with(tops, "annotations") or first_with(tops, "train2017") or root
    missing, parts = [], {}
    for split in ("train2017", "val2017"):
        annotations = top / "annotations" / f"instances_{split}.json"
        if not annotations.is_file():
            missing.append(str(annotations))
        folder = next((top / name for name in (split, f"images/{split}") if (top / name).is_dir()), None)
        if folder is None:
            missing.append(str(top / split))
        elif annotations.is_file():
            parts[split] = _coco_part(annotations)
            with as_published("COCO 2017", annotations):
                names = [image["file_name"] for image in parts[split]["images"]]
            if files := absent(folder, names):
                missing.append(f"{len(files)} of the {len(names)} images in {folder}, {files[0]} for example")
            parts[split]["folder"] = folder
    refuse_missing("COCO 2017", root, missing, COCO_LAYOUT)
    with as_published("COCO 2017", top / "annotations" / "instances_train2017.json"):
        categories = sorted(parts["train2017"]["categories"], key=lambda category: category["id"])
        number = {category["id"]: i for i, category in enumerate(categories)}
        train = _coco_images(root, "coco/train2017", parts.pop("train2017"), number, training=True)
        names, ids = [category["name"] for category in categories], np.array(list(number), dtype=np.int64)
    with as_published("COCO 2017", top / "annotations" / "instances_val2017.json"):
        test = _coco_images(root, "coco/val2017", parts.pop("val2017"), number, training=False)
    if not len(train) or not len(test):
        raise UserError(
            f"COCO 2017: expected images with objects to train on and images to test on in {root}, got {len(train)} and"
            f" {len(test)}"
        )
    return DetectionSet("coco", train, test, names, top / "annotations" / "instances_val2017.json", ids)


def _coco_part(path: Path) -> dict[str, Any]:
    with as_published("COCO 2017", path):
        about = json.loads(path.read_bytes())
        return {key: about[key] for key in ("images", "annotations", "categories")}


def _coco_images(
    root: Path, name: str, part: dict[str, Any], number: dict[int, int], *, training: bool
) -> AnnotatedImages:
    of_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in part["annotations"]:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    gathering, files = _Gathering(polygons=True), []
    folder = part["folder"].relative_to(root)
    for image in sorted(part["images"], key=lambda image: image["id"]):
        width, height = image["width"], image["height"]
        usable = []
        for annotation in of_image.get(image["id"], []):
            x, y, w, h = annotation["bbox"]
            box = [max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)]
            rings = annotation["segmentation"] if isinstance(annotation["segmentation"], list) else []
            rings = [ring for ring in rings if len(ring) >= 6 and len(ring) % 2 == 0]
            if not annotation.get("iscrowd") and rings and box[2] > box[0] and box[3] > box[1]:
                usable.append((box, number[annotation["category_id"]], rings))
        if training and not usable:
            continue
        for box, label, rings in usable:
            gathering.object(box, label, rings=rings)
        gathering.end_of_image(image["id"], (width, height))
        files.append(str(folder / image["file_name"]))
    return gathering.of(ImageFiles(root, files, name=name))


READERS, LAYOUTS = {"voc": voc, "coco": coco}, {"voc": VOC_LAYOUT, "coco": COCO_LAYOUT}
