"""Computes the features of images for a checked configuration of caco.embed, and writes them into one file."""

import json
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from caco import distributed
from caco.config.channels_needed import channels_of
from caco.config.composition import instantiate
from caco.config.pretrained import Location
from caco.data.sets.sources import Source
from caco.data.views.augmentation import Views
from caco.engine.assembly import build_splits, pick_device, refuse_unfit_backbone
from caco.engine.channels import backbone_of, noted, views_of
from caco.engine.evaluating import load_pretrained
from caco.errors import FileError, UserError
from caco.evals.features import FeatureStore
from caco.runs.paths import expanded
from caco.saying import Sometimes, amount, clock, doing

ROWS = 8192  # feature rows written at a time


def run_embedding(cfg: DictConfig, location: Location | None, to: Path, aside: Path) -> None:
    """Write the features of all images into one file. They are first kept in `aside`, batch by batch; the finished file
    then gets its name. A file that caco.embed has already written from the same inputs is kept as it is.

    Args:
        location: the run whose backbone is used; None with weights=.
        to: FILE.npz or FILE.parquet. aside: a folder for unfinished work, removed at the end.
    Raises:
        UserError: `to` holds something else, or an image cannot be read.
    """
    began = time.monotonic()
    device = pick_device(cfg.device)
    distributed.start(device)
    try:
        main = distributed.is_main()
        refuse_unfit_backbone(cfg)
        of_run = {} if location is None else noted(location.run_dir)
        if of_run.get("channels") != channels_of(cfg):
            raise UserError(
                f"data.channels: this backbone was trained on {_of_channels(of_run.get('channels'))}, but these images"
                f" would be read as {_of_channels(channels_of(cfg))}; expected"
                f" data.channels={of_run.get('channels', 'null')}"
            )
        backbone = backbone_of(cfg.backbone, channels_of(cfg))
        load_pretrained(cfg, location, backbone)
        backbone.to(device).to(memory_format=torch.channels_last).eval()
        say = Sometimes(main, bars=True)
        with doing("reading the images"):
            splits = build_splits(cfg)
        views = views_of(cfg, splits, run_dir=None if location is None else location.run_dir, say=say)
        sources = [
            source for source in dict.fromkeys([splits.pretrain, splits.train, splits.test]) if source is not None
        ]
        for source in sources:
            source.look(say)
        store = FeatureStore(
            splits, views, batch=cfg.batch, device=device, precision=cfg.precision, loader=instantiate(cfg.loader),
            folder=aside, say=say,
        )  # fmt: skip
        store.all_ranks = distributed.world() > 1
        about = distributed.together(lambda: _about(cfg, store, sources, backbone, views) if main else {})[0]
        there = distributed.together(lambda: already(to, about) if main else None)[0]
        if there is None:
            features = [store.of(backbone, source, views) for source in sources]
            distributed.together(lambda: _write(to, aside, features, sources, cfg, about) if main else None)
        if main:
            shutil.rmtree(aside, ignore_errors=True)
            number = sum(len(source) for source in sources)
            done = f"finished in {clock(time.monotonic() - began)}" if there is None else f"finished already on {there}"
            print(f"caco: {done}: {to} (features of {amount(number, 'image')})", file=sys.stderr)
    finally:
        distributed.stop()


def _of_channels(channels: int | None) -> str:
    return (
        "photographs" if channels is None else f"images as they are stored, of {channels} channel{'s' * (channels > 1)}"
    )


def _about(
    cfg: DictConfig, store: FeatureStore, sources: list[Source], backbone: torch.nn.Module, views: Views
) -> dict[str, Any]:
    """Everything that decides the features, as plain values."""
    return {
        "backbone": store.digest_of(backbone),
        "images": [source.digest() for source in sources],
        "plain_view": [views.size, views.plain_crop, views.plain_interpolation, views.colours, views.mean, views.std],
        "precision": cfg.precision,
        "device": store.device.type,
    }


