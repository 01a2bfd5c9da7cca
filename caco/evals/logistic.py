"""L2-regularised logistic regression of features: the solver of both the quick probe and transfer evaluation.

Shapes: N images, M validation images, D feature width, C classes, R principal axes along which the features vary.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from caco.evals.extraction import full_float32


def moments(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale, [D] float32 each, that standardise the features; a constant feature has scale 1."""
    # One block of columns at a time, because torch would need a second copy of the features to sum all of them.
    pieces = [torch.std_mean(x.float(), dim=0, correction=0) for x in x_ND.split(64, dim=1)]
    std_D, mean_D = (torch.cat(part) for part in zip(*pieces, strict=True))
    first_D = x_ND[0].float()
    constant_D = x_ND.amin(dim=0) == x_ND.amax(dim=0)
    return torch.where(constant_D, first_D, mean_D), torch.where(constant_D, 1.0, std_D)


@dataclass(frozen=True)
class Standardised:
    """Features as (x - mean) / scale. They are standardised one block of rows at a time, so that a million of them are
    in memory only once, in their original form. It has the members of a tensor that `fit` and `objective` use.

    Attributes:
        x_ND: the original features, float32 or the type in a file of features.
        mean_D, scale_D: float32, see `moments`.
    """

    x_ND: Tensor
    mean_D: Tensor
    scale_D: Tensor

    @classmethod
    def of(cls, x_ND: Tensor) -> "Standardised":
        return cls(x_ND, *moments(x_ND))

    def __len__(self) -> int:
        return len(self.x_ND)

    @property
    def shape(self) -> torch.Size:
        return self.x_ND.shape

    def new_zeros(self, *shape: int) -> Tensor:
        return self.mean_D.new_zeros(*shape)

    def split(self, block: int) -> Iterator[Tensor]:
        return (self(x) for x in self.x_ND.split(block))

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Standardise other features [n, D] with the same mean and scale."""
        return (x_ND.to(self.mean_D) - self.mean_D) / self.scale_D


def objective(
    weight_DC: Tensor, bias_C: Tensor, x_ND: Tensor | Standardised, target: Tensor, *, l2: float, block: int = 65536
) -> tuple[Tensor, Tensor, Tensor]:
    """Regularised cross-entropy and its gradients with respect to weight and bias, computed in blocks of rows. The bias
    has no penalty.

    If target is int64 [N], classes: mean_i -log softmax(x_i W + b)[target_i] + l2 / 2 |W|^2, which is scikit-learn's
    objective with C = 1 / (l2 N). If target is int64 [N, C], for images with several labels, each class has its own
    sigmoid against the rest, and the losses are summed over classes; 1 means present, 0 absent, -1 ignored.

    Returns:
        loss [], gradient [D, C], gradient [C].
    """
    loss, grad_DC, grad_C = 0.5 * l2 * weight_DC.square().sum(), l2 * weight_DC, torch.zeros_like(bias_C)
    for x, labels in zip(x_ND.split(block), target.split(block), strict=True):
        logits = torch.addmm(bias_C, x, weight_DC)
        if target.ndim == 1:
            loss = loss + F.cross_entropy(logits, labels, reduction="sum") / len(x_ND)
            error = (logits.softmax(dim=1) - F.one_hot(labels, len(bias_C))) / len(x_ND)
        else:
            counts, wanted = labels >= 0, (labels == 1).to(logits)
            each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
            loss = loss + torch.where(counts, each, 0.0).sum() / len(x_ND)
            error = torch.where(counts, logits.sigmoid() - wanted, 0.0) / len(x_ND)
        grad_DC = grad_DC + (error.T @ x).T  # x.T @ error would take five times as long on a CPU
        grad_C = grad_C + error.sum(dim=0)
    return loss, grad_DC, grad_C


class _FlatEnough(Exception):
    """The gradient is within the tolerance, so L-BFGS can stop at this point."""


@torch.no_grad()
@full_float32()
def fit(
    x_ND: Tensor | Standardised,
    target: Tensor,
    *,
    num_classes: int,
    l2: float,
    max_iterations: int = 500,
    tolerance: float = 1e-5,
    block: int = 65536,
    start: tuple[Tensor, Tensor] | None = None,
    steps: tuple[Tensor, float] | None = None,
    size: Callable[[Tensor, Tensor], float] | None = None,
    warn: bool = True,
) -> tuple[Tensor, Tensor]:
    """Weight [D, C] and bias [C] at the optimum of `objective`, found by torch's L-BFGS with a strong-Wolfe line
    search.

    It stops when the gradient's `size` is at most `tolerance`, and warns if max_iterations do not suffice. The same
    input gives the same result.

    Args:
        target: see `objective`.
        start: weight and bias to start from; None starts from zeros.
        steps: expected size of the first change of each feature's weights [D] and of the bias, up to a common factor.
            L-BFGS works on variables that are divided by these.
        size: (gradient of weight, gradient of bias) -> the number that is compared with `tolerance`; None takes the
            largest entry.
        warn: whether to warn.
    """
    weight_DC, bias_C = (
        start if start is not None else (x_ND.new_zeros(x_ND.shape[1], num_classes), x_ND.new_zeros(num_classes))
    )
    size = size or largest
    step_D1, step = (torch.ones_like(weight_DC[:, :1]), 1.0) if steps is None else (steps[0][:, None], steps[1])
    inner_DC, inner_C = weight_DC / step_D1, bias_C / step
    optimizer = torch.optim.LBFGS(
        [inner_DC, inner_C],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, grad_DC, grad_C = objective(inner_DC * step_D1, inner_C * step, x_ND, target, l2=l2, block=block)
        if size(grad_DC, grad_C) <= tolerance:
            raise _FlatEnough  # the parameters are at this point, even if it is a trial point of the line search
        inner_DC.grad, inner_C.grad = grad_DC * step_D1, grad_C * step
        return loss

    try:
        optimizer.step(closure)
        _, grad_DC, grad_C = objective(inner_DC * step_D1, inner_C * step, x_ND, target, l2=l2, block=block)
        # In float32 the gradient may stay a little above the tolerance.
        if warn and size(grad_DC, grad_C) > 10 * tolerance:
            warnings.warn(
                f"logistic regression: gradient {size(grad_DC, grad_C):.1e} after {max_iterations} iterations, "
                f"expected {tolerance:.0e}"
            )
    except _FlatEnough:
        pass
    return inner_DC * step_D1, inner_C * step


def largest(grad_DC: Tensor, grad_C: Tensor) -> float:
    """The largest absolute entry of a gradient, as in scikit-learn's tolerance."""
    return max(grad_DC.abs().max().item(), grad_C.abs().max().item())


