"""How fast views come: caco's loaders against torchvision on Pillow, against FFCV's own operations, against bare decoding.

Real photographs, float32 normalised views on the CPU from every contender but the bare decoder and FFCV's crop (uint8, as
FFCV gives them). All contenders take turns, so that a drifting machine hits all; a ratio is that of one turn.

    python benchmarks/loader.py --photos shared/data/imagenet-samples.zip --json loader.json

pil         torchvision's v1 transforms on Pillow images, DataLoader, persistent workers, prefetch 4: the baseline
ffcv_crop   FFCV's own decoder, random resized crop and flip, compiled by numba, one pipeline a view
decode      nothing but decoding every JPEG once with libturbojpeg, in as many threads
caco        loader=ffcv, all of the paper's augmentations (augmentation=caco, caco_multicrop, cifar)
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from caco import instructions  # before torch: CACO_INSTRUCTIONS holds for it too

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1

from caco.config import CONF
from caco.data import native
from caco.data.beton import beton
from caco.data.datasets import folder
from caco.data.loader import FFCVLoader, TorchLoader
from caco.data.sources import ImagesInMemory, Source, Splits
from caco.data.views import Views
from caco.data.write import write_splits
from caco.tracking.environment import environment

BATCH, SMALL_BATCH, COPIES = 50, 500, 2  # each photograph twice: epochs long enough for their beginning not to count


def views_of(name: str) -> Views:
    settings = OmegaConf.to_container(OmegaConf.load(CONF / "augmentation" / f"{name}.yaml"))
    settings.pop("_target_")
    return Views(**settings)


class PillowViews(Dataset):
    """Torchvision's v1 transforms of a recipe, as one writes them."""

    def __init__(self, source: Source, views: Views):
        self.source = source
        self.transforms = [self.transform(view, size, views) for view, size in zip(views._views, views.sizes, strict=True)]

    @staticmethod
    def transform(view: Any, size: int, views: Views) -> v1.Compose:
        steps = [
            v1.RandomResizedCrop(size, scale=tuple(view.scale)),
            v1.RandomApply([v1.ColorJitter(*view.jitter)], p=view.jitter_p),
            v1.RandomGrayscale(p=view.gray_p),
        ]
        if view.blur_p:
            steps.append(v1.RandomApply([v1.Lambda(lambda image: blurred(image, view.blur))], p=view.blur_p))
        if view.solarize_p:
            steps.append(v1.RandomSolarize(128, p=view.solarize_p))
        mean, std = (-views._offset / views._scale / 255).tolist(), (1 / views._scale / 255).tolist()
        return v1.Compose([*steps, v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        image = self.source.image(index)
        return [transform(image) for transform in self.transforms]


def blurred(image: Image.Image, sigmas: list[float]) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(*sigmas))))


class Contender:
    """epoch() makes every image's views once; returns images a second, and seconds to the first batch."""

    def __init__(self, epoch: Callable[[], Iterator], images: int):
        self.epoch, self.images, self.rates = epoch, images, []

    def run(self) -> None:
        started = time.perf_counter()
        for _ in self.epoch():
            pass
        self.rates.append(self.images / (time.perf_counter() - started))


