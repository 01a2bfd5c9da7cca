"""Write a data set as .beton files, which loader=ffcv (and any loader) reads: python -m caco.write

  python -m caco.write data=imagenet data.root=/path/to/imagenet out=/fast/disk/imagenet
  python -m caco.write data=folder data.root=/path/to/photos out=photos max_resolution=500
  python -m caco.train data=beton data.root=photos backbone=resnet18 batch=256

Options, besides data=..., data.KEY=... and --config-dir DIR, which are those of caco.train:

  out=FOLDER          the folder for train.beton, test.beton and their sidecar files (.json)
  mode=jpeg           jpeg | raw (pixels: larger, but nothing to decode)
  quality=null        of JPEGs; null keeps JPEG files as they are, to the byte, and encodes all else with quality 90
  max_resolution=null shrink images whose longer side exceeds this number of pixels
  num_workers=null    number of processes; null is one for each core
"""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from caco import errors
from caco.data.loaders.workers import in_order
from caco.data.sets import beton
from caco.data.sets.reading import file_content
from caco.data.sets.sources import Source, Splits, UnreadableImage
from caco.errors import UserError
from caco.runs.files import alone_in
from caco.runs.paths import expanded, make_folder
from caco.saying import amount

DEFAULT_QUALITY = 90
_JPEGS_SIDE = 65_500  # pixels, of the library that writes them


def write_splits(
    splits: Splits,
    out: Path,
    *,
    mode: str = "jpeg",
    quality: int | None = None,
    max_resolution: int | None = None,
    num_workers: int | None = None,
) -> list[Path]:
    """Write each split as a .beton file into the folder `out`; returns their paths.

    Raises:
        ValueError: a value is out of its range, or an image cannot be read.
    """
    if mode not in ("jpeg", "raw"):
        raise UserError(f"mode: expected jpeg or raw, got {mode!r}")
    if quality is not None and (mode == "raw" or not 1 <= quality <= 100):
        raise UserError(f"quality: expected 1..100 with mode=jpeg, got {quality} with mode={mode}")
    if max_resolution is not None and max_resolution < 1:
        raise UserError(f"max_resolution: expected a positive number of pixels, got {max_resolution}")
    if num_workers is not None and num_workers < 1:
        raise UserError(f"num_workers: expected at least 1, got {num_workers}")
    if splits.pretrain.channels is not None:
        raise UserError(
            "data.channels: a .beton file holds photographs as 8-bit RGB, which changes these images; train on them"
            " directly with data=folder, which reads them in num_workers processes or keeps them in memory"
            " (data.in_memory_mb)"
        )
    make_folder(out, "out")
    parts = {"train": splits.train or splits.pretrain, "test": splits.test}
    if splits.train is not None and splits.pretrain is not splits.train:
        parts["pretrain"] = splits.pretrain
    # What an earlier write left would be taken for a split of these images.
    others = [
        file
        for split in ("train", "test", "pretrain")
        if parts.get(split) is None and (file := out / f"{split}.beton").exists()
    ]
    if others:
        raise UserError(
            f"out: {', '.join(map(str, others))} is there of an earlier set, and this one has no such split: remove it,"
            " or choose another folder"
        )
    with alone_in(out):
        return _written(parts, out, mode, quality, max_resolution, num_workers)


def _written(
    parts: dict[str, Source | None],
    out: Path,
    mode: str,
    quality: int | None,
    max_resolution: int | None,
    num_workers: int | None,
) -> list[Path]:
    written = []
    for split, source in parts.items():
        if source is None:
            continue
        file = out / f"{split}.beton"
        facts: dict[str, Any] = {"name": source.name, "classes": source.classes, "digest_of_source": source.digest()}
        facts |= {"mode": mode, "quality": quality, "max_resolution": max_resolution}
        encoded = _encoded(_Encoder(source, mode, quality, max_resolution), num_workers or os.cpu_count() or 1)
        with tqdm(total=len(source), desc=split, unit=" images", disable=not sys.stderr.isatty()) as bar:
            beton.write(file, _counted(encoded, bar), source.labels, len(source), facts)
        written.append(file)
    return written


