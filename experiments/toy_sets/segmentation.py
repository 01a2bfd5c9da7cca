"""Toy segmentation sets in the published layouts of VOC 2012 and SBD: a few images of 128 x 96 pixels with shapes whose
class determines their colour.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.io import savemat

from caco.data.sets.transfer import VOC_CLASSES

CLASSES = {"cat": (220, 60, 50), "chair": (60, 200, 70), "tvmonitor": (70, 80, 230)}
TRAIN, VAL = [f"2007_{i:06d}" for i in range(6)], [f"2008_{i:06d}" for i in range(4)]
FURTHER = [f"2010_{i:06d}" for i in range(2)]  # images that only SBD has
PALETTE = [channel for c in range(256) for channel in (c * 37 % 256, c * 91 % 256, c * 53 % 256)]


def drawn(name: str, *, size: tuple[int, int] = (128, 96)) -> tuple[Image.Image, np.ndarray]:
    """An image of noise with one to three shapes, and the class of every pixel; a border of 255 surrounds each shape.

    The image depends only on the number after the year: 2007_000001 and 2008_000001 look the same.
    """
    rng = np.random.default_rng(int(name.partition("_")[2]))
    image = Image.fromarray(rng.integers(90, 140, (size[1], size[0], 3), dtype=np.uint8))
    labels = Image.new("L", size)
    for place, (c, colour) in enumerate(list(CLASSES.items())[: rng.integers(1, 4)]):
        left, top = 6 + 42 * place, int(rng.integers(5, size[1] - 45))
        box = (left, top, left + 36, top + 36)
        shape = "ellipse" if c == "cat" else "rectangle"
        getattr(ImageDraw.Draw(image), shape)(box, fill=colour)
        getattr(ImageDraw.Draw(labels), shape)(box, fill=1 + VOC_CLASSES.index(c), outline=255)
    return image, np.asarray(labels)


def write_voc(root: Path, *, train: list[str] = TRAIN, val: list[str] = VAL) -> Path:
    """Write VOCdevkit/VOC2012 below `root`; returns that folder."""
    top = root / "VOCdevkit" / "VOC2012"
    for name in (*train, *val):
        write_image(top, name)
    write_list(top / "ImageSets" / "Segmentation" / "train.txt", train)
    write_list(top / "ImageSets" / "Segmentation" / "val.txt", val)
    write_list(top / "ImageSets" / "Segmentation" / "trainval.txt", [*train, *val])
    return top


def write_image(top: Path, name: str, *, folder: str = "SegmentationClass") -> None:
    image, labels = drawn(name)
    for below, extension in (("JPEGImages", ".jpg"), (folder, ".png")):
        (top / below).mkdir(parents=True, exist_ok=True)
        if extension == ".jpg":
            image.save(top / below / f"{name}.jpg", quality=95)
        else:
            write_labels(top / below / f"{name}.png", labels)


def write_labels(path: Path, labels: np.ndarray) -> None:
    palette = Image.fromarray(labels.astype(np.uint8), mode=None).convert("L")
    palette.putpalette(PALETTE)  # mode P (colours by index), as in VOC
    palette.save(path)


def write_list(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def write_sbd(folder: Path, *, train: list[str], val: list[str], photos: bool = True) -> Path:
    """Write img/, cls/, train.txt and val.txt, as in benchmark_RELEASE/dataset of SBD's archive; returns the folder.

    Args:
        photos: also write the images; without them there are only the annotations.
    """
    for name in (*train, *val):
        image, labels = drawn(name)
        (folder / "cls").mkdir(parents=True, exist_ok=True)
        (folder / "img").mkdir(parents=True, exist_ok=True)
        if photos:
            image.save(folder / "img" / f"{name}.jpg", quality=95)
        without_border = np.where(labels == 255, 0, labels).astype(np.uint8)
        savemat(folder / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": without_border, "Boundaries": np.zeros(1)}})
    write_list(folder / "train.txt", train)
    write_list(folder / "val.txt", val)
    return folder
