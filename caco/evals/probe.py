"""A quick linear probe: multinomial logistic regression on cached features. Not the papers' linear evaluation.

Shapes: N images, D feature width, C classes.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from caco import distributed, metrics
from caco.evals.base import Evaluator
from caco.evals.features import FeatureStore
from caco.evals.logistic import Standardised, fit
from caco.ranges import AboveZero, Count, held


class Probe(Evaluator):
    """Top-1 accuracy on the test set of a linear classifier of the training set's features: `probe_top1`, percent. A
    changed l2 appears in the name (caco/metrics.py).

    The result is deterministic: the penalty is fixed, there is no augmentation, and nothing is chosen on the test set.

    Args:
        l2: penalty, see caco.evals.logistic.objective; features are standardised first.
        max_iterations: maximum number of L-BFGS iterations.
        when: "epoch" (during training and at its end) or "end".
    """

    on_all_ranks = True  # the ranks share the reading of images
    needs_labels = True

    @held
    def __init__(
        self, *, l2: AboveZero = 1e-3, max_iterations: Count = 500, when: Literal["epoch", "end"] = "end"
    ) -> None:
        self.l2, self.max_iterations, self.when = l2, max_iterations, when
        self.protocol = metrics.probe(l2=l2, max_iterations=max_iterations)

    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Get the labels. Nothing is drawn, so the seed has no effect.

        Raises:
            UserError: there are no labels.
        """
        labels, test_labels = store.labels("a linear probe")
        self._store = store
        self._labels, self._test_labels = torch.from_numpy(labels), torch.from_numpy(test_labels)
        self._num_classes = int(labels.max()) + 1

    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (`<protocol>_top1`, percent)."""
        device = self._store.device
        train_ND = self._store.features(backbone, "train")
        test_ND = self._store.features(backbone, "test")
        if not distributed.is_main():
            return
        x_ND = Standardised.of(train_ND.to(device))  # on a CPU this is the store's own tensor, without a copy
        weight_DC, bias_C = fit(
            x_ND,
            self._labels.to(device),
            num_classes=self._num_classes,
            l2=self.l2,
            max_iterations=self.max_iterations,
        )
        predicted = torch.cat(
            [(x_ND(x.to(device)) @ weight_DC + bias_C).argmax(dim=1).cpu() for x in test_ND.split(65536)]
        )
        yield f"{self.protocol}_top1", 100 * (predicted == self._test_labels).double().mean().item()
