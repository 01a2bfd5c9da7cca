"""Functions for the ranks of a test in which several processes hash the files of a set together."""

import sys
import time
from pathlib import Path

import torch
from processes import PATIENCE_S

from caco import distributed
from caco.data.sets import content
from caco.data.sets.class_folders import class_folders
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.overlap import shared_images
from caco.errors import UserError


def look(folder: str, out: str) -> None:
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    real, original, read = time.time_ns, content._look, []
    # pretend that the files are 3 s old, so that their digests are kept
    content.time.time_ns = lambda: real() + 3_000_000_000

    def looked(path, size):
        read.append(path)
        return original(path, size)

    content._look = looked
    source = class_folders(Path(folder), "set")
    source.look()
    digest = source.digest()
    Path(f"{out}{distributed.rank()}").write_text(f"{digest} {len(read)}")
    distributed.stop()


def fail(folder: str) -> None:
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    source = class_folders(Path(folder), "set")
    distributed.barrier()  # wait until both ranks have found the files
    if distributed.is_main():
        (Path(folder) / "c" / "0003.png").unlink()  # a file that rank 1 has to read
    distributed.barrier()
    try:
        source.look()
    except UserError as error:
        print(error, flush=True)
        sys.exit(3)


def overlap(folder: str, out: str) -> None:
    """Find the images that two sets share; each rank reads a part of them."""
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    train, test = (class_folders(Path(folder) / name, name) for name in ("train", "test"))
    decoded = train.in_memory(1)
    assert decoded.arrays is not None, "the images must be kept in memory"
    in_memory = ImagesInMemory(decoded.arrays, name="memory")
    Path(f"{out}{distributed.rank()}").write_text(f"{shared_images(train, test)} {shared_images(in_memory, test)}")
    distributed.stop()
