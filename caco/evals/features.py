"""Frozen features of a backbone. They are computed once and shared by all evaluators: kept in memory for one round, or
on disk permanently.
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
    """The train and test images and their features; each feature is computed at most once in a round of evaluation.

    The transformed images of small sets stay in memory from round to round; those of large sets are read again, by the
    loader's workers. If an evaluator runs on all ranks (`all_ranks`, which Evaluation sets), `features`, `of` and
    `outputs` are collectives: each rank reads and computes a share, rank 0 gets the result and the others an empty
    tensor.

    Args:
        splits: the images; only `train` and `test` are used.
        views: each image's plain view is taken.
        batch: images in a forward pass.
        device: where the backbone computes.
        precision: "bf16" (autocast) or "fp32".
        cache_bytes: a split whose transformed images take at most this much stays in memory.
        loader: settings of the loader that training uses. Its workers read images, and evaluators use it to train on
            augmented views.
        folder: folder for features and evaluators' checkpoints; None keeps features in memory and no checkpoints.
        cache: another folder for the features, which several evaluations can share.
        passing: True during training: features stay in memory in any case, and an evaluator's checkpoints are removed
            once it has its results.
        overlap: whether evaluators with images of their own may test on training images.
        compared: finds images that sets share, and remembers what it read.
        say: receives messages about the progress of slow evaluators; `passing` messages may be left out.
    Raises:
        UserError: batch is below 1.
        UnreadableImage: images are known to be unreadable, and the loader does not let others stand in for them.
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
        self._begun: list[Path] = []  # folders of the checkpoints of evaluators
        self._digests: dict[int, str] = {}
        # By id of the set; the set is kept too, so that its id is not reused.
        self._keys: dict[int, tuple[Source, str]] = {}
        # Uint8 [N, H, W, 3], and bool [N]: which of them are filled.
        self._pixels: dict[str, tuple[Tensor, np.ndarray]] = {}
        self._features: dict[str, Tensor] = {}
        self._done: dict[str, np.ndarray] = {}

    def labels(self, purpose: str) -> tuple[np.ndarray, np.ndarray]:
        """The labels of all train and of all test images, int64.

        Args:
            purpose: what needs the labels, for the error message.
        Raises:
            UserError: a split has no labels, or the test images have a class that the training images lack.
        """
        train, test = self.splits.labelled(purpose)
        require_classes(train, test)
        return labels_of(train), labels_of(test)

    def refuse_shared(self, train: Source, test: Source) -> None:
        """Check that two sets share no image, unless overlap=allow. A collective.

        Raises:
            UserError: they share images; the message names the first ones.
        """
        if self.overlap == "refuse":
            self._compared.refuse(train, test)

    def features(
        self, backbone: nn.Module, split: Literal["train", "test"], indices: np.ndarray | None = None
    ) -> Tensor:
        """Features [n, D] of images of a split, on the CPU; those that are not yet known are computed.

        They are float32, or of the backbone's own type (bf16) if they are mapped from a file.

        Args:
            indices: positions in the split; None takes all images.
        """
        source = getattr(self.splits, split)
        if self._files is not None:
            return self.of(backbone, source if indices is None else source.part(indices, source.name), self.views)
        num_images = len(source)
        wanted = np.arange(num_images) if indices is None else indices
        done = self._done.setdefault(split, np.zeros(num_images, dtype=bool))
        if self.all_ranks:  # rank 0 has the features, also those that another evaluator had it compute alone
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
        """Features [N, D] of the plain views of any images, on the CPU; mapped from a file if features are on disk."""
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
            """Tell the other ranks, once, what to do: nothing (None), compute images from `first` on, or raise an
            error."""
            if self.all_ranks and not told:
                told.append(distributed.shared_object(first, patient=True))

        def make(first: int, take: Callable[[Tensor, Tensor], Any]) -> None:
            tell(first)
            self._read_and_compute(backbone, source, views, first, take)

        plain: list[Any] = [views.size, views.plain_crop, views.plain_interpolation, views.mean, views.std]
        # Keeps the keys of files from before there were other spaces.
        plain += [] if views.colours == "rgb" else [views.colours]
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
        """The outputs of a network for the plain views of any images, [N, D] float32 on the CPU; always computed
        anew."""
        whole, take = in_one(len(source))
        self._read_and_compute(network, source, views, 0, take)
        return whole[0] if whole else torch.empty(0)

    def digest_of(self, backbone: nn.Module) -> str:
        """The backbone's digest, computed once in a round."""
        if id(backbone) not in self._digests:
            self._digests[id(backbone)] = network_digest(backbone)
        return self._digests[id(backbone)]

    def key_of(self, source: Source) -> str:
        """The key under which results for these images are kept: their cache key, computed once."""
        if id(source) not in self._keys:
            self._keys[id(source)] = source, source.cache_key()
        return self._keys[id(source)][1]

    def checkpoints(self, name: str, made_from: dict[str, Any]) -> Checkpoints | None:
        """Where an evaluator that trains keeps its state; None if nothing is kept.

        Args:
            made_from: everything that decides the evaluator's numbers; the state is found again under a hash of it. For
                images it has to contain their digest, not their cache key: a job that resumes on another node with a
                copy of the images must find its state.
        """
        if self.folder is None:
            return None
        path = self.folder / "classifiers" / f"{name}-{key_of(made_from)}"
        self._begun.append(path)
        return Checkpoints(path, keep=1)

    def over(self, *, failed: bool) -> None:
        """Called after an evaluator. During training its checkpoints are then removed, unless it failed."""
        if self.passing and not failed and distributed.is_main():
            for path in self._begun:
                shutil.rmtree(path, ignore_errors=True)
        self._begun.clear()

    def forget(self) -> None:
        """Drop the features but not the images; called when the backbone changes."""
        self._features.clear()
        self._done.clear()
        self._digests.clear()

    def _own(self, indices: np.ndarray) -> np.ndarray:
        """The images, among these, that this rank reads: with eight ranks every eighth batch."""
        if not self.all_ranks:
            return indices
        batches = [indices[first : first + self.batch] for first in range(0, len(indices), self.batch)]
        own = batches[distributed.rank() :: distributed.world()]
        return np.concatenate(own) if own else indices[:0]

    def _read_and_compute(
        self, network: nn.Module, source: Source, views: Views, first: int, take: Callable[[Tensor, Tensor], Any]
    ) -> None:
        """Compute the network's outputs for images `first` to the last, and give them to `take` in order, batch by
        batch."""
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
        """The arguments of `plain_batches` that say how images are read."""
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
    """The `take` of ranks that receive no features."""


def require_classes(train: Source, test: Source) -> None:
    """Check that the training images have every class of the test images.

    Raises:
        UserError: a class is missing; the message names it.
    """
    unseen = np.setdiff1d(labels_of(test), labels_of(train))
    if len(unseen):
        names = [test.classes[c] if test.classes else str(c) for c in unseen]
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise UserError(
            f"{test.name}: expected no class that {train.name} has no image of, got {len(names)}: {shown}. No"
            " image of these classes could be classified correctly: add training images of them, or remove them from"
            " the test images"
        )
