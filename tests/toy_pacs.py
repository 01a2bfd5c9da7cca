"""A toy PACS: classes told by colour, domains by what is drawn around it, in each of the published layouts."""

from pathlib import Path

import numpy as np
from PIL import Image

from caco.data.sets.domains import CLASSES, DAMAGED, DOMAINS

LAYOUTS = {  # images, lists, below the root
    "original": ("PACS/kfold", "PACS/Train val splits and h5py files pre-read"),
    "mirror": ("PACS", "PACS"),
    "dassl": ("pacs/images", "pacs/splits"),
}


def write_pacs(
    root: Path, layout: str = "dassl", *, train: int = 3, crossval: int = 1, size: int = 16, first: int = 1, noise: int = 0
) -> Path:
    """So many images of each class and domain, on lists that count classes from `first`; returns the folder of the lists."""
    images, lists = (root / part for part in LAYOUTS[layout])
    lists.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for d, domain in enumerate(DOMAINS):
        rows = {"train": [], "crossval": []}
        for c, name in enumerate(CLASSES):
            folder = images / domain / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(train + crossval):
                file = f"pic_{i:03d}." + ("png" if domain == "sketch" else "jpg")
                if (domain, name, i) == ("sketch", "dog", 0):
                    file = DAMAGED.rpartition("/")[2]
                corner = np.array([(c + 1) >> bit & 1 for bit in range(3)])
                pixels = 30 * d + 100 * corner + rng.integers(0, 20 + noise, (size, size, 3)) - noise // 2
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                    folder / file, **({} if file.endswith("png") else {"quality": 95})
                )
                rows["train" if i < train else "crossval"].append(f"{domain}/{name}/{file} {c + first}")
        for which, lines in rows.items():
            (lists / f"{domain}_{which}_kfold.txt").write_text("\n".join(lines) + "\n")
    return lists
