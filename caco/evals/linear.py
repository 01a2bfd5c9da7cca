"""Linear evaluation: a linear classifier on a frozen backbone, trained on random crops and flips as in the papers."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn

from caco import distributed, metrics
from caco.errors import UserError
from caco.evals.base import Evaluator
from caco.evals.classifier import Recipe, accuracies, classify, train_classifier
from caco.evals.features import FeatureStore
from caco.ranges import Count, NonNegative, Several, Share, ShareBelowOne, ShareInterval, held


class Linear(Evaluator):
    """Test accuracy of the classifier after the LAST epoch: `<protocol>_top1` (and `_top5`), percent.

    The test images are used once, at the end; nothing is chosen on them.

    Args:
        name: name of the recipe: linear, linear_lightly or linear_moco, or one of your own. For these three, changed
            settings appear in the names of the results, as in linear_batch-256_top1 (caco/metrics.py).
        epochs, batch, lr, reference_batch, momentum, weight_decay, larc, trust_coefficient: see Recipe.
        schedule, milestones, decay, unit, scale, interpolation, drop_last: see Recipe.
        when: "epoch" (during training and at its end) or "end".
    """

    on_all_ranks = True
    needs_labels = True
    bounded = {"batch": ""}

    @held
    def __init__(
        self,
        *,
        name: str = "linear",
        epochs: Count = 100,
        batch: Several = 4096,
        lr: NonNegative = 0.025,
        reference_batch: Count | None = 256,
        momentum: ShareBelowOne = 0.9,
        weight_decay: NonNegative = 0.0,
        larc: bool = True,
        trust_coefficient: NonNegative = 1e-3,
        schedule: Literal["cosine", "steps"] = "cosine",
        milestones: Sequence[Count] = (),
        decay: Share = 0.1,
        unit: Literal["epoch", "step"] = "epoch",
        scale: ShareInterval = (0.08, 1.0),
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        drop_last: bool = False,
        when: Literal["epoch", "end"] = "end",
    ) -> None:
        self.when = when
        self.recipe = Recipe(
            epochs=epochs,
            batch=batch,
            lr=lr,
            reference_batch=reference_batch,
            momentum=momentum,
            weight_decay=weight_decay,
            larc=larc,
            trust_coefficient=trust_coefficient,
            schedule=schedule,
            milestones=list(milestones),
            decay=decay,
            unit=unit,
            scale=list(scale),
            interpolation=interpolation,
            drop_last=drop_last,
        )
        self.protocol = metrics.linear(name=name, **vars(self.recipe))

    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Check that the images suffice.

        Raises:
            UserError: there are no labels, or fewer training images than a batch.
        """
        labels, test_labels = store.labels("linear evaluation")
        if len(labels) < self.recipe.batch:
            raise UserError(
                f"batch: expected at most the {len(labels)} training images, got {self.recipe.batch}; take a smaller"
                " batch (the learning rate, lr * batch / reference_batch, follows it), or eval=[probe], which has no"
                " batch"
            )
        self._store, self._seed = store, seed
        self._test_labels = torch.from_numpy(test_labels)
        self._num_classes = int(labels.max()) + 1

    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (`<protocol>_top1`, percent) and, with more than five classes, (`<protocol>_top5`, percent)."""
        store = self._store
        train, _ = store.splits.labelled("linear evaluation")
        network = train_classifier(
            backbone,
            train,
            self.recipe,
            store,
            num_classes=self._num_classes,
            frozen=True,
            seed=self._seed,
            name=self.protocol,
        )
        head = network[1]
        assert isinstance(head, nn.Linear)
        test_ND = store.features(backbone, "test")
        if distributed.is_main():
            yield from accuracies(classify(head, test_ND), self._test_labels, self.protocol)
