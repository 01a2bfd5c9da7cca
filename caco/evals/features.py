"""Frozen features of a backbone, computed once and shared by all evaluators: in memory for a round, or on disk for good."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from caco.config import folders
from caco.data.loaders.batches import refuse_unreadable
from caco.data.loaders.bound import Loader
from caco.data.loaders.plain import plain_batches
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.sources import Source, Splits, labels_of
from caco.data.views.augmentation import Views
from caco.errors import UserError
from caco.runs.files import locked, read_json, write_json

Precision = Literal["bf16", "fp32"]


def extract(
    backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device | str, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Features of every image in order, by the backbone in eval mode; leaves its modes, buffers and the RNGs as they were.

    Args:
        batches: (images [b, 3, H, W], labels [b]) pairs.
        precision: "bf16" (autocast) or "fp32".
    Returns:
        features [N, D] float32 and labels [N] int64, both on the CPU, where a large set fits.
    Raises:
        ValueError: unknown precision, no batches, an output that is not [b, D], a feature that is not finite.
    """
    features, labels = [], []

    def take(features_bD: Tensor, labels_b: Tensor) -> None:
        features.append(features_bD.float())
        labels.append(labels_b)

    for_each_batch(backbone, batches, take, device=device, precision=precision)
    if not features:
        raise ValueError("features: expected at least one batch of images, got none")
    return torch.cat(features), torch.cat(labels)


def for_each_batch(
    backbone: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    take: Callable[[Tensor, Tensor], Any],
    *,
    device: torch.device | str,
    precision: Precision,
) -> None:
    """As `extract`, but gives each batch's features [b, D] (in the backbone's own type, on the CPU) and labels to `take`."""
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision: expected bf16 or fp32, got {precision!r}")
    device = torch.device(device)
    was_training = {module: module.training for module in backbone.modules()}
    cuda_devices = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    try:
        backbone.eval()
        # Neither the batches' making nor a backbone that draws may be seen by the training that goes on afterwards.
        with torch.random.fork_rng(devices=cuda_devices), torch.inference_mode(), autocast:
            for images, labels_b in batches:
                images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
                features_bD = backbone(images)
                if features_bD.ndim != 2 or len(features_bD) != len(images):
                    raise UserError(f"backbone: expected features [{len(images)}, D], got {list(features_bD.shape)}")
                if not torch.isfinite(features_bD).all():
                    raise UserError("features: expected finite numbers, got inf or nan from the backbone")
                take(features_bD.cpu(), labels_b)
    finally:
        for module, training in was_training.items():
            module.training = training


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products without TF32 or bfloat16, whatever training allows itself: what we count must not depend on that."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def network_digest(network: nn.Module) -> str:
    """Sixteen hexadecimal digits of what a network computes: its structure, every parameter and buffer, and code of the user's own."""
    code = folders.code_of({type(module).__module__ for module in network.modules()})
    state = hashlib.sha256(f"{network!r}{code or ''}".encode())
    for name, tensor in network.state_dict().items():
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()[:16]