def already(to: Path, about: dict[str, Any]) -> str | None:
    """The day on which the file was written, if these features are in it already; None if there is no such file.

    Raises:
        UserError: the file was made by another program or from something else.
    """
    if not to.exists():
        return None
    try:
        if to.suffix == ".npz":
            with np.load(to, allow_pickle=False) as file:
                found = json.loads(str(file["about"]))
        else:
            from pyarrow import parquet

            found = json.loads(parquet.read_schema(to).metadata[b"caco"])
    except Exception as error:  # noqa: BLE001 - a file that caco did not write can make its reader raise any error
        raise UserError(
            f"to: {to} exists and was not written by caco.embed; choose another name, or remove it"
        ) from error
    if found != about:
        differs = ", ".join(name for name in about if found.get(name) != about[name])
        raise UserError(f"to: {to} exists and was made from another {differs}; choose another name, or remove it")
    return time.strftime("%Y-%m-%d", time.localtime(to.stat().st_mtime))


def names_of(source: Source, root: Path | None) -> list[str]:
    """The name of each image: its file below the root, or, for a set without a file per image, the set's name and the
    image's position.
    """
    if not len(source) or source.path(0) is None:
        return [f"{source.name}/{index}" for index in range(len(source))]
    paths = [Path(path) for path in map(source.path, range(len(source))) if path is not None]
    inside = root is not None and all(path.is_relative_to(root) for path in paths)
    names = [str(path.relative_to(root)) if inside and root is not None else str(path) for path in paths]
    # A file's name may be any bytes, so what is not UTF-8 is replaced.
    return [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]


def _write(
    to: Path, aside: Path, features: list[Tensor], sources: list[Source], cfg: DictConfig, about: dict[str, Any]
) -> None:
    root = cfg.data.get("root")
    files = [name for source in sources for name in names_of(source, None if root is None else expanded(root))]
    labels = [source.labels for source in sources]
    label = (
        None
        if any(one is None or one.ndim != 1 for one in labels)
        else np.concatenate([one for one in labels if one is not None])
    )
    unfinished = aside / to.name
    writer = _npz if to.suffix == ".npz" else _parquet
    try:
        writer(unfinished, features, files, label, sources[0].classes, json.dumps(about))
        unfinished.replace(to)
    except OSError as error:  # a full disk's says not where
        raise FileError(error.errno, error.strerror or str(error), str(to)) from error


def _pieces(features: list[Tensor]) -> Iterator[np.ndarray]:
    """The features in order, as float32 arrays [b, D] with b at most ROWS."""
    for part in features:
        for rows in part.split(ROWS):
            yield rows.float().numpy()


def _npz(
    path: Path,
    features: list[Tensor],
    files: list[str],
    label: np.ndarray | None,
    classes: list[str] | None,
    about: str,
) -> None:
    others = {"files": np.array(files), "about": np.array(about)}
    if label is not None:
        others |= {"label": label} | ({} if classes is None else {"classes": np.array(classes)})
    with zipfile.ZipFile(path, "w") as archive:  # entries without dates, so that the same features give the same bytes
        with archive.open(zipfile.ZipInfo("features.npy"), "w", force_zip64=True) as file:
            shape = (len(files), features[0].shape[1])
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for rows in _pieces(features):
                file.write(np.ascontiguousarray(rows, dtype="<f4").data)
        for name, array in others.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _parquet(
    path: Path,
    features: list[Tensor],
    files: list[str],
    label: np.ndarray | None,
    classes: list[str] | None,
    about: str,
) -> None:
    import pyarrow
    from pyarrow import parquet

    width, first = features[0].shape[1], 0
    fields = [("file", pyarrow.string()), ("features", pyarrow.list_(pyarrow.float32(), width))]
    fields += [] if label is None else [("label", pyarrow.int64())]
    names = {} if classes is None else {"classes": json.dumps(classes)}
    schema = pyarrow.schema(fields, metadata={"caco": about, **names})
    with parquet.ParquetWriter(path, schema, compression="none") as writer:
        for rows in _pieces(features):
            part = slice(first, first + len(rows))
            columns = [
                pyarrow.array(files[part]),
                pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), width),
            ]
            columns += [] if label is None else [pyarrow.array(label[part])]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
            first += len(rows)
