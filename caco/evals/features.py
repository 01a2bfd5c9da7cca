"""Frozen features of a backbone, computed once an evaluation round and shared by all evaluators."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from caco.data.loader import plain_batches
from caco.data.sources import Splits
from caco.data.views import Views

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
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision: expected bf16 or fp32, got {precision!r}")
    device = torch.device(device)
    features, labels = [], []
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
                    raise ValueError(f"backbone: expected features [{len(images)}, D], got {list(features_bD.shape)}")
                features.append(features_bD.float().cpu())
                labels.append(labels_b)
    finally:
        for module, training in was_training.items():
            module.training = training
    if not features:
        raise ValueError("features: expected at least one batch of images, got none")
    features_ND = torch.cat(features)
    if not torch.isfinite(features_ND).all():
        raise ValueError("features: expected finite numbers, got inf or nan from the backbone")
    return features_ND, torch.cat(labels)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products without TF32 or bfloat16, whatever training allows itself: what we count must not depend on that."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class FeatureStore:
    """The train and test images and their features in this round; each feature is computed at most once a round.

    Images of small sets are transformed once and stay in memory across rounds, those of large ones are read again.

    Args:
        splits: only `train` and `test` are used.
        views: whose plain view of each image is taken.
        batch: images a forward pass.
        num_workers: reading processes for sets that are not in memory.
        cache_bytes: a split whose transformed images take no more than this stays in memory.
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
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        self.splits = splits
        self.views, self.batch, self.device, self.precision = views, batch, torch.device(device), precision
        self.num_workers, self.cache_bytes = num_workers, cache_bytes
        self._images: dict[str, Tensor] = {}
        self._labels: dict[str, Tensor] = {}
        self._features: dict[str, Tensor] = {}
        self._done: dict[str, np.ndarray] = {}

    def labels(self, purpose: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels int64 of all train and of all test images.

        Raises:
            ValueError: `purpose` needs labels and a split has none.
        """
        train, test = self.splits.labelled(purpose)
        return train.labels, test.labels

    def features(self, backbone: nn.Module, split: Literal["train", "test"], indices: np.ndarray | None = None) -> Tensor:
        """Features [n, D] float32 of these images (None: all) of a split, on the CPU; those not yet known are computed."""
        num_images = len(getattr(self.splits, split))
        everything = indices is None
        indices = np.arange(num_images) if everything else indices
        done = self._done.setdefault(split, np.zeros(num_images, dtype=bool))
        todo = indices[~done[indices]]
        if len(todo):
            new, _ = extract(backbone, self._batches(split, todo), device=self.device, precision=self.precision)
            if split not in self._features:
                self._features[split] = torch.empty(num_images, new.shape[1])
            self._features[split][torch.from_numpy(todo)] = new
            done[todo] = True
        return self._features[split] if everything else self._features[split][torch.from_numpy(indices)]

    def forget(self) -> None:
        """Drops the features, not the images: to be called when the backbone changes."""
        self._features.clear()
        self._done.clear()

    def _batches(self, split: str, indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        source = getattr(self.splits, split)
        if split not in self._images:
            if self.views.plain(source.image(0)).nbytes * len(source) > self.cache_bytes:
                some = source.part(indices, source.name)
                yield from plain_batches(some, self.views, batch=self.batch, num_workers=self.num_workers)
                return
            every = plain_batches(source, self.views, batch=self.batch, num_workers=self.num_workers)
            self._images[split], self._labels[split] = (torch.cat(parts) for parts in zip(*every, strict=True))
        for chunk in torch.from_numpy(indices).split(self.batch):
            yield self._images[split][chunk], self._labels[split][chunk]