@dataclass(frozen=True)
class Axes:
    """Centres features and rotates them onto their principal axes; axes along which they do not vary are dropped.

    The regression has the same optimum there: centring only moves the bias, which has no penalty; a rotation keeps |W|;
    and along an axis without variance the penalty makes the weight zero. But the curvature is nearly diagonal there, so
    L-BFGS needs tens of iterations instead of hundreds.

    Attributes:
        mean_D, axes_DR, variance_R: the features' mean, the axes as columns, and the variance along each axis; float64.
    """

    mean_D: Tensor
    axes_DR: Tensor
    variance_R: Tensor

    @classmethod
    def of(cls, x_ND: Tensor, *, block: int = 8192) -> "Axes":
        mean_D = sum(x.double().sum(dim=0) for x in x_ND.split(block)) / len(x_ND)
        gram_DD = sum((x.double() - mean_D).T @ (x.double() - mean_D) for x in x_ND.split(block)) / len(x_ND)
        variance_D, axes_DD = torch.linalg.eigh(gram_DD)
        kept = variance_D > variance_D[-1].clamp(min=1e-30) * 1e-12
        return cls(mean_D, axes_DD[:, kept], variance_D[kept])

    def turn(self, x_ND: Tensor, *, block: int = 8192) -> Tensor:
        """Centred and rotated features, [N, R] float64."""
        return torch.cat([(x.double() - self.mean_D) @ self.axes_DR for x in x_ND.split(block)])

    def back(self, weight_RC: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
        """The same classifier for the original features: weight [D, C] and bias [C]."""
        weight_DC = self.axes_DR @ weight_RC
        return weight_DC, bias_C - self.mean_D @ weight_DC

    def start(self, weight_DC: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
        """A classifier of the original features as a starting point on these axes: weight [R, C] and bias [C]."""
        return self.axes_DR.T @ weight_DC, bias_C + self.mean_D @ weight_DC

    def size(self, grad_RC: Tensor, grad_C: Tensor) -> float:
        """An upper bound of the largest entry of the gradient with respect to the original features' weights and the
        bias.
        """
        # That gradient is the one on these axes rotated back, plus the bias's gradient times the features' mean.
        return (grad_RC.norm(dim=0) + grad_C.abs() * max(1.0, self.mean_D.abs().max().item())).max().item()

    def steps(self, confusion: float, l2: float) -> tuple[Tensor, float]:
        """Step sizes for `fit`: one over the root of the curvature, which is confusion * variance + l2 for the weights
        [R], and confusion for the bias."""
        return (confusion * self.variance_R + l2).rsqrt(), confusion**-0.5


@torch.no_grad()
def fit_on_axes(
    axes: Axes,
    z_NR: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    strength: float,
    start: tuple[Tensor, Tensor] | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
    block: int = 65536,
) -> tuple[Tensor, Tensor]:
    """Weight [R, C] and bias [C] for rotated features z_NR.

    Args:
        strength: lambda in sum_i loss_i + lambda / 2 |W|^2, which is scikit-learn's 1 / C. It does not depend on N, so
            it means the same when validation images join the training images.
    """
    if start is None:
        start = (z_NR.new_zeros(z_NR.shape[1], num_classes), z_NR.new_zeros(num_classes))
    l2 = strength / len(z_NR)
    # The mean of p (1 - p) over images and classes sets the scale of the curvature at the starting point.
    logits = torch.addmm(start[1], z_NR[:block], start[0])
    p = logits.softmax(dim=1) if target.ndim == 1 else logits.sigmoid()
    confusion = max((p * (1 - p)).mean().item(), 1e-6)
    return fit(
        z_NR,
        target,
        num_classes=num_classes,
        l2=l2,
        max_iterations=max_iterations,
        tolerance=tolerance,
        block=block,
        start=start,
        steps=axes.steps(confusion, l2),
        size=axes.size,
        warn=False,
    )


def strengths(count: int = 45, low: float = 1e-6, high: float = 1e5) -> list[float]:
    """`count` strengths, evenly spaced in their logarithm, strongest first, so that each fit starts from a simpler
    one."""
    spaced = torch.linspace(math.log10(high), math.log10(low), count, dtype=torch.float64)
    return [10.0**exponent for exponent in spaced.tolist()]


def choose_strength(
    train_ND: Tensor,
    target: Tensor,
    validation_MD: Tensor,
    measured: Callable[[float, Tensor], float],
    *,
    strengths: list[float],
    num_classes: int,
    max_iterations: int,
    tolerance: float,
) -> tuple[float, tuple[Tensor, Tensor]]:
    """Choose the strength whose classifier of the training images is best on the validation images; of equally good
    ones the first.

    Args:
        strengths: the strengths to try, in order.
        measured: (strength, its logits [M, C] on the CPU) -> how good they are, larger is better.
    Returns:
        The strength; and its weight [D, C] and bias [C], float64, for the original features.
    """
    axes = Axes.of(train_ND)
    z_NR, z_validation_MR = axes.turn(train_ND), axes.turn(validation_MD)
    weight, best, found = None, -math.inf, None
    for strength in strengths:
        weight = fit_on_axes(
            axes,
            z_NR,
            target,
            num_classes=num_classes,
            strength=strength,
            start=weight,
            max_iterations=max_iterations,
            tolerance=tolerance,
        )
        value = measured(strength, torch.addmm(weight[1], z_validation_MR, weight[0]).cpu())
        if value > best:
            best, found = value, (strength, axes.back(*weight))
    assert found is not None, "at least one strength was tried, and gave a number"
    return found


def logits_of(x_ND: Tensor, weight_DC: Tensor, bias_C: Tensor, *, block: int = 8192) -> Tensor:
    """Logits [N, C] float64 on the CPU, computed in blocks of rows."""
    return torch.cat([torch.addmm(bias_C, x.double(), weight_DC).cpu() for x in x_ND.split(block)])