def key_of(made_from: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


class FeatureFiles:
    """Features on disk, each file found again by what it was made from; bounded memory, whatever the set's size.

    A file is written from its first row to its last under another name and renamed when it is whole; one that a kill cut
    off is gone on with. Two processes that want the same file make it once.

    Args:
        folder: where they are; made when needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def get(
        self,
        made_from: dict[str, Any],
        num_images: int,
        make: Callable[[int, Callable[[Tensor, Tensor], Any]], None],
        *,
        batch: int,
    ) -> Tensor:
        """Features [num_images, D], mapped into memory and not read.

        Args:
            made_from: plain values that decide every number.
            make: `make(first, take)` calls take(features, labels) for each batch from image `first` on.
            batch: rows are gone on with at a multiple of it, so that the same batches give the same bits.
        Raises:
            OSError: the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key_of(made_from)}.bin"
        with locked(path.with_suffix(".lock"), wait_s=24 * 3600):
            if not path.is_file():
                self._write(path, made_from, num_images, make, batch)
        about = read_json(path.with_suffix(".json"))
        dtype, width = getattr(torch, about["dtype"]), about["width"]
        flat = torch.from_file(str(path), shared=False, size=num_images * width, dtype=dtype)
        return flat.view(num_images, width)

    def _write(self, path: Path, made_from: dict[str, Any], num_images: int, make: Callable, batch: int) -> None:
        partial, header = path.with_suffix(".partial"), path.with_suffix(".json")
        about = read_json(header)
        row_bytes = about["width"] * getattr(torch, about["dtype"]).itemsize if about else 0
        done = partial.stat().st_size // row_bytes // batch * batch if about and partial.is_file() else 0
        with open(partial, "r+b" if done else "wb") as file:
            file.seek(done * row_bytes)
            file.truncate()

            def take(features_bD: Tensor, labels_b: Tensor) -> None:
                if file.tell() == 0:
                    dtype = str(features_bD.dtype).removeprefix("torch.")
                    write_json(header, {"width": features_bD.shape[1], "dtype": dtype, "made_from": made_from})
                file.write(features_bD.contiguous().view(torch.uint8).numpy().data)

            if done < num_images:
                make(done, take)
            file.flush()
            os.fsync(file.fileno())
            width = read_json(header)["width"]
            dtype = getattr(torch, read_json(header)["dtype"])
            assert file.tell() == num_images * width * dtype.itemsize, "every image gives one row"
        os.replace(partial, path)


