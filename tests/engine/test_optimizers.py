"""Rates follow the paper's schedule, and groups its exclusions."""

import math

import pytest
import torch
from torch import nn

from caco.engine import optimizers
from caco.engine.optimizers import Optimisation, Schedule
from caco.methods.base import Now, ParameterGroup
from caco.schedules import RunShape, cosine, warmup_and_cosine


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False)).double()


def test_the_paper_s_rate_by_hand_per_epoch():
    """The published code's steps: (e + 1) / 10 for ten epochs, then a cosine that would reach 1/100 at the end."""
    factor = Schedule(warmup_epochs=10, final_fraction=0.01).learning_rate(RunShape(200, 3, 64, "epoch"))
    assert len(factor) == 600
    assert factor[:6] == [0.1] * 3 + [0.2] * 3
    assert factor[27] == 1.0 and factor[30] == 1.0
    assert factor[3 * 105] == pytest.approx(0.505)  # half-way down the cosine: (1 + 0.01) / 2
    assert factor[-1] == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 189 / 190)))


def test_per_step_the_rate_changes_with_every_step_and_agrees_at_epoch_borders():
    step = Schedule(warmup_epochs=2).learning_rate(RunShape(10, 5, 64))
    epoch = Schedule(warmup_epochs=2).learning_rate(RunShape(10, 5, 64, "epoch"))
    assert step[0] == 0.1 and step[9] == 1.0
    assert step[2 * 5 :: 5] == pytest.approx(epoch[2 * 5 :: 5])
    assert all(a > b for a, b in zip(step[10:], step[11:], strict=False))


def test_the_bank_s_rate_is_warmed_up_and_then_constant():
    rate = warmup_and_cosine(RunShape(10, 5, 64), 3.0, 3.0, 2)
    assert rate[:3] == pytest.approx([0.3, 0.6, 0.9])
    assert rate[9:] == [3.0] * 41
    assert warmup_and_cosine(RunShape(2, 5, 64), 3.0, 3.0, 0) == [3.0] * 10


def test_or_goes_down_to_its_final_rate_by_a_cosine():
    rate = warmup_and_cosine(RunShape(10, 5, 64), 3.0, 0.5, 2)
    assert rate[9:11] == [3.0, 3.0]
    assert rate[30] == pytest.approx(0.5 + 2.5 / 2)
    assert rate[-1] == pytest.approx(0.5 + 2.5 * 0.5 * (1 + math.cos(math.pi * 39 / 40)))
    by_epoch = warmup_and_cosine(RunShape(4, 5, 64, "epoch"), 3.0, 0.0, 0)
    assert by_epoch[:6] == pytest.approx([3.0] * 5 + [1.5 * (1 + math.cos(math.pi / 4))])


def test_a_warm_up_that_ends_within_an_epoch_never_exceeds_the_rate():
    assert max(Schedule(warmup_epochs=2.5).learning_rate(RunShape(10, 5, 64, "epoch"))) == 1.0


def test_the_twin_s_momentum_goes_from_0_99_to_1_by_a_cosine():
    m = cosine(RunShape(10, 5, 64), 0.99, 1.0)
    assert m[0] == pytest.approx(0.99)
    assert m[25] == pytest.approx(0.995)
    assert m[-1] == pytest.approx(1 - 0.01 * 0.5 * (1 + math.cos(math.pi * 49 / 50)))


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match="must be below epochs, 5; got 10"):
        Schedule(warmup_epochs=10).learning_rate(RunShape(5, 3, 64))


def test_base_rates_scale_with_the_batch():
    groups = [ParameterGroup(list(model().parameters()))]
    assert optimizers.lars(groups, batch=4096).param_groups[0]["lr"] == pytest.approx(4.8)  # 0.3 x 16
    assert optimizers.sgd(groups, batch=64).param_groups[0]["lr"] == pytest.approx(0.0075)
    assert optimizers.sgd(groups, batch=64, reference_batch=None).param_groups[0]["lr"] == 0.03


def test_lars_by_hand():
    """Weights: lr * trust * |p| / (|g| + wd |p|) times (g + wd p). Biases and BatchNorm: plain lr * g, no decay."""
    net = model()
    parameters = list(net.parameters())
    before = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    optimizer = optimizers.lars([ParameterGroup(parameters)], batch=256, lr=0.5, weight_decay=0.1, momentum=0.9)
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        if p.ndim > 1:
            ratio = 1e-3 * old.norm() / (p.grad.norm() + 0.1 * old.norm())
            expected = old - 0.5 * ratio * (p.grad + 0.1 * old)
        else:
            expected = old - 0.5 * p.grad
        assert torch.allclose(p, expected, atol=1e-9)


def test_adamw_decays_no_parameter_of_one_dimension():
    groups = optimizers.adamw([ParameterGroup(list(model().parameters()))], batch=256).param_groups
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [(0.05, {2}), (0.0, {1})]


@pytest.mark.parametrize("factory", [optimizers.lars, optimizers.sgd, optimizers.adamw])
def test_a_rate_that_is_not_positive_is_refused(factory):
    with pytest.raises(ValueError, match="optimizer.lr must be positive; got 0"):
        factory([ParameterGroup(list(model().parameters()))], batch=64, lr=0.0)


def now(step):
    return Now(step, "training", step, False, 0, step, {"head": 0.5})


def test_a_step_takes_its_rate_and_decay_and_a_group_its_own():
    """Half the rate for the second group; the third takes its factor from a schedule of the method's; decay from 0.04 to 0.4."""
    parameters = list(model().parameters())
    groups = [ParameterGroup(parameters[:1]), ParameterGroup(parameters[1:2], rate=0.5), ParameterGroup(parameters[2:], rate="head", decay=False)]
    optimizer = optimizers.adamw(groups, batch=256, lr=0.1, weight_decay=0.04)
    run = RunShape(4, 5, 64)
    optimisation = Optimisation(optimizer, Schedule(warmup_epochs=0, final_fraction=0.0, final_weight_decay=0.4), run)
    optimisation.prepare(now(10), None)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.025, 0.05, 0.05])
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.22, 0.0, 0.0, 0.0])
    optimisation.prepare(now(10), 1.0)  # of a phase before the training
    assert optimisation.lr == pytest.approx(0.1)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.04)


def test_gradients_are_clipped_to_their_norm_over_all_parameters():
    parameters = list(model().parameters())
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.full_like(p, 3.0)
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
    optimizer = optimizers.sgd([ParameterGroup(parameters)], batch=256, lr=1.0, momentum=0.0, weight_decay=0.0)
    optimisation = Optimisation(optimizer, Schedule(warmup_epochs=0, clip_gradient_norm=0.5), RunShape(1, 1, 64))
    optimisation.step(now(0))
    for p, old in zip(parameters, before, strict=True):
        assert torch.allclose(p, old - 3.0 * 0.5 / norm, atol=1e-5)
