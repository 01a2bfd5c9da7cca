"""How fast caco's loaders deliver views, compared with torchvision on Pillow, with FFCV's own operations, and with
decoding alone.

Every contender delivers normalised float32 views on the CPU, except decoding alone and FFCV's crop, which delivers
uint8. All contenders take turns, so that changes in the machine's speed affect all of them; a ratio compares values of
the same turn.

    python benchmarks/loader.py --json loader.json           on synthetic photographs; takes minutes
    python benchmarks/loader.py --full --photos PHOTOS       on your zip or folder of JPEGs, as for the published
                                                             figures

Synthetic photographs are noise whose power falls with the square of the frequency, as in real photographs, with blots
that have edges. They have 500 x 375 pixels, and about as many bytes and as much decoding time as an ImageNet image.

pil         the baseline: torchvision's v1 transforms on Pillow images, DataLoader, persistent workers, prefetch 4
ffcv_crop   FFCV's own decoder, random resized crop and flip, compiled by numba, one pipeline per view; left out
            without FFCV
decode      only decoding each JPEG once with libturbojpeg, with the same number of threads; left out without it
caco        loader=ffcv with all augmentations of the paper (augmentation=caco, caco_multicrop, cifar) from a .beton;
            loader=torch if loader=ffcv cannot run
files       the same with loader=torch from the JPEG files themselves
"""

import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image, ImageFilter

if not __package__:  # run as a file: import caco and benchmarks from this checkout, as python -m benchmarks.loader does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import caco  # noqa: F401, I001 - before torch, because it sets torch's instruction set
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1

from benchmarks.common import Report, formatted, parser, photos_at, ratios, say, spread, turns
from caco.config.composition import CONF, instantiate
from caco.data.loaders.ffcv_loader import FFCVLoader, what_ffcv_lacks
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.beton import beton
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.sources import Source, Splits
from caco.data.views import native
from caco.data.views.augmentation import Views
from caco.saying import per_second
from caco.write import write_splits

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("large", "raw", "small", "multicrop", "first")
COPIES = 2  # how often an epoch uses each photograph; makes epochs long enough for their start-up not to matter


class Sizes(NamedTuple):
    photos: int | None  # number of photographs; None: all of --photos, or 250 synthetic ones
    width: int  # of a synthetic photograph, in pixels
    batch: int
    small_batch: int  # for images of 32 pixels
    small_batches: int
    runs: int


DEFAULT, FULL, TINY = Sizes(125, 500, 50, 500, 4, 3), Sizes(None, 500, 50, 500, 8, 5), Sizes(4, 60, 4, 8, 2, 1)


def views_of(name: str) -> Views:
    return instantiate(cast(DictConfig, OmegaConf.load(CONF / "augmentation" / f"{name}.yaml")))


class PillowViews(Dataset):
    """An augmentation recipe written with torchvision's v1 transforms, as is usual."""

    def __init__(self, source: Source, views: Views):
        self.source = source
        self.transforms = [
            self.transform(view, size, views) for view, size in zip(views._views, views.sizes, strict=True)
        ]

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
        return v1.Compose([*steps, v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(views.mean, views.std)])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        image = self.source.image(index)
        return [transform(image) for transform in self.transforms]


def blurred(image: Image.Image, sigmas: list[float]) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(*sigmas))))


class Contender(NamedTuple):
    epoch: Callable[[], Iterator]  # makes every image's views once
    images: int
    close: Callable[[], None] = lambda: None

    def rate(self) -> float:
        """Images per second over one epoch."""
        started = time.perf_counter()
        for _ in self.epoch():
            pass
        return self.images / (time.perf_counter() - started)