class FeatureStore:
    """The train and test images and their features in this round; each feature is computed at most once a round.

    Images of small sets are transformed once and stay in memory across rounds, those of large ones are read again.

    Args:
        splits: only `train` and `test` are used.
        views: whose plain view of each image is taken.
        batch: images a forward pass.
        num_workers: reading processes for sets that are not in memory.
        cache_bytes: a split whose transformed images take no more than this stays in memory.
        loader: settings of the loader that training uses, for evaluators that train on augmented views.
        folder: where features and evaluators' checkpoints are kept on disk; None keeps features in memory.
        cache: another folder for the features, which several evaluations may share.
        overlap: whether evaluators that bring images of their own may test on training images.
        say: is told what an evaluator that takes its time is doing; `passing` lines may be left out.
    """

    def __init__(
        self,
        splits: Splits,
        views: Views,
        *,
        batch: int,
        device: torch.device | str,
        precision: Precision,
        num_workers: int = 0,
        cache_bytes: int = 2**30,
        loader: Loader | None = None,
        folder: Path | None = None,
        cache: Path | None = None,
        overlap: Literal["refuse", "allow"] = "refuse",
        say: Callable[..., None] = lambda text, passing=False: None,
    ) -> None:
        if batch < 1:
            raise UserError(f"batch: expected at least 1, got {batch}")
        self.splits = splits
        self.views, self.batch, self.device, self.precision = views, batch, torch.device(device), precision
        self.num_workers, self.cache_bytes = num_workers, cache_bytes
        self.loader: Loader = loader if loader is not None else TorchLoader(num_workers=num_workers)
        for source in (splits.train, splits.test):
            if source is not None:
                refuse_unreadable(source, self.loader.corrupt)
        self.folder = None if folder is None else Path(folder)
        self.overlap, self.say = overlap, say
        self._files = None if folder is None else FeatureFiles(cache or Path(folder) / "features")
        self._digests: dict[int, str] = {}
        self._images: dict[str, Tensor] = {}
        self._labels: dict[str, Tensor] = {}
        self._features: dict[str, Tensor] = {}
        self._done: dict[str, np.ndarray] = {}

    def labels(self, purpose: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels int64 of all train and of all test images.

        Raises:
            ValueError: `purpose` needs labels and a split has none; the test images have a class that training has not.
        """
        train, test = self.splits.labelled(purpose)
        require_classes(train, test)
        return labels_of(train), labels_of(test)

    def features(self, backbone: nn.Module, split: Literal["train", "test"], indices: np.ndarray | None = None) -> Tensor:
        """Features [n, D] of these images (None: all) of a split, on the CPU; those not yet known are computed.

        float32, or what the backbone gives (bf16) where they are mapped from a file.
        """
        source = getattr(self.splits, split)
        if self._files is not None:
            return self.of(backbone, source if indices is None else source.part(indices, source.name), self.views)
        num_images = len(source)
        wanted = np.arange(num_images) if indices is None else indices
        done = self._done.setdefault(split, np.zeros(num_images, dtype=bool))
        todo = wanted[~done[wanted]]
        if len(todo):
            new, _ = extract(backbone, self._batches(split, todo), device=self.device, precision=self.precision)
            if split not in self._features:
                self._features[split] = torch.empty(num_images, new.shape[1])
            self._features[split][torch.from_numpy(todo)] = new
            done[todo] = True
        return self._features[split] if indices is None else self._features[split][torch.from_numpy(indices)]

    def of(self, backbone: nn.Module, source: Source, views: Views) -> Tensor:
        """Features [N, D] of the plain views of any images, on the CPU; from a file where features are kept on disk."""

        def make(first: int, take: Callable[[Tensor, Tensor], Any]) -> None:
            rest = source if first == 0 else source.part(np.arange(first, len(source)), source.name)
            batches = plain_batches(rest, views, batch=self.batch, num_workers=self.num_workers, corrupt=self.loader.corrupt)
            for_each_batch(backbone, batches, take, device=self.device, precision=self.precision)

        if self._files is None:
            features = []
            make(0, lambda features_bD, _: features.append(features_bD.float()))
            return torch.cat(features)
        plain = [views.size, views.plain_crop, views.plain_interpolation, views.mean, views.std]
        made_from = {
            "backbone": self.digest_of(backbone),
            "images": source.digest(),
            "plain_view": plain,
            "precision": self.precision,
            "device": self.device.type,
            **({"corrupt": "skip"} if self.loader.corrupt == "skip" else {}),
        }
        return self._files.get(made_from, len(source), make, batch=self.batch)

    def digest_of(self, backbone: nn.Module) -> str:
        """The backbone's digest, computed once a round."""
        if id(backbone) not in self._digests:
            self._digests[id(backbone)] = network_digest(backbone)
        return self._digests[id(backbone)]

    def forget(self) -> None:
        """Drops the features, not the images: to be called when the backbone changes."""
        self._features.clear()
        self._done.clear()
        self._digests.clear()

    def _batches(self, split: str, indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        source = getattr(self.splits, split)
        if split not in self._images:
            if 12 * self.views.size**2 * len(source) > self.cache_bytes:  # three float32 a pixel
                some = source.part(indices, source.name)
                yield from plain_batches(some, self.views, batch=self.batch, num_workers=self.num_workers, corrupt=self.loader.corrupt)
                return
            every = plain_batches(source, self.views, batch=self.batch, num_workers=self.num_workers, corrupt=self.loader.corrupt)
            self._images[split], self._labels[split] = (torch.cat(parts) for parts in zip(*every, strict=True))
        for chunk in torch.from_numpy(indices).split(self.batch):
            yield self._images[split][chunk], self._labels[split][chunk]


def require_classes(train: Source, test: Source) -> None:
    """Every class of the test images is among the training images.

    Raises:
        ValueError: one is not; it is named.
    """
    unseen = np.setdiff1d(labels_of(test), labels_of(train))
    if len(unseen):
        names = [test.classes[c] if test.classes else str(c) for c in unseen]
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise UserError(
            f"{test.name}: expected no class that {train.name} has no image of, got {len(names)}: {shown}. Nothing can be "
            "right about their images: give training images of them, or take the class out of the test images"
        )
