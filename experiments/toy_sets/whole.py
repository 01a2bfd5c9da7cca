"""All toy sets in one folder."""

import os
import shutil
from pathlib import Path

from experiments.toy_sets import detection, pacs, segmentation


def draw(folder: Path) -> None:
    """VOCdevkit/ (2007, 2012), coco/ and pacs/ in a folder that is not there yet; one that is there is left as it is.

    Drawn beside it and renamed when all is there.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    # Numbers of their own, so that no image of a test is one that is trained on, nor has the name of another set's.
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
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