class _Encoder:
    """From an image's index to (mode, height, width, content), or to the error if the image cannot be read."""

    def __init__(self, source: Source, mode: str, quality: int | None, max_resolution: int | None):
        self.source, self.mode, self.quality, self.max_resolution = source, mode, quality, max_resolution

    def __call__(self, index: int) -> tuple[int, int, int, bytes] | UnreadableImage:
        try:
            image = self.source.image(index)
        except UnreadableImage as error:
            return error
        longest, most = max(image.size), self.max_resolution
        fits = most is None or longest <= most
        if most is not None and not fits:
            width, height = (max(1, side * most // longest) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if self.mode == "raw":
            return beton.RAW, image.height, image.width, image.tobytes()
        file = self.source.path(index)
        if fits and self.quality is None and file is not None:
            content = file_content(file)
            with Image.open(io.BytesIO(content)) as original:
                if original.format == "JPEG" and original.mode in ("RGB", "L"):
                    return beton.JPEG, image.height, image.width, content
        encoded = io.BytesIO()
        if max(image.size) > _JPEGS_SIDE:
            return UnreadableImage(
                f"{file or f'image {index} of {self.source.name}'}: {image.width} x {image.height} pixels, and a JPEG"
                f" has {_JPEGS_SIDE:,} a side at most: take max_resolution={_JPEGS_SIDE}, or mode=raw"
            )
        image.save(encoded, "JPEG", quality=self.quality or DEFAULT_QUALITY)
        return beton.JPEG, image.height, image.width, encoded.getvalue()


_CHUNK = 16


def _encoded(encoder: _Encoder, num_workers: int) -> Iterator[tuple[int, int, int, bytes]]:
    """All images encoded, in order; at any time only a few for each process are in memory."""
    total = len(encoder.source)

    def encode(start: int) -> list[tuple[int, int, int, bytes] | UnreadableImage]:
        return [encoder(index) for index in range(start, min(start + _CHUNK, total))]

    chunks = in_order(encode, range(0, total, _CHUNK), num_workers, ahead=4)
    try:
        for chunk in chunks:
            for made in chunk:
                if isinstance(made, UnreadableImage):
                    raise UnreadableImage(str(made))
                yield made
    finally:
        chunks.close()


def _counted(items: Iterator[Any], bar: tqdm) -> Iterator[Any]:
    for item in items:
        yield item
        bar.update()


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    from caco.config import folders
    from caco.config.composition import compose, instantiate
    from caco.config.refusals import COMPOSITION_ERRORS, explain

    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    options: dict[str, Any] = {
        "out": None,
        "mode": "jpeg",
        "quality": None,
        "max_resolution": None,
        "num_workers": None,
    }
    with errors.shown(interrupted="nothing half-made is left"):
        overrides = []
        for argument in folders.take(arguments):
            key, _, value = argument.partition("=")
            if key in options:
                number = key not in ("out", "mode")
                if number and value != "null" and not value.isdigit():
                    raise UserError(f"{key}: expected a number or null, got {value!r}")
                options[key] = (None if value == "null" else int(value)) if number else value
            elif key == "data" or key.startswith("data."):
                overrides.append(argument)
            else:
                raise UserError(f"{argument}: expected data=..., data.KEY=... or one of {', '.join(options)}")
        out = options.pop("out")
        if not out:
            raise UserError("expected out=FOLDER, the folder for the files, got none")
        try:
            cfg = compose(["eval=[]", "tracking=ledger", *overrides])
        except COMPOSITION_ERRORS as error:
            raise UserError(explain(error, overrides)) from error
        for file in write_splits(instantiate(cfg.data), expanded(out), **options):
            facts = beton._sidecar(file)
            print(
                f"caco: wrote {file}: {amount(facts['images'], 'image')}, {facts['bytes'] / 1e6:.1f} MB",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
