"""All toy sets in one folder."""

import os
import shutil
from pathlib import Path

from experiments.toy_sets import detection, pacs, segmentation


def draw(folder: Path) -> None:
    """Draw VOCdevkit/ (2007 and 2012), coco/ and pacs/ into a new folder; a folder that exists is left as it is.

    The sets are drawn into a folder beside it, which is renamed when it is complete.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    # Years and numbers that differ between the sets, so that no test image equals a training image, and no two sets
    # use the same file name.
    names = {
        part: [f"{year}_{first + i:06d}" for i in range(count)]
        for part, year, first, count in (("train", 2007, 0, 12), ("val", 2009, 100, 6))
    }
    segmentation.write_voc(unfinished, **names)
    detection.write_voc(unfinished, train07=8, train12=4, test=6)
    detection.write_coco(unfinished / "coco", train=12, val=6)
    pacs.write_pacs(unfinished, train=20, crossval=5)
    try:
        unfinished.rename(folder)
    except OSError:  # another process has made the folder meanwhile
        shutil.rmtree(unfinished)
