"""Fine-tunes the whole network on all labels, or on a few per cent of them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from torch import nn

from caco import distributed, metrics
from caco.data.sets.sources import Source
from caco.errors import UserError
from caco.evals.base import Evaluator
from caco.evals.classifier import Recipe, accuracies, train_classifier
from caco.evals.features import FeatureStore
from caco.evals.knn import balanced_share
from caco.ranges import Count, Length, NonNegative, Several, Share, ShareAboveZero, ShareBelowOne, ShareInterval, held
from caco.runs.paths import expanded, read_text


class FineTune(Evaluator):
    """Test accuracy, percent, after fine-tuning a copy of the backbone: `finetune_top1`, or `semi_<percent>_top1` for a
    share of the labels. Changed settings of the recipe appear in the name (caco/metrics.py).

    Source: SimCLR (arXiv 2002.05709), Appendix B.5, for 1 % and 10 % of the labels.

    Args:
        name: name of the recipe: semi, finetune, or one of your own.
        fractions: shares of each training class whose labels are used. Each share is drawn by the seed and has at least
            one image of each class.
        lists: instead of a draw, a text file for each share with the names of its image files, one a line. SimCLR
            publishes lists for ImageNet: google-research/simclr, imagenet_subsets/1percent.txt and 10percent.txt.
        epochs: number of epochs for each share.
        batch: number of images in a step, at most; with fewer labels the batch is smaller, and the learning rate with
            it.
        lr, reference_batch, momentum, nesterov, weight_decay, unit, scale, interpolation: see Recipe.
        frozen_below: for shares smaller than this, only the linear classifier is trained, on the frozen backbone.
        when: "epoch" (during training and at its end) or "end".
    Raises:
        UserError: fractions, epochs and lists do not match.
    """

    on_all_ranks = True
    needs_labels = True

    @held
    def __init__(
        self,
        *,
        name: str = "finetune",
        fractions: Annotated[Sequence[ShareAboveZero], Length(least=1)] = (1.0,),
        lists: list[str] | None = None,
        epochs: Annotated[Sequence[Count], Length(least=1)] = (30,),
        batch: Several = 1024,
        lr: NonNegative = 0.05,
        reference_batch: Count | None = 256,
        momentum: ShareBelowOne = 0.9,
        nesterov: bool = True,
        weight_decay: NonNegative = 0.0,
        unit: Literal["epoch", "step"] = "step",
        scale: ShareInterval = (0.08, 1.0),
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        frozen_below: Share = 0.0,
        when: Literal["epoch", "end"] = "end",
    ) -> None:
        if len(set(fractions)) < len(fractions):
            raise UserError(f"{name} fractions: expected each share once, got {list(fractions)}")
        if len(epochs) != len(fractions) or (lists is not None and len(lists) != len(fractions)):
            raise UserError(
                f"{name}: expected an entry of epochs (and of lists) for each of the {len(fractions)} fractions, got "
                f"{list(epochs)} and {lists}"
            )
        self.fractions, self.lists, self.when = list(fractions), lists, when
        self.frozen = [fraction < frozen_below for fraction in fractions]
        self.recipes = [
            Recipe(
                epochs=count,
                batch=batch,
                lr=lr,
                reference_batch=reference_batch,
                momentum=momentum,
                nesterov=nesterov,
                weight_decay=weight_decay,
                unit=unit,
                scale=list(scale),
                interpolation=interpolation,
            )
            for count in epochs
        ]
        self.protocols = [
            metrics.fine_tuned(
                name=name, fraction=fraction, listed=lists is not None, frozen_below=frozen_below, **vars(recipe)
            )
            for fraction, recipe in zip(fractions, self.recipes, strict=True)
        ]

    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Choose the images whose labels are used: draw them, or find those of the lists.

        Raises:
            UserError: there are no labels, a list is missing, or a list names an image that does not exist.
        """
        labels, test_labels = store.labels("fine-tuning")
        train, _ = store.splits.labelled("fine-tuning")
        self._store, self._seed = store, seed
        self._test_labels = torch.from_numpy(test_labels)
        self._num_classes = int(labels.max()) + 1
        self._shares = [
            balanced_share(labels, fraction=fraction, seed=seed) if self.lists is None else listed(train, self.lists[i])
            for i, fraction in enumerate(self.fractions)
        ]

    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (`<protocol>_top1`, percent) for each share; with more than five classes, (`<protocol>_top5`, percent)
        too."""
        store = self._store
        train, test = store.splits.labelled("fine-tuning")
        for name, share, recipe, frozen in zip(self.protocols, self._shares, self.recipes, self.frozen, strict=True):
            some = train.part(share, train.name)
            world = distributed.world()
            network = train_classifier(
                backbone,
                some,
                replace(recipe, batch=min(recipe.batch, len(some) // world * world)),
                store,
                num_classes=self._num_classes,
                frozen=frozen,
                seed=self._seed,
                name=name,
            )
            logits_NC = store.outputs(network, test, store.views)
            if distributed.is_main():
                yield from accuracies(logits_NC, self._test_labels, name)


def listed(source: Source, path: str) -> np.ndarray:
    """Positions in the source, ascending, of the image files that a text file names, one a line.

    Raises:
        UserError: the file is missing, the source's images are not files, or a name is unknown or repeated.
    """
    file = expanded(path)
    if not file.is_file():
        raise UserError(f"lists: expected a text file of image files' names, got {path}, which is not there")
    position = {file_of_image.name: i for i in range(len(source)) if (file_of_image := source.path(i)) is not None}
    if not position:
        raise UserError(
            f"lists: expected images in files, got {source.name}, whose images have no names; leave lists=null"
        )
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    unknown = [name for name in names if name not in position]
    if unknown or not names or len(set(names)) < len(names):
        raise UserError(
            f"lists: {path}: expected names of image files of {source.name}, each once; got {len(names)} names, "
            f"{len(names) - len(set(names))} repeated, {len(unknown)} not there ({', '.join(unknown[:3])})"
        )
    return np.sort(np.array([position[name] for name in names]))