def pillow(source: Source, views: Views, batch: int, workers: int) -> Contender:
    loader = DataLoader(
        PillowViews(source, views), batch, shuffle=True, num_workers=workers, persistent_workers=True, prefetch_factor=4,
        drop_last=True,
    )  # fmt: skip
    return Contender(lambda: iter(loader), len(source) // batch * batch)


def ours(kind: type, source: Source, views: Views, batch: int, workers: int) -> Contender:
    loader = kind(num_workers=workers).bind(source, views, batch=batch, seed=0)
    epochs = iter(range(10**6))
    return Contender(lambda: loader.epoch(next(epochs)), len(source) // batch * batch)


def ffcv_crop(file: Path, views: Views, images: int, workers: int) -> Contender:
    """FFCV's own way to two views: a pipeline of its operations for each."""
    import caco.data.ffcv_pipeline  # noqa: F401  imports ffcv without its side effects
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    def spec(size: int) -> PipelineSpec:
        return PipelineSpec(
            "image",
            decoder=RandomResizedCropRGBImageDecoder((size, size), scale=(0.2, 1.0)),
            transforms=[RandomHorizontalFlip(), ToTensor()],
        )

    names = ["image", *(f"view{v}" for v in range(1, views.num_views))]
    pipelines = {name: spec(size) for name, size in zip(names, views.sizes, strict=True)}
    loader = Loader(
        str(file), batch_size=BATCH, num_workers=workers, order=OrderOption.RANDOM, pipelines={**pipelines, "label": None}
    )
    return Contender(lambda: iter(loader), images // BATCH * BATCH)


def decode(source: Any, workers: int) -> Contender:
    """Every JPEG decoded by libturbojpeg, and nothing else."""
    records, jpegs = source.records["image"], [
        bytes(source._bytes[int(place) :][:size]) for place, size in zip(source.records["image"]["place"], source._sizes, strict=True)
    ]  # fmt: skip
    heights, widths = records["height"].tolist(), records["width"].tolist()
    buffer_bytes = max(3 * height * width for height, width in zip(heights, widths, strict=True))
    library = ctypes.CDLL("libturbojpeg.so.0")
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDecompress2.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p, *[ctypes.c_int] * 5]

    def part(worker: int) -> None:
        handle, buffer = library.tjInitDecompress(), np.empty(buffer_bytes, np.uint8)
        for i in range(worker, len(jpegs), workers):
            library.tjDecompress2(handle, jpegs[i], len(jpegs[i]), buffer.ctypes.data, widths[i], 0, heights[i], 0, 0)
        library.tjDestroy(ctypes.c_void_p(handle))

    def epoch() -> Iterator:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(part, range(workers))

    return Contender(epoch, len(jpegs))


FIRST_BATCH = """
import sys, time, torch
from caco.config import build, compose
from caco.data.loader import FFCVLoader
cfg = compose(["data=beton", "data.root=" + sys.argv[1]])
views, source = build(cfg.augmentation), build(cfg.data).pretrain
started = time.perf_counter()
next(FFCVLoader(num_workers=int(sys.argv[2])).bind(source, views, batch=int(sys.argv[3]), seed=0).epoch(0))
print(time.perf_counter() - started, flush=True)
"""


def first_batch(root: Path, workers: int) -> float:
    """Seconds from a loader's construction to its first batch in a new process, the import of FFCV included."""
    command = [sys.executable, "-c", FIRST_BATCH, str(root), str(workers), str(BATCH)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1])
    return float(done.stdout)


def ratio(a: Contender, b: Contender) -> dict[str, float]:
    ratios = [x / y for x, y in zip(a.rates, b.rates, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def take_turns(contenders: dict[str, Contender], runs: int) -> None:
    for contender in contenders.values():
        contender.run()  # warms up: workers start, numba compiles, memory is touched
        contender.rates.clear()
    for _ in range(runs):
        for contender in contenders.values():
            contender.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="a zip, or a folder, of JPEG photographs")
    parser.add_argument("--runs", type=int, default=5, help="turns that count, after one that warms up")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="large,raw,small,multicrop,first", help="which parts")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    print(instructions.told(), flush=True)
    workers, only = arguments.workers, set(arguments.only.split(","))
    torch.set_num_threads(workers)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        photos = Path(arguments.photos)
        if photos.suffix == ".zip":
            zipfile.ZipFile(photos).extractall(top / "photos")
            photos = top / "photos"
        files = folder(root=str(photos), in_memory_mb=0).pretrain
        count = COPIES * len(files) // BATCH * BATCH
        files = files.part(np.arange(count) % len(files), "photos")
        write_splits(Splits(files, None, None), top / "jpeg")
        source = beton(root=str(top / "jpeg")).pretrain

        def compare(part: str, contenders: dict[str, Contender], ratios: dict[str, tuple[str, str]]) -> None:
            take_turns(contenders, arguments.runs)
            for name, contender in contenders.items():
                figures[f"{part}_{name}_images_per_second"] = statistics.median(contender.rates)
            for name, (a, b) in ratios.items():
                figures[name] = ratio(contenders[a], contenders[b])

        if "large" in only:
            views = views_of("caco")
            contenders = {
                "pil": pillow(files, views, BATCH, workers),
                "caco": ours(FFCVLoader, source, views, BATCH, workers),
                "ffcv_crop": ffcv_crop(source.file, views, count, workers),
                "decode": decode(source, workers),
            }
            keys = {"vs_pil": ("caco", "pil"), "vs_ffcv": ("caco", "ffcv_crop"), "vs_decode": ("caco", "decode")}
            compare("large", contenders, keys)
        if "raw" in only:
            write_splits(Splits(files, None, None), top / "raw", mode="raw", max_resolution=256)
            raw, views = beton(root=str(top / "raw")).pretrain, views_of("caco")
            contenders = {
                "caco": ours(FFCVLoader, raw, views, BATCH, workers),
                "ffcv_crop": ffcv_crop(raw.file, views, count, workers),
            }
            compare("raw", contenders, {"raw_vs_ffcv": ("caco", "ffcv_crop")})
        if "small" in only:
            pixels = np.stack([np.asarray(files.image(i).resize((32, 32))) for i in range(count)])
            small = ImagesInMemory(np.tile(pixels, (-(-SMALL_BATCH * 8 // count), 1, 1, 1))[: SMALL_BATCH * 8], name="small")
            many = ImagesInMemory(np.tile(small.arrays, (10, 1, 1, 1)), name="many")
            views = views_of("cifar")
            contenders = {
                "dataloader": pillow(small, views, SMALL_BATCH, workers),
                "caco": ours(TorchLoader, many, views, SMALL_BATCH, workers),
            }
            compare("small", contenders, {"small_vs_dataloader": ("caco", "dataloader")})
        if "multicrop" in only:
            views = views_of("caco_multicrop")
            contenders = {
                "pil": pillow(files, views, BATCH, workers),
                "caco": ours(FFCVLoader, source, views, BATCH, workers),
            }
            compare("multicrop", contenders, {"multicrop_vs_pil": ("caco", "pil")})
        if "first" in only:
            times = [first_batch(top / "jpeg", workers) for _ in range(1 + arguments.runs)][1:]
            figures["first_batch_s"] = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{name}: {value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f} in {arguments.runs})")
        else:
            print(f"  {name}: {value:.1f}")
    figures |= {"runs": arguments.runs, "workers": workers, "images": count, "environment": environment()}
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
