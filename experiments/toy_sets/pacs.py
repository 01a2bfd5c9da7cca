"""A toy PACS set in each of its published layouts, with one geometric shape for each class. The domains differ in how
the shape is drawn: with texture (photo), tinted and blurred (art_painting), flat with an outline (cartoon), or as black
lines on white (sketch)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from caco.data.sets.domains import CLASSES, DAMAGED, DOMAINS

LAYOUTS = {  # name -> (folder of the images, folder of the lists), below the root
    "original": ("PACS/kfold", "PACS/Train val splits and h5py files pre-read"),
    "mirror": ("PACS", "PACS"),
    "dassl": ("pacs/images", "pacs/splits"),
}
SIZE = 48  # pixels
# The corners of each class's shape as (angle in turns, radius); 24 corners make a circle.
_CORNERS: dict[str, list[tuple[float, float]]] = {
    "dog": [(i / 24, 1.0) for i in range(24)],
    "elephant": [(i / 4, 1.0) for i in range(4)],
    "giraffe": [(i / 3, 1.0) for i in range(3)],
    "guitar": [(i / 10, 1.0 if i % 2 else 0.4) for i in range(10)],  # a star
    "horse": [(i / 16 + 1 / 32, 1.0 if i % 4 in (0, 1) else 0.45) for i in range(16)],  # a cross with broad arms
    "house": [(0.06, 1.0), (0.44, 1.0), (0.56, 1.0), (0.94, 1.0)],  # a bar
    "person": [(0.0, 1.0), (0.12, 0.95), (0.25, 0.9), (0.38, 0.95), (0.5, 1.0)],  # half a disc
}


def write_pacs(
    root: Path,
    layout: str = "dassl",
    *,
    train: int = 3,
    crossval: int = 1,
    first: int = 1,
    draw: Callable[[str, str, np.random.Generator], Image.Image] | None = None,
) -> Path:
    """Write a toy PACS set; returns the folder of its lists.

    Args:
        layout: a key of LAYOUTS.
        train, crossval: how many images of each class and domain are on the list of that name.
        first: the number of the first class on the lists (1 in the published ones).
        draw: makes an image from (domain, class, random generator); None for `drawn`.
    """
    images, lists = (root / part for part in LAYOUTS[layout])
    lists.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for domain in DOMAINS:
        rows: dict[str, list[str]] = {"train": [], "crossval": []}
        for c, name in enumerate(CLASSES):
            folder = images / domain / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(train + crossval):
                file = f"pic_{i:03d}." + ("png" if domain == "sketch" else "jpg")
                if (domain, name, i) == ("sketch", "dog", 0):
                    file = DAMAGED.rpartition("/")[2]
                (draw or drawn)(domain, name, rng).save(folder / file, quality=95)  # PNG ignores the quality
                rows["train" if i < train else "crossval"].append(f"{domain}/{name}/{file} {c + first}")
        for which, lines in rows.items():
            (lists / f"{domain}_{which}_kfold.txt").write_text("\n".join(lines) + "\n")
    return lists


def drawn(domain: str, name: str, rng: np.random.Generator) -> Image.Image:
    """Draw a shape with random position, size, angle and colours, so that only its form reveals the class."""
    middle, radius, turn = rng.uniform(19, SIZE - 19, 2), rng.uniform(13, 18), rng.uniform(-0.06, 0.06)
    angle, length = (
        2 * np.pi * (np.array([a for a, _ in _CORNERS[name]]) + turn),
        radius * np.array([r for _, r in _CORNERS[name]]),
    )
    corners = [
        (float(x), float(y))
        for x, y in zip(middle[0] + length * np.cos(angle), middle[1] + length * np.sin(angle), strict=True)
    ]
    back, front = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    while abs(int(back.sum()) - int(front.sum())) < 150:
        back, front = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    if domain == "sketch":
        white = Image.new("RGB", (SIZE, SIZE), "white")
        ImageDraw.Draw(white).line([*corners, corners[0]], fill="black", width=2)
        return white
    inside = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(inside).polygon(corners, fill=255)
    pixels = np.where(np.asarray(inside)[..., None] > 0, front, back).astype(float)
    if domain == "photo":
        pixels += 30 * rng.standard_normal((SIZE, SIZE, 1))
    made = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if domain == "art_painting":
        tint = Image.new("RGB", (SIZE, SIZE), tuple(rng.integers(120, 256, 3).tolist()))
        return Image.blend(made, tint, 0.4).filter(ImageFilter.GaussianBlur(1.5))
    if domain == "cartoon":
        ImageDraw.Draw(made).line([*corners, corners[0]], fill="black", width=3)
    return made
