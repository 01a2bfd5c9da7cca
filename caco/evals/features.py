"""Frozen features of a backbone, computed once and shared by all evaluators: in memory for a round, or on disk for
good.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from caco import distributed
from caco.data.loaders.batches import refuse_unreadable
from caco.data.loaders.bound import Loader
from caco.data.loaders.plain import plain_batches, plain_pixels
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.overlap import Overlap
from caco.data.sets.sources import Source, Splits, UnreadableImage, labels_of
from caco.data.views.augmentation import Views
from caco.errors import UserError
from caco.evals.extraction import Precision, for_each_batch, in_one, network_digest
from caco.evals.feature_files import FeatureFiles, key_of
from caco.runs.checkpoint import Checkpoints
from caco.saying import Say, counted, silent


class FeatureStore:
    """The train and test images and their features in this round; each feature is computed at most once a round.

    Images of small sets are transformed once and stay in memory across rounds, those of large ones are read again, by
    the workers that the loader has. Where all ranks run an evaluator (`all_ranks`, which Evaluation sets), `features`,
    `of` and `outputs` are collectives: each rank reads and computes a share, and rank 0 gets the result, the others an
    empty tensor.

    Args:
        splits: only `train` and `test` are used.
        views: whose plain view of each image is taken.
        batch: images a forward pass.
        cache_bytes: a split whose transformed images take no more than this stays in memory.
        loader: settings of the loader that training uses: its workers read images, and evaluators train with it on
            augmented views.
        folder: where features and evaluators' checkpoints are kept on disk; None keeps features in memory, and no
            checkpoint.
        cache: another folder for the features, which several evaluations may share.
        passing: while training: features stay in memory all the same, and an evaluator's checkpoints are removed after
            its results.
        overlap: whether evaluators that bring images of their own may test on training images.
        compared: finds images that sets share, and keeps what it knows of them.
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
        cache_bytes: int = 2**28,
        loader: Loader | None = None,
        folder: Path | None = None,
        cache: Path | None = None,
        passing: bool = False,
        overlap: Literal["refuse", "allow"] = "refuse",
        compared: Overlap | None = None,
        say: Say = silent,
    ) -> None:
        if batch < 1:
            raise UserError(f"batch: expected at least 1, got {batch}")
        self.splits = splits
        self.views, self.batch, self.device, self.precision = views, batch, torch.device(device), precision
        self.cache_bytes = cache_bytes
        self.loader: Loader = loader if loader is not None else TorchLoader(num_workers=0)
        self.num_workers = self.loader.num_workers
        for source in (splits.train, splits.test):
            if source is not None:
                refuse_unreadable(source, self.loader.corrupt)
        self.folder = None if folder is None else Path(folder)
        self.passing, self.overlap, self.say = passing, overlap, say
        self.all_ranks = False
        self._compared = compared or Overlap(say)
        self._files = None if folder is None or passing else FeatureFiles(cache or Path(folder) / "features")
        self._begun: list[Path] = []  # folders of the checkpoints that evaluators have asked for
        self._digests: dict[int, str] = {}
        self._keys: dict[int, tuple[Source, str]] = {}  # by id, each beside its set, which stays alive with it
        self._pixels: dict[str, tuple[Tensor, np.ndarray]] = {}  # uint8 [N, H, W, 3], and which of them are known
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

    def refuse_shared(self, train: Source, test: Source) -> None:
        """Unless overlap=allow. A collective.

        Raises:
            UserError: they share images; the first ones are named.
        """
        if self.overlap == "refuse":
            self._compared.refuse(train, test)

    def features(
        self, backbone: nn.Module, split: Literal["train", "test"], indices: np.ndarray | None = None
    ) -> Tensor:
        """Features [n, D] of these images (None: all) of a split, on the CPU; those not yet known are computed.

        float32, or what the backbone gives (bf16) where they are mapped from a file.
        """
        source = getattr(self.splits, split)
        if self._files is not None:
            return self.of(backbone, source if indices is None else source.part(indices, source.name), self.views)
        num_images = len(source)
        wanted = np.arange(num_images) if indices is None else indices
        done = self._done.setdefault(split, np.zeros(num_images, dtype=bool))
        if self.all_ranks:  # rank 0 has the features, and those too that another evaluator asked for there alone
            done = self._done[split] = distributed.shared_object(done, patient=True)
        todo = wanted[~done[wanted]]
        taken = [0]

        def take(features_bD: Tensor, labels_b: Tensor) -> None:
            if split not in self._features:
                self._features[split] = torch.empty(num_images, features_bD.shape[1])
            self._features[split][torch.from_numpy(todo[taken[0] : taken[0] + len(features_bD)])] = features_bD.float()
            taken[0] += len(features_bD)

        if len(todo):
            self._each_batch(
                backbone, self._batches(split, self._own(todo)), take, f"features of {source.name}", len(todo)
            )
            done[todo] = True
        if split not in self._features:
            return torch.empty(0)
        return self._features[split] if indices is None else self._features[split][torch.from_numpy(indices)]

    def of(self, backbone: nn.Module, source: Source, views: Views) -> Tensor:
        """Features [N, D] of the plain views of any images, on the CPU; from a file where features are kept on disk."""
        if self._files is None:
            return self.outputs(backbone, source, views)
        if self.all_ranks and not distributed.is_main():
            first = distributed.shared_object(None, patient=True)
            if isinstance(first, str):
                raise UserError(first)
            if first is not None:
                self._read_and_compute(backbone, source, views, first, _nothing)
            return torch.empty(0)
        told: list[int | str | None] = []

        def tell(first: int | str | None) -> None:
            """What the other ranks have to do: nothing, images from `first` on, or to hear what went wrong."""
            if self.all_ranks and not told:
                told.append(distributed.shared_object(first, patient=True))

        def make(first: int, take: Callable[[Tensor, Tensor], Any]) -> None:
            tell(first)
            self._read_and_compute(backbone, source, views, first, take)

        plain: list[Any] = [views.size, views.plain_crop, views.plain_interpolation, views.mean, views.std]
        plain += [] if views.colours == "rgb" else [views.colours]  # as it was before there were others
        plain += [] if views.channels is None else [f"{views.channels} channels"]
        try:
            made_from = {
                "backbone": self.digest_of(backbone),
                "images": self.key_of(source),
                "plain_view": plain,
                "precision": self.precision,
                "device": self.device.type,
                **({"corrupt": "skip"} if self.loader.corrupt == "skip" else {}),
            }
            features = self._files.get(made_from, len(source), make, batch=self.batch)
        except Exception as error:
            tell(str(error))
            raise
        tell(None)
        return features

    def outputs(self, network: nn.Module, source: Source, views: Views) -> Tensor:
        """What a network gives for the plain views of any images, [N, D] float32 on the CPU, computed anew."""
        whole, take = in_one(len(source))
        self._read_and_compute(network, source, views, 0, take)
        return whole[0] if whole else torch.empty(0)

    def digest_of(self, backbone: nn.Module) -> str:
        """The backbone's digest, computed once a round."""
        if id(backbone) not in self._digests:
            self._digests[id(backbone)] = network_digest(backbone)
        return self._digests[id(backbone)]

    def key_of(self, source: Source) -> str:
        """By which what is kept of these images is found again: their cache key, asked once."""
        if id(source) not in self._keys:
            self._keys[id(source)] = source, source.cache_key()
        return self._keys[id(source)][1]

    def checkpoints(self, name: str, made_from: dict[str, Any]) -> Checkpoints | None:
        """Where an evaluator that trains keeps its state, found again by all that decides its numbers; None where
        nothing is kept.

        Of images that is their digest and not their cache key: a job that goes on, on another node with a copy of the
        images, has to find it.
        """
        if self.folder is None:
            return None
        path = self.folder / "classifiers" / f"{name}-{key_of(made_from)}"
        self._begun.append(path)
        return Checkpoints(path, keep=1)

    def over(self, *, failed: bool) -> None:
        """An evaluator is done: while training, the checkpoints that it began are of no more use, unless it failed."""
        if self.passing and not failed and distributed.is_main():
            for path in self._begun:
                shutil.rmtree(path, ignore_errors=True)
        self._begun.clear()

    def forget(self) -> None:
        """Drops the features, not the images: to be called when the backbone changes."""
        self._features.clear()
        self._done.clear()
        self._digests.clear()

    def _own(self, indices: np.ndarray) -> np.ndarray:
        """Of these images those that this rank reads: of eight ranks every eighth batch."""
        if not self.all_ranks:
            return indices
        batches = [indices[first : first + self.batch] for first in range(0, len(indices), self.batch)]
        own = batches[distributed.rank() :: distributed.world()]
        return np.concatenate(own) if own else indices[:0]

    def _read_and_compute(
        self, network: nn.Module, source: Source, views: Views, first: int, take: Callable[[Tensor, Tensor], Any]
    ) -> None:
        """Gives what the network makes of images `first` and on to `take`, batch by batch and in order."""
        own = self._own(np.arange(first, len(source)))
        batches = plain_batches(source, views, indices=own, device=self.device, **self._reading())
        self._each_batch(network, batches, take, f"features of {source.name}", len(source), first)

    def _each_batch(
        self, network: nn.Module, batches: Iterable, take: Callable, what: str, total: int, first: int = 0
    ) -> None:
        settings: dict[str, Any] = {"device": self.device, "precision": self.precision, "all_ranks": self.all_ranks}
        with counted(self.say, what, total, first) as count:

            def take_and_count(features_bD: Tensor, labels_b: Tensor) -> None:
                take(features_bD, labels_b)
                count(len(features_bD))

            for_each_batch(network, batches, take_and_count, **settings)

    def _reading(self) -> dict[str, Any]:
        """How images are read, as `plain_batches` takes it."""
        return {"batch": self.batch, "num_workers": self.num_workers, "corrupt": self.loader.corrupt}

    def _batches(self, split: str, indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        source = getattr(self.splits, split)
        channels, dtype = self.views.kinds.channels, self.views.dtype
        if channels * dtype.itemsize * self.views.size**2 * len(source) > self.cache_bytes:
            yield from plain_batches(source, self.views, indices=indices, device=self.device, **self._reading())
            return
        if split not in self._pixels:
            size = self.views.size
            pixels = torch.from_numpy(np.empty((len(source), size, size, channels), dtype))
            self._pixels[split] = pixels, np.zeros(len(source), dtype=bool)
        known, is_known = self._pixels[split]
        new = np.unique(indices[~is_known[indices]])
        if len(new):
            read = 0
            with contextlib.closing(plain_pixels(source, self.views, indices=new, **self._reading())) as made:
                for one in made:
                    if isinstance(one, UnreadableImage):
                        raise UnreadableImage(str(one))
                    known[torch.from_numpy(new[read : read + len(one.index)])] = one.views[0]
                    read += len(one.index)
            is_known[new] = True
        for chunk in torch.from_numpy(indices).split(self.batch):
            yield self.views.normalise(known[chunk].to(self.device)), chunk


def _nothing(features_bD: Tensor, labels_b: Tensor) -> None:
    """A `take` of the ranks that nothing arrives on."""


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
            f"{test.name}: expected no class that {train.name} has no image of, got {len(names)}: {shown}. Nothing can"
            " be right about their images: give training images of them, or take the class out of the test images"
        )