def pillow(source: Source, views: Views, batch: int, workers: int) -> Contender:
    loader = DataLoader(
        PillowViews(source, views), batch, shuffle=True, num_workers=workers, persistent_workers=True,
        prefetch_factor=4,
        drop_last=True,
    )  # fmt: skip
    return Contender(lambda: iter(loader), len(source) // batch * batch)


def ours(kind: type, source: Source, views: Views, batch: int, workers: int) -> Contender:
    loader = kind(num_workers=workers).bind(source, views, batch=batch, seed=0)
    epochs = iter(range(10**6))
    return Contender(lambda: loader.epoch(next(epochs)), len(source) // batch * batch, loader.close)


def ffcv_crop(file: Path, views: Views, images: int, batch: int, workers: int) -> Contender:
    """FFCV's own way to make several views: one pipeline of its operations per view."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    import caco.data.loaders.ffcv_pipeline  # noqa: F401  imports ffcv without its side effects

    def spec(size: int) -> PipelineSpec:
        return PipelineSpec(
            "image",
            decoder=RandomResizedCropRGBImageDecoder((size, size), scale=(0.2, 1.0)),
            transforms=[RandomHorizontalFlip(), ToTensor()],
        )

    names = ["image", *(f"view{v}" for v in range(1, views.num_views))]
    pipelines = {name: spec(size) for name, size in zip(names, views.sizes, strict=True)}
    loader = Loader(
        str(file),
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        pipelines={**pipelines, "label": None},
    )
    return Contender(lambda: iter(loader), images // batch * batch)


def decode(source: Any, workers: int) -> Contender:
    """Decode every JPEG with libturbojpeg and do nothing else."""
    records, jpegs = source.records["image"], [
        bytes(source._bytes[int(place) :][:size]) for place,
        size in zip(source.records["image"]["place"], source._sizes, strict=True)
    ]  # fmt: skip
    heights, widths = records["height"].tolist(), records["width"].tolist()
    buffer_bytes = max(3 * height * width for height, width in zip(heights, widths, strict=True))
    library = ctypes.CDLL("libturbojpeg.so.0")
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDecompress2.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        *[ctypes.c_int] * 5,
    ]

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
from caco.config.composition import instantiate, compose
from caco.data.loaders.ffcv_loader import FFCVLoader
cfg = compose(["data=beton", "data.root=" + sys.argv[1]])
views, source = instantiate(cfg.augmentation), instantiate(cfg.data).pretrain
started = time.perf_counter()
next(FFCVLoader(num_workers=int(sys.argv[2])).bind(source, views, batch=int(sys.argv[3]), seed=0).epoch(0))
print(time.perf_counter() - started, flush=True)
"""


def first_batch(root: Path, batch: int, workers: int) -> float:
    """Seconds from the construction of a loader to its first batch in a new process, including the import of FFCV."""
    command = [sys.executable, "-c", FIRST_BATCH, str(root), str(workers), str(batch)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout.split()[-1])


def lacks_ffcv() -> str | None:
    return "FFCV is not installed" if importlib.util.find_spec("ffcv") is None else None


class Comparison:
    """The parts of the benchmark, each a method; `files` are the photographs, `top` is for temporary files."""

    def __init__(self, report: Report, files: Source, top: Path, *, sizes: Sizes, runs: int, workers: int):
        self.report, self.files, self.top, self.sizes, self.runs, self.workers = (
            report,
            files,
            top,
            sizes,
            runs,
            workers,
        )
        write_splits(Splits(files, None, None), top / "jpeg")
        self.source = beton(root=str(top / "jpeg")).pretrain

    def caco(self, source: Source, views: Views) -> Contender:
        lacking = what_ffcv_lacks(source)
        if self.report.leave_out("loader=ffcv (caco is loader=torch then)", lacking):
            return ours(TorchLoader, source, views, self.sizes.batch, self.workers)
        return ours(FFCVLoader, source, views, self.sizes.batch, self.workers)

    def ffcv(self, source: Any, views: Views) -> dict[str, Contender]:
        """The contender ffcv_crop, if FFCV is installed."""
        if self.report.leave_out("FFCV's own crop", lacks_ffcv()):
            return {}
        say("    numba compiles FFCV's own crop")
        return {"ffcv_crop": ffcv_crop(source.file, views, len(source), self.sizes.batch, self.workers)}

    def compare(self, part: str, what: str, contenders: dict[str, Contender], keys: dict[str, tuple[str, str]]) -> None:
        say(f"{part}: {what}: {', '.join(contenders)}")
        rates = turns({name: contender.rate for name, contender in contenders.items()}, self.runs)
        medians = {name: spread(values)["median"] for name, values in rates.items()}
        self.report.figures |= {f"{part}_{name}_images_per_second": rate for name, rate in medians.items()}
        for key, (a, b) in keys.items():
            if a in rates and b in rates:
                self.report.figures[key] = ratio = ratios(rates[a], rates[b])
                self.report.row(
                    f"{what}: {a} / {b}",
                    key,
                    formatted(ratio),
                    f"{per_second(medians[a])} and {per_second(medians[b])} images per second",
                )
        for contender in contenders.values():
            contender.close()

    def large(self) -> None:
        views = views_of("caco")
        contenders = {
            "pil": pillow(self.files, views, self.sizes.batch, self.workers),
            "caco": self.caco(self.source, views),
            "files": ours(TorchLoader, self.files, views, self.sizes.batch, self.workers),
            **self.ffcv(self.source, views),
        }
        missing = "libturbojpeg is not installed" if native.turbojpeg() is None else None
        if not self.report.leave_out("decoding alone", missing):
            contenders["decode"] = decode(self.source, self.workers)
        keys = {
            "vs_pil": ("caco", "pil"),
            "vs_ffcv": ("caco", "ffcv_crop"),
            "vs_decode": ("caco", "decode"),
            "files_vs_beton": ("files", "caco"),
        }
        self.compare("large", "two views at 224 from JPEGs", contenders, keys)

    def raw(self) -> None:
        write_splits(Splits(self.files, None, None), self.top / "raw", mode="raw", max_resolution=256)
        raw, views = beton(root=str(self.top / "raw")).pretrain, views_of("caco")
        contenders = {"caco": self.caco(raw, views), **self.ffcv(raw, views)}
        self.compare("raw", "two views at 224 from raw 256 px", contenders, {"raw_vs_ffcv": ("caco", "ffcv_crop")})

    def small(self) -> None:
        batch, views = self.sizes.small_batch, views_of("cifar")
        pixels = np.stack([np.asarray(self.files.image(i).resize((32, 32))) for i in range(len(self.files))])
        count = batch * self.sizes.small_batches
        few = ImagesInMemory(np.tile(pixels, (-(-count // len(pixels)), 1, 1, 1))[:count], name="small")
        many = ImagesInMemory(np.tile(few.arrays, (10, 1, 1, 1)), name="many")
        contenders = {
            "dataloader": pillow(few, views, batch, self.workers),
            "caco": ours(TorchLoader, many, views, batch, self.workers),
        }
        self.compare(
            "small", "two views at 32 from memory", contenders, {"small_vs_dataloader": ("caco", "dataloader")}
        )

    def multicrop(self) -> None:
        views = views_of("caco_multicrop")
        contenders = {
            "pil": pillow(self.files, views, self.sizes.batch, self.workers),
            "caco": self.caco(self.source, views),
        }
        self.compare(
            "multicrop", "two views at 224 and six at 96 from JPEGs", contenders, {"multicrop_vs_pil": ("caco", "pil")}
        )

    def first(self) -> None:
        if self.report.leave_out("the first batch of loader=ffcv", what_ffcv_lacks(self.source)):
            return
        say(f"first: the first batch of {1 + self.runs} new processes")
        times = spread(
            [first_batch(self.top / "jpeg", self.sizes.batch, self.workers) for _ in range(1 + self.runs)][1:]
        )
        self.report.figures["first_batch_s"] = times
        self.report.row(
            "seconds to the first batch, new process, import of FFCV included", "first_batch_s", formatted(times), ""
        )


def photos_in(given: Path | None, top: Path, sizes: Sizes) -> Source:
    """The photographs of --photos, or synthetic ones, each COPIES times, cut to a whole number of batches.

    Raises:
        ValueError: they do not fill one batch.
    """
    files = photos_at(given, top / "photos", sizes.photos or 250, sizes.width)
    chosen = np.linspace(0, len(files) - 1, min(len(files), sizes.photos or len(files))).astype(int)
    count = COPIES * len(chosen) // sizes.batch * sizes.batch
    if count == 0:
        raise ValueError(f"--photos: expected at least {-(-sizes.batch // COPIES)} JPEGs, got {len(files)}")
    return files.part(chosen[np.arange(count) % len(chosen)], "photos")


def main() -> None:
    options = parser(
        __doc__,
        runs="This many turns are measured, after one that warms up. The default is 3.",
        full="Measure with all photographs and longer epochs, for 5 turns.",
        photos=True,
    )
    options.add_argument(
        "--only", default=",".join(PARTS), help="Measure only these parts. The default is %(default)s."
    )
    arguments = options.parse_args()
    only = arguments.only.split(",")
    if unknown := set(only) - set(PARTS):
        options.error(f"--only: expected parts of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    if arguments.photos is not None and not arguments.photos.exists():
        options.error(f"--photos: expected a zip or a folder of JPEGs, got {arguments.photos}, which does not exist")
    sizes = FULL if arguments.full else TINY if arguments.tiny else DEFAULT
    runs = arguments.runs or sizes.runs
    torch.set_num_threads(arguments.workers)
    report = Report(["what", "key", "ratio (min to max)", "details"])
    with tempfile.TemporaryDirectory() as temporary:
        try:
            files = photos_in(arguments.photos, Path(temporary), sizes)
        except ValueError as error:
            options.error(str(error))
        comparison = Comparison(report, files, Path(temporary), sizes=sizes, runs=runs, workers=arguments.workers)
        for part in PARTS:
            if part in only:
                getattr(comparison, part)()
    report.figures |= {"runs": runs, "workers": arguments.workers, "images": len(files)}
    report.figures["photos"] = "given" if arguments.photos else "made"
    report.end(arguments.json)


if __name__ == "__main__":
    main()
