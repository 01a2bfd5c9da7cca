"""Logistic regression reaches the same optimum as scikit-learn at every regularisation strength of its path."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from caco.evals.logistic import Axes, fit_on_axes, largest, objective, strengths


@pytest.fixture(scope="module")
def correlated():
    """300 images of 4 classes with 40 positive, correlated features; two features are constant and one is a copy."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    x = (rng.normal(size=(300, 12)) + 1.5 * rng.normal(size=(4, 12))[labels]) @ rng.normal(size=(12, 40)) + 8
    x = np.maximum(x + 0.3 * rng.normal(size=x.shape), 0)
    x[:, 3], x[:, 4], x[:, 5] = 2.5, 0.0, x[:, 6]
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


def path(x, target, lambdas, *, num_classes):
    axes, weight = Axes.of(x), None
    z = axes.turn(x)
    for strength in lambdas:
        weight = fit_on_axes(axes, z, target, num_classes=num_classes, strength=strength, start=weight)
        yield strength, *axes.back(*weight)


def test_every_strength_ends_at_scikit_learns_optimum_with_no_gradient_left(correlated):
    x, y = correlated
    for strength, weight, bias in path(x, y, [1e4, 1e2, 1.0, 1e-2], num_classes=4):
        _, grad_weight, grad_bias = objective(weight, bias, x.double(), y, l2=strength / len(x))
        assert largest(grad_weight, grad_bias) < 1.01e-5
        oracle = LogisticRegression(C=1 / strength, solver="newton-cholesky", tol=1e-9).fit(
            x.double().numpy(), y.numpy()
        )
        ours = (x.double() @ weight + bias).softmax(dim=1)
        theirs = torch.from_numpy(oracle.predict_proba(x.double().numpy()))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
        assert (ours.argmax(1) == theirs.argmax(1)).all()


def test_of_several_labels_each_class_is_fitted_against_the_rest_without_what_is_left_out(correlated):
    x, y = correlated
    target = F.one_hot(y, 4).clone()
    target[y == 1, 2] = 1  # these images have two classes
    target[::7, 3] = -1
    for strength, weight, bias in path(x, target, [1e3, 1.0], num_classes=4):
        for c in range(4):
            kept = target[:, c] >= 0
            oracle = LogisticRegression(C=1 / strength, solver="newton-cholesky", tol=1e-9)
            oracle.fit(x[kept].double().numpy(), target[kept, c].numpy())
            theirs = torch.from_numpy(oracle.predict_proba(x.double().numpy())[:, 1])
            torch.testing.assert_close((x.double() @ weight[:, c] + bias[c]).sigmoid(), theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("block", [3, 10])
def test_gradients_of_several_labels_equal_autograd(block):
    torch.manual_seed(0)
    x, target = torch.randn(10, 4, dtype=torch.float64), torch.randint(-1, 2, (10, 3))
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    each = F.binary_cross_entropy_with_logits(x @ weight + bias, (target == 1).double(), reduction="none")
    expected = each[target >= 0].sum() / 10 + 0.05 / 2 * weight.square().sum()
    expected.backward()
    with torch.no_grad():
        loss, grad_weight, grad_bias = objective(weight, bias, x, target, l2=0.05, block=block)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad_weight, weight.grad)
    torch.testing.assert_close(grad_bias, bias.grad)


def test_turning_and_turning_back_is_the_same_classifier(correlated):
    x, _ = correlated
    axes = Axes.of(x, block=77)
    assert axes.axes_DR.shape[1] < 40  # without the features that never change and the copy
    torch.manual_seed(1)
    turned = torch.randn(axes.axes_DR.shape[1], 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    weight, bias = axes.back(*turned)
    for start in (turned, axes.start(weight, bias)):
        torch.testing.assert_close(x.double() @ weight + bias, axes.turn(x, block=50) @ start[0] + start[1])


def test_strengths_are_the_protocols():
    ours = strengths()
    assert len(ours) == 45 and ours[0] == pytest.approx(1e5) and ours[-1] == pytest.approx(1e-6)
    assert {round(a / b, 6) for a, b in zip(ours, ours[1:], strict=False)} == {round(10 ** (11 / 44), 6)}
