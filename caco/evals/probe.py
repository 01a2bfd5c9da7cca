"""A quick linear probe: multinomial logistic regression on cached features. Not the papers' linear evaluation.

Shapes: N images, D feature width, C classes.
"""

import warnings
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco.evals.features import FeatureStore, full_float32


def moments(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale [D] by which features are standardised; a feature that never changes keeps scale 1."""
    std_D, mean_D = torch.std_mean(x_ND, dim=0, correction=0)
    constant_D = (x_ND == x_ND[0]).all(dim=0)
    return torch.where(constant_D, x_ND[0], mean_D), torch.where(constant_D, 1.0, std_D)


def objective(
    weight_DC: Tensor, bias_C: Tensor, x_ND: Tensor, label_N: Tensor, *, l2: float, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Regularised cross-entropy and its gradients by weight and bias, in blocks of rows.

    mean_i -log softmax(x_i W + b)[label_i] + l2 / 2 |W|^2: scikit-learn's with C = 1 / (l2 N); no penalty on the bias.

    Returns:
        loss [], gradient [D, C], gradient [C].
    """
    loss, grad_DC, grad_C = 0.5 * l2 * weight_DC.square().sum(), l2 * weight_DC, torch.zeros_like(bias_C)
    for x, label in zip(x_ND.split(block), label_N.split(block), strict=True):
        logits = torch.addmm(bias_C, x, weight_DC)
        loss = loss + F.cross_entropy(logits, label, reduction="sum") / len(x_ND)
        error = (logits.softmax(dim=1) - F.one_hot(label, len(bias_C))) / len(x_ND)
        grad_DC = grad_DC + x.T @ error
        grad_C = grad_C + error.sum(dim=0)
    return loss, grad_DC, grad_C


@torch.no_grad()
@full_float32()
def fit(
    x_ND: Tensor,
    label_N: Tensor,
    *,
    num_classes: int,
    l2: float,
    max_iterations: int = 500,
    tolerance: float = 1e-5,
    block: int = 65536,
) -> tuple[Tensor, Tensor]:
    """Weight [D, C] and bias [C] at the optimum of `objective`, from zeros, by L-BFGS with a strong-Wolfe line search.

    Ends when no gradient is above `tolerance`; warns where max_iterations do not suffice. The same input gives the same
    result.
    """
    weight_DC, bias_C = x_ND.new_zeros(x_ND.shape[1], num_classes), x_ND.new_zeros(num_classes)
    optimizer = torch.optim.LBFGS(
        [weight_DC, bias_C],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, weight_DC.grad, bias_C.grad = objective(weight_DC, bias_C, x_ND, label_N, l2=l2, block=block)
        return loss

    optimizer.step(closure)
    closure()
    largest = max(weight_DC.grad.abs().max().item(), bias_C.grad.abs().max().item())
    if largest > 10 * tolerance:  # float32 may end a little above
        warnings.warn(f"probe: gradient {largest:.1e} after {max_iterations} iterations, expected {tolerance:.0e}")
    return weight_DC, bias_C


class Probe:
    """Top-1 accuracy on the test set of a linear classifier of the training set's features: `probe_top1`, percent.

    Deterministic: one strength for all, no augmentation, nothing chosen on the test set.

    Args:
        l2: penalty, see `objective`; features are standardised first.
        max_iterations: of L-BFGS.
        when: "epoch" (while training, and at its end) or "end".
    """

    def __init__(
        self, *, l2: float = 1e-3, max_iterations: int = 500, when: Literal["epoch", "end"] = "end"
    ) -> None:
        if not l2 > 0:
            raise ValueError(f"probe l2: expected a positive number, got {l2}")
        if max_iterations < 1:
            raise ValueError(f"probe max_iterations: expected at least 1, got {max_iterations}")
        if when not in ("epoch", "end"):
            raise ValueError(f"probe when: expected epoch or end, got {when!r}")
        self.l2, self.max_iterations, self.when = l2, max_iterations, when

    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Takes the labels; nothing is drawn, so the seed is of no consequence.

        Raises:
            ValueError: no labels.
        """
        labels, test_labels = store.labels("a linear probe")
        self._store = store
        self._labels, self._test_labels = torch.from_numpy(labels), torch.from_numpy(test_labels)
        self._num_classes = int(labels.max()) + 1

    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields ("probe_top1", percent)."""
        device = self._store.device
        x_ND = self._store.features(backbone, "train").to(device)
        mean_D, scale_D = moments(x_ND)
        weight_DC, bias_C = fit(
            (x_ND - mean_D) / scale_D,
            self._labels.to(device),
            num_classes=self._num_classes,
            l2=self.l2,
            max_iterations=self.max_iterations,
        )
        test_ND = (self._store.features(backbone, "test").to(device) - mean_D) / scale_D
        predicted = (test_ND @ weight_DC + bias_C).argmax(dim=1).cpu()
        yield "probe_top1", 100 * (predicted == self._test_labels).double().mean().item()
