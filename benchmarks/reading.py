"""How fast evaluations read images, compared with only decoding them and with only reading the files.

    python benchmarks/reading.py --json reading.json                 on synthetic photographs; takes minutes
    python benchmarks/reading.py --full --photos PHOTOS              on your zip or folder of JPEGs, as for the
                                                                     published figures

1. Features: the time that caco takes from files to features (caco/evals/features.py: reading, decoding, resizing,
   normalising; the network is a mean over the pixels and takes almost no time), with one worker per core. It is
   compared with the same number of processes that only open and decode the same files with Pillow. They decode whole
   photographs, whereas caco decodes only the rows that the view shows, so the ratio can be above 1. Each photograph is
   there many times under different names.
2. Digests and overlap: reading and hashing each of many small files (caco/data/sets/content.py), and the whole overlap
   check of two sets of such files (caco/data/sets/overlap.py). They are compared with reading each of the same files
   once with the same number of threads.
3. Start: all that a training does before its first step, with a folder of as many images as ImageNet has. The images
   are simulated by their names: one small JPEG in each of 1,000 class folders, and hard links to it. It is compared
   with reading each of these files once.

The page cache is warm, because the files have just been written. Both sides take turns in one process, and a ratio
compares values of the same turn."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

if (
    not __package__
):  # run as a file: import caco and benchmarks from this checkout, as python -m benchmarks.reading does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import caco  # noqa: F401, I001 - before torch, because it sets torch's instruction set
from PIL import Image
from torch import Tensor, nn

from benchmarks.common import Report, formatted, parser, photos_at, ratios, say, turns
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.loaders.workers import in_order
from caco.data.sets.class_folders import class_folders
from caco.data.sets.content import in_threads
from caco.data.sets.overlap import Overlap
from caco.data.sets.image_files import ImageFiles
from caco.data.sets.sources import Source, Splits
from caco.data.views.augmentation import View, Views
from caco.evals.features import FeatureStore


class Sizes(NamedTuple):
    photos: int | None  # number of photographs; None: all of --photos, or 250 synthetic ones
    copies: int  # of each photograph, under different names
    width: int  # of a synthetic photograph, in pixels
    files: int  # number of small files
    names: int  # images of the folder that a training starts with
    classes: int  # class folders of this folder
    runs: int


DEFAULT = Sizes(100, 5, 500, 20_000, 50_000, 1000, 3)
FULL = Sizes(None, 20, 500, 100_000, 1_281_000, 1000, 3)
TINY = Sizes(3, 2, 60, 200, 800, 2, 1)
SMALL_BYTES = 2000  # size of a small file, about that of an image of 32 x 32 pixels
SHARED = 50  # number of test files with the same content as a training file


class Mean(nn.Module):
    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def link(file: Path, name: Path) -> None:
    """Make a hard link to the file under another name."""
    try:
        os.link(file, name)
    except OSError:  # the file is on another disk, or the disk has no hard links
        shutil.copyfile(file, name)


def many(photos: Source, copies: int, top: Path) -> ImageFiles:
    """Make `copies` files of each photograph; hard links suffice, because the files are only read."""
    top.mkdir()
    names = []
    for copy in range(copies):
        for index in range(len(photos)):
            names.append(f"{copy:02}-{index:05}.jpg")
            photo = photos.path(index)
            assert photo is not None, "each photograph is a file"
            link(photo, top / names[-1])
    return ImageFiles(top, names, name="photos")


def features(source: ImageFiles, workers: int) -> None:
    views = Views(size=224, views={"one": View()}, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    store = FeatureStore(
        Splits(source, source, None),
        views,
        batch=256,
        device="cpu",
        precision="fp32",
        loader=TorchLoader(num_workers=workers),
    )
    assert store.outputs(Mean(), source, views).shape == (len(source), 3)


def decode(source: ImageFiles, workers: int) -> None:
    """Only decode the files, with `workers` processes."""

    def part(indices: np.ndarray) -> int:
        for index in indices:
            with Image.open(source.path(int(index))) as image:
                image.convert("RGB")
        return len(indices)

    pieces = np.array_split(np.arange(len(source)), max(1, len(source) // 32))
    made = in_order(part, pieces, workers)
    assert sum(made) == len(source)
    made.close()


def small_files(top: Path, count: int) -> tuple[ImageFiles, ImageFiles]:
    """Write `count` small files, nine tenths for training and one tenth for testing; SHARED of the latter are copies of
    training files.
    """
    rng = np.random.default_rng(0)
    names = [f"{i % 100:02}/{i:06}.jpg" for i in range(count)]
    for folder in range(100):
        (top / f"{folder:02}").mkdir(parents=True)
    contents = rng.integers(0, 256, (count, SMALL_BYTES), dtype=np.uint8)
    train = count * 9 // 10
    shared = min(SHARED, count - train)
    contents[train : train + shared] = contents[:shared]
    for name, content in zip(names, contents, strict=True):
        (top / name).write_bytes(content.tobytes())
    return ImageFiles(top, names[:train], name="train"), ImageFiles(top, names[train:], name="test")


def anew(source: ImageFiles) -> ImageFiles:
    """The same files as a new source that has not cached anything about them."""
    return ImageFiles(source.root, source._files, name=source.name)


def timed(work: Callable[[], object]) -> Callable[[], float]:
    def once() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return once


def read_once(*sources: ImageFiles) -> None:
    for source in sources:
        in_threads(lambda i: len(source.path(i).read_bytes()), len(source))  # noqa: B023 - called here


def check(train: ImageFiles, test: ImageFiles) -> None:
    shared = Overlap().shared(anew(train), anew(test))
    assert len(shared) == min(SHARED, len(test))


def images_by_name(top: Path, count: int, classes: int) -> ImageFiles:
    """A folder of `count` images in equally large class folders, of which each holds one image under many names."""
    rng = np.random.default_rng(0)
    for number in range(classes):
        folder = top / "train" / f"{number:04}"
        folder.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "0.jpg")
        for name in range(1, count // classes):
            link(folder / "0.jpg", folder / f"{name}.jpg")
    return class_folders(top / "train", "names")


def start_of_training(root: Path) -> dict[str, float]:
    """The seconds of each part of the start of a training on a folder of images."""
    with tempfile.TemporaryDirectory() as run_dir:
        settings = ["preset=smoke", "data=folder", f"data.root={root}", "augmentation=cifar", "eval=[]", "profile=true"]
        settings += ["max_steps=12", "warm_start.steps=0", "tracking=ledger", f"hydra.run.dir={run_dir}"]
        command = [sys.executable, "-m", "caco.train", *settings]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
        return json.loads((Path(run_dir) / "shares.json").read_text())["before_the_first_step"]


def start(report: Report, top: Path, sizes: Sizes, runs: int) -> None:
    source = images_by_name(top, sizes.names, sizes.classes)
    time.sleep(0 if sizes is TINY else 3)  # as for the small files
    say(f"a training's start with {len(source):,} images, and reading these files once: {runs} turns")
    parts: list[dict[str, float]] = []

    def once() -> float:
        parts.append(start_of_training(top))
        return sum(parts[-1].values())

    found = turns({"start": once, "read": timed(lambda: read_once(source))}, runs, warm=0)
    ratio = ratios(found["start"], found["read"])
    longest = sorted(parts[-1].items(), key=lambda part: -part[1])[:3]
    report.row(
        f"the start of a training with {len(source):,} images / reading each file once, seconds",
        formatted(ratio),
        f"{formatted(ratios(found['start'], [1] * runs), ' s')}; " + ", ".join(f"{k} {v:.1f} s" for k, v in longest),
    )
    report.figures["start"] = {"images": len(source), "vs_read": ratio, "parts": parts, **found}


def main() -> None:
    options = parser(
        __doc__,
        runs="This many turns are measured. The default is 3.",
        full="Read 20 files of each photograph and 100,000 small files, and start with 1,281,000 images, as for the"
        " published figures.",
        photos=True,
    )
    arguments = options.parse_args()
    sizes = TINY if arguments.tiny else FULL if arguments.full else DEFAULT
    runs, workers = arguments.runs or sizes.runs, arguments.workers
    report = Report(["what", "ratio", "details"])
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        photos = photos_at(arguments.photos, top / "photos", sizes.photos or 250, sizes.width)
        if arguments.photos is not None and sizes.photos is not None:
            photos = photos.part(np.arange(min(len(photos), sizes.photos)), "photos")
        source = many(photos, sizes.copies, top / "many")
        say(
            f"features of {len(source)} photographs with {workers} workers, and decoding alone with as many processes:"
            f" {runs} turns"
        )
        found = turns(
            {"features": timed(lambda: features(source, workers)), "decode": timed(lambda: decode(source, workers))},
            runs,
            warm=0,
        )
        ratio = ratios(found["decode"], found["features"])
        rates = [formatted(ratios([len(source)] * runs, found[name]), digits=0) for name in ("features", "decode")]
        report.row("features / decoding alone, images per second", formatted(ratio), f"{rates[0]} and {rates[1]}")
        report.figures["features"] = {"photos": len(source), "workers": workers, "vs_decode": ratio, **found}
        train, test = small_files(top / "small", sizes.files)
        time.sleep(0 if arguments.tiny else 3)  # caco reads a file again if it has only just been written
        say(f"{sizes.files} files of {SMALL_BYTES} bytes: digests, overlap check, and reading once: {runs} turns")
        found = turns(
            {
                "digests": timed(lambda: [anew(one).digest() for one in (train, test)]),
                "overlap": timed(lambda: check(train, test)),
                "read": timed(lambda: read_once(train, test)),
            },
            runs,
            warm=0,
        )
        for name, what in (("digests", "digests"), ("overlap", "the overlap check")):
            ratio = ratios(found[name], found["read"])
            report.row(
                f"{what} / reading each file once, seconds",
                formatted(ratio),
                f"{formatted(ratios(found[name], [1] * runs), ' s')}",
            )
            report.figures[name] = {
                "files": sizes.files,
                "vs_read": ratio,
                "seconds": found[name],
                "read_seconds": found["read"],
            }
        start(report, top / "names", sizes, runs)
    report.end(arguments.json)


if __name__ == "__main__":
    main()
