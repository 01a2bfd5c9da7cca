"""The probe finds the optimum of its stated objective, the same as scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from caco.evals.logistic import Standardised, fit, moments, objective
from caco.evals.probe import Probe


@pytest.fixture(scope="module")
def digits():
    """Standardised pixels of digits: float32 features and labels for training and test."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y)
    mean, scale = moments(x[:1400])
    x = (x - mean) / scale
    return x[:1400], y[:1400], x[1400:], y[1400:]


@pytest.mark.parametrize("block", [3, 10, 64])
def test_gradient_in_blocks_equals_autograd(block):
    torch.manual_seed(0)
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randint(3, (10,))
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(x @ weight + bias, y) + 0.05 / 2 * weight.square().sum()
    expected.backward()
    with torch.no_grad():
        loss, grad_weight, grad_bias = objective(weight, bias, x, y, l2=0.05, block=block)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad_weight, weight.grad)
    torch.testing.assert_close(grad_bias, bias.grad)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_float64_optimum_has_no_gradient_and_equals_scikit_learns(digits, l2):
    x, y, x_test, y_test = digits
    x, x_test = x.double(), x_test.double()
    weight, bias = fit(x, y, num_classes=10, l2=l2, max_iterations=2000, tolerance=1e-8)
    _, grad_weight, grad_bias = objective(weight, bias, x, y, l2=l2, block=65536)
    assert max(grad_weight.abs().max(), grad_bias.abs().max()) < 1e-7
    oracle = LogisticRegression(C=1 / (l2 * len(x)), solver="newton-cholesky", tol=1e-10).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(weight.T, torch.from_numpy(oracle.coef_), atol=2e-5, rtol=0)
    assert np.array_equal((x_test @ weight + bias).argmax(1).numpy(), oracle.predict(x_test.numpy()))


def test_float32_fit_as_the_probe_runs_it_is_within_one_image_of_scikit_learn(digits):
    x, y, x_test, y_test = digits
    weight, bias = fit(x, y, num_classes=10, l2=1e-3)
    _, grad_weight, grad_bias = objective(weight.double(), bias.double(), x.double(), y, l2=1e-3, block=65536)
    assert max(grad_weight.abs().max(), grad_bias.abs().max()) < 2e-5
    oracle = LogisticRegression(C=1 / (1e-3 * len(x)), solver="newton-cholesky", tol=1e-10).fit(
        x.double().numpy(), y.numpy()
    )
    ours = ((x_test @ weight + bias).argmax(1) == y_test).sum().item()
    assert abs(ours - round(oracle.score(x_test.double().numpy(), y_test.numpy()) * len(y_test))) <= 1


def test_same_features_give_the_same_weights(digits):
    x, y, _, _ = digits
    first, second = (fit(x, y, num_classes=10, l2=1e-3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_warns_where_the_iterations_do_not_suffice(digits):
    x, y, _, _ = digits
    with pytest.warns(UserWarning, match="gradient .* after 2 iterations"):
        fit(x, y, num_classes=10, l2=1e-3, max_iterations=2)


def test_standardising_leaves_a_feature_that_never_changes_at_zero():
    torch.manual_seed(0)
    x = torch.randn(100, 3) * 5 + 7
    x[:, 1] = 0.1
    mean, scale = moments(x)
    z = (x - mean) / scale
    assert torch.equal(z[:, 1], torch.zeros(100))
    torch.testing.assert_close(z[:, [0, 2]].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(z[:, [0, 2]].square().mean(0), torch.ones(2), atol=1e-4, rtol=0)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            given = {arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
            if isinstance(one, torch.Tensor) and one.data_ptr() not in given:
                self.elements = max(self.elements, one.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_makes_no_second_copy_of_the_features_and_the_same_classifier(digits, dtype):
    x, y, *_ = digits
    x = torch.cat([3 * x + 5, x.roll(1, 0), x.roll(2, 0), x.roll(3, 0), x.roll(4, 0)], dim=1).to(dtype)
    x[:, 7] = 0.5  # never changes
    with Largest() as largest, pytest.warns(UserWarning, match="gradient"):
        standardised = Standardised.of(x)
        ours = fit(standardised, y, num_classes=10, l2=1e-3, max_iterations=3, block=100)
    assert largest.elements < x.numel() / 4, "the probe must work on blocks of rows or columns"
    with pytest.warns(UserWarning, match="gradient"):
        whole = fit(
            (x.float() - standardised.mean_D) / standardised.scale_D,
            y,
            num_classes=10,
            l2=1e-3,
            max_iterations=3,
            block=100,
        )
    assert torch.equal(ours[0], whole[0]) and torch.equal(ours[1], whole[1])
    mean, scale = x.double().mean(0), x.double().std(0, correction=0)
    torch.testing.assert_close(standardised.mean_D.double(), mean, rtol=1e-5, atol=1e-6)
    scale[7] = 1.0
    torch.testing.assert_close(standardised.scale_D.double(), torch.where(scale == 0, 1.0, scale), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l2": 0.0}, "l2: expected float above 0"),
        ({"max_iterations": 0}, "max_iterations: expected int from 1"),
        ({"when": ""}, "when: expected epoch"),
    ],
)
def test_refuses_settings_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Probe(**arguments)
