"""Toy detection sets in the layouts of PASCAL VOC and COCO 2017: rectangles, ellipses and triangles on noise. An
object's class can be seen from its colour and its shape."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 128, 96
COLOURS = {"aeroplane": (220, 40, 40), "bird": (40, 200, 40), "car": (50, 60, 230)}
VOC_NAMES = list(COLOURS)
CATEGORIES = {
    3: "car",
    1: "aeroplane",
    18: "bird",
    90: "kite",
}  # ids with gaps and not in ascending order, as in COCO; no image contains a kite


def shapes(seed: int, *, count: int | None = None) -> tuple[Image.Image, list[tuple[str, tuple[int, int, int, int]]]]:
    """Draw an image with 1 to 3 shapes that do not overlap; returns it with a list of (class, box).

    A box is (left, top, right, bottom) in pixels, from 0; right and bottom are exclusive. `count` 0 or None: a random
    number of shapes.
    """
    draw_from = np.random.default_rng(seed)
    image = Image.fromarray(draw_from.integers(90, 150, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    draw, found = ImageDraw.Draw(image), []
    places = draw_from.permutation([(0, 0), (64, 0), (0, 48), (64, 48)])
    for x, y in places[: count or draw_from.integers(1, 4)]:
        name = VOC_NAMES[draw_from.integers(3)]
        w, h = draw_from.integers(22, 46), draw_from.integers(22, 44)
        left, top = int(x + draw_from.integers(0, 60 - w)), int(y + draw_from.integers(0, 46 - h))
        box = (left, top, int(left + w), int(top + h))
        drawn(draw, name, box)
        found.append((name, box))
    return image, found


def drawn(draw: ImageDraw.ImageDraw, name: str, box: tuple[int, int, int, int]) -> None:
    edges = (box[0], box[1], box[2] - 1, box[3] - 1)  # Pillow draws the right and bottom edge, too
    if name == "aeroplane":
        draw.rectangle(edges, fill=COLOURS[name])
    elif name == "bird":
        draw.ellipse(edges, fill=COLOURS[name])
    else:
        draw.polygon(ring(name, (box[0], box[1], box[2] - 1, box[3] - 1)), fill=COLOURS[name])


def ring(name: str, box: tuple[int, int, int, int]) -> list[tuple[float, float]]:
    """The outline of a shape as a list of its corners (x, y)."""
    x0, y0, x1, y1 = box
    if name == "aeroplane":
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    if name == "bird":
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        return [
            (float(x0 + x1 + (x1 - x0) * np.cos(a)) / 2, float(y0 + y1 + (y1 - y0) * np.sin(a)) / 2) for a in angles
        ]
    return [((x0 + x1) / 2, y0), (x1, y1), (x0, y1)]


def xml(image: str, objects: list[tuple[str, tuple, bool]]) -> str:
    """An annotation file in the format of the VOC devkit, whose boxes count from 1 and include their last pixel.

    The first object has two peculiarities that a reader must cope with: a part with its own box, and an edge with a
    decimal point.
    """
    body = ""
    for i, (name, (x0, y0, x1, y1), difficult) in enumerate(objects):
        part = (
            "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
            if i == 0
            else ""
        )
        left = f"{x0 + 1}.0" if i == 0 else f"{x0 + 1}"
        body += (
            f"<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated>"
            f"<difficult>{int(difficult)}</difficult>"
            f"<bndbox><xmin>{left}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
            f"{part}</object>\n"
        )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    head = f"<folder>VOC</folder><filename>{image}.jpg</filename>{size}<segmented>0</segmented>"
    return f"<annotation>{head}\n{body}</annotation>\n"


def write_voc(
    root: Path, *, train07: int = 5, train12: int = 3, test: int = 4, same_test: bool = False, inside: str = "VOCdevkit"
) -> None:
    """Write a toy VOC 2007 and 2012 set in the layout of the devkit.

    Args:
        train07, train12, test: numbers of images.
        same_test: make the test images the same as the training images, without difficult objects.
        inside: the folder below `root`.
    """
    for year, split, count, first in (
        ("2007", "trainval", train07, 0),
        ("2012", "trainval", train12, 100),
        ("2007", "test", test, 200),
    ):
        top = root / inside / f"VOC{year}"
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (top / folder).mkdir(parents=True, exist_ok=True)
        names = []
        for i in range(count):
            seed = [*range(train07), *range(100, 100 + train12)][i] if same_test and split == "test" else first + i
            image, objects = shapes(seed, count=1 if seed % 100 == 0 else None)
            marked = [(name, box, False) for name, box in objects]
            if i == 1 and not same_test:  # an object that touches the right edge and is marked as difficult
                drawn(ImageDraw.Draw(image), "car", (WIDTH - 20, 70, WIDTH, 94))
                marked.append(("car", (WIDTH - 20, 70, WIDTH, 94), True))
            name = f"{first + i + 1:06d}" if year == "2007" else f"2008_{i + 1:06d}"
            image.save(top / "JPEGImages" / f"{name}.jpg", quality=95)
            (top / "Annotations" / f"{name}.xml").write_text(xml(name, marked))
            names.append(name)
        (top / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def write_coco(root: Path, *, train: int = 6, val: int = 4, same_val: bool = False, images: str = "") -> None:
    """Write a toy COCO 2017 set, with the special cases that COCO has.

    Among the training images, one has only a crowd region, one has a box of width 0 beside valid boxes, and one is
    grey. Among the validation images, one has no annotation, and one has a crowd region beside objects.

    Args:
        train, val: numbers of images.
        same_val: make the validation images the same as the training images, and leave out the special cases.
        images: the folder of the images below `root`.
    """
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count, first in (("train2017", train, 0), ("val2017", val, 50)):
        folder = root / images / split
        folder.mkdir(parents=True, exist_ok=True)
        listed: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []

        def annotate(
            image: int,
            category: int,
            box: list[float],
            segmentation: object,
            crowd: int = 0,
            annotations: list[dict[str, object]] = annotations,
        ) -> None:
            row = {"image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            annotations.append({**row, "segmentation": segmentation, "id": len(annotations) + 1})

        for i in range(count):
            seed = i if same_val else first + i
            image, objects = shapes(seed)
            number = 9 * (first + i) + 9
            if split == "train2017" and i == 1 and not same_val:
                image = image.convert("L")
            name = f"{number:012d}.jpg"
            image.save(folder / name, quality=95)
            listed.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
            crowd = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * 100, HEIGHT * 28]}  # the rightmost 28 columns
            if not same_val and i == 2:
                if split == "train2017":
                    annotate(number, 1, [100.0, 0.0, 28.0, 96.0], crowd, crowd=1)
                continue
            for name, (x0, y0, x1, y1) in objects:
                category = next(c for c, known in CATEGORIES.items() if known == name)
                outline = [float(v) for point in ring(name, (x0, y0, x1, y1)) for v in point]
                annotate(number, category, [float(x0), float(y0), float(x1 - x0), float(y1 - y0)], [outline])
            if not same_val and i == 3:
                if split == "train2017":
                    annotate(number, 1, [5.0, 5.0, 0.0, 9.0], [[5.0, 5.0, 5.0, 14.0, 5.0, 9.0]])
                else:
                    annotate(number, 1, [100.0, 0.0, 28.0, 96.0], crowd, crowd=1)
        categories = [{"id": c, "name": name, "supercategory": "toy"} for c, name in CATEGORIES.items()]
        about = {"images": listed[::-1], "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(about))
