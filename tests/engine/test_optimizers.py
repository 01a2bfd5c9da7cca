"""Learning rates follow the paper's schedule, and parameter groups its exclusions from weight decay and LARS."""

import math

import pytest
import torch
from torch import nn

from caco.engine import optimizers
from caco.engine.optimizers import Optimisation, OptimizerSchedule
from caco.errors import UserError
from caco.methods.base import Now, ParameterGroup
from caco.schedules import RunShape, cosine, warmup_and_cosine


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False)).double()


def test_the_paper_s_rate_by_hand_per_epoch():
    """As in the published code, the factor is (e + 1) / 10 for ten epochs, then a cosine that would reach 1/100 at the
    end.
    """
    factor = OptimizerSchedule(warmup_epochs=10, final_fraction=0.01).learning_rate(RunShape(200, 3, 64, "epoch"))
    assert len(factor) == 600
    assert factor[:6] == [0.1] * 3 + [0.2] * 3
    assert factor[27] == 1.0 and factor[30] == 1.0
    assert factor[3 * 105] == pytest.approx(0.505)  # the middle of the cosine: (1 + 0.01) / 2
    assert factor[-1] == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 189 / 190)))


def test_per_step_the_rate_changes_with_every_step_and_agrees_at_epoch_borders():
    step = OptimizerSchedule(warmup_epochs=2).learning_rate(RunShape(10, 5, 64))
    epoch = OptimizerSchedule(warmup_epochs=2).learning_rate(RunShape(10, 5, 64, "epoch"))
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


def test_a_warm_up_from_a_fraction_has_both_ends_and_the_cosine_begins_with_the_whole_rate():
    """As in SwAV and DINO: linspace(start, peak, W), then final + (peak - final)(1 + cos(pi t / T)) / 2 for t from 0 to
    T - 1.
    """
    swav = OptimizerSchedule(warmup_epochs=2, warmup_start=0.0625, final_fraction=0.001).learning_rate(
        RunShape(10, 5, 64)
    )
    assert swav[:10] == pytest.approx([0.0625 + 0.9375 * t / 9 for t in range(10)])
    assert swav[9] == swav[10] == 1.0
    assert swav[-1] == pytest.approx(0.001 + 0.999 * (1 + math.cos(math.pi * 39 / 40)) / 2) and swav[-1] > 0.001
    assert OptimizerSchedule(warmup_epochs=1, warmup_start=0.0).learning_rate(RunShape(2, 3, 64))[:4] == pytest.approx(
        [0, 0.5, 1, 1]
    )


def test_a_warm_up_from_0_that_the_next_step_ends():
    """As in BYOL, MoCo v3, Barlow Twins and VICReg: lr t / W, then a cosine over the remaining steps to 0 or 1/1000."""
    factor = OptimizerSchedule(
        warmup_epochs=2, warmup_start=0.0, warmup_end="next", final_fraction=0.001
    ).learning_rate(RunShape(10, 5, 64))
    assert factor[:11] == pytest.approx([t / 10 for t in range(11)], abs=1e-15) and factor[0] == 0.0
    assert factor[30] == pytest.approx(0.001 + 0.999 / 2)
    assert factor[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 39 / 40)) * 0.999 + 0.001)


def test_a_final_rate_is_the_same_at_every_batch():
    for batch in (64, 1024):
        optimizer = optimizers.sgd([ParameterGroup(list(model().parameters()))], batch=batch, lr=0.3)
        optimisation = Optimisation(
            optimizer, OptimizerSchedule(warmup_epochs=0, final_fraction=None, final_lr=0.001), RunShape(2, 5, batch)
        )
        optimisation.prepare(now(5), None)
        assert optimisation.lr == pytest.approx((0.3 * batch / 256 + 0.001) / 2)


@pytest.mark.parametrize("both", [{"final_fraction": 0.1, "final_lr": 0.1}, {"final_fraction": None}])
def test_one_final_rate_is_given(both):
    with pytest.raises(ValueError, match="schedule needs exactly one of final_fraction, final_lr and drops"):
        OptimizerSchedule(**both)


def test_a_warm_up_that_ends_within_an_epoch_never_exceeds_the_rate():
    assert max(OptimizerSchedule(warmup_epochs=2.5).learning_rate(RunShape(10, 5, 64, "epoch"))) == 1.0


def test_the_twin_s_momentum_goes_from_0_99_to_1_by_a_cosine():
    m = cosine(RunShape(10, 5, 64), 0.99, 1.0)
    assert m[0] == pytest.approx(0.99)
    assert m[25] == pytest.approx(0.995)
    assert m[-1] == pytest.approx(1 - 0.01 * 0.5 * (1 + math.cos(math.pi * 49 / 50)))


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match="must be below epochs, 5; got 10"):
        OptimizerSchedule(warmup_epochs=10).learning_rate(RunShape(5, 3, 64))


def test_base_rates_scale_with_the_batch():
    groups = [ParameterGroup(list(model().parameters()))]
    assert optimizers.lars(groups, batch=4096).param_groups[0]["lr"] == pytest.approx(4.8)  # 0.3 x 16
    assert optimizers.sgd(groups, batch=64).param_groups[0]["lr"] == pytest.approx(0.0075)
    assert optimizers.sgd(groups, batch=64, reference_batch=None).param_groups[0]["lr"] == 0.03


def test_lars_by_hand():
    """Two steps. Weights move by trust |p| / |g + wd p| times g + wd p, biases and BatchNorm by g alone; momentum comes
    after the scaling.
    """
    p, bias, new = (
        nn.Parameter(torch.tensor(values, dtype=torch.float64)) for values in ([[3.0, 4.0]], [0.6], [[0.0, 0.0]])
    )
    groups = [ParameterGroup([p, bias, new])]
    optimizer = optimizers.lars(groups, batch=256, lr=0.5, weight_decay=0.1, momentum=0.9, trust_coefficient=0.01)
    p.grad, bias.grad, new.grad = (
        torch.tensor(values, dtype=torch.float64) for values in ([[0.0, 2.0]], [-0.2], [[1.0, 2.0]])
    )
    optimizer.step()
    first = 0.01 * 5 / math.hypot(0.3, 2.4) * torch.tensor([[0.3, 2.4]], dtype=torch.float64)  # g + wd p = [0.3, 2.4]
    at = torch.tensor([[3.0, 4.0]], dtype=torch.float64) - 0.5 * first
    assert torch.allclose(p, at, atol=1e-15)
    assert bias.item() == pytest.approx(0.6 + 0.5 * 0.2, abs=1e-15)
    assert new.tolist() == [[-0.5, -1.0]], "a parameter of norm 0 takes the plain gradient"
    p.grad, bias.grad, new.grad = torch.zeros_like(p), torch.tensor([0.1], dtype=torch.float64), None
    optimizer.step()
    # If the loss has no gradient, g + wd p is wd p, and the step is trust |p| / (wd |p|) times it: 0.01 p.
    assert torch.allclose(p, at - 0.5 * (0.9 * first + 0.01 * at), atol=1e-15)
    assert bias.item() == pytest.approx(0.7 - 0.5 * (0.9 * -0.2 + 0.1), abs=1e-15)
    assert new.tolist() == [[-0.5, -1.0]], "without a gradient nothing moves, whatever its momentum"


def test_timm_s_lars_by_hand():
    """Weights move by lr * trust * |p| / (|g| + wd |p|) times (g + wd p), biases and BatchNorm by lr * g without
    decay.
    """
    net = model()
    parameters = list(net.parameters())
    before = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    optimizer = optimizers.lars_timm([ParameterGroup(parameters)], batch=256, lr=0.5, weight_decay=0.1, momentum=0.9)
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        if p.ndim > 1:
            ratio = 1e-3 * old.norm() / (p.grad.norm() + 0.1 * old.norm())
            expected = old - 0.5 * ratio * (p.grad + 0.1 * old)
        else:
            expected = old - 0.5 * p.grad
        assert torch.allclose(p, expected, atol=1e-9)


def test_lars_goes_on_from_its_state_to_the_same_bits():
    def moved(steps, state=None, at=None):
        net = model()
        if at is not None:
            net.load_state_dict(at)
        optimizer = optimizers.lars([ParameterGroup(list(net.parameters()))], batch=256)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in steps:
            for number, p in enumerate(net.parameters()):
                p.grad = torch.full_like(p, 0.1 * step + number)
            optimizer.step()
        return net.state_dict(), optimizer.state_dict()

    whole, _ = moved(range(4))
    at, state = moved(range(2))
    again, _ = moved(range(2, 4), state, at)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_larc_by_hand():
    """Two steps for all parameters, biases and BatchNorm included: the denominator is a sum of norms, and momentum
    comes after the scaling.
    """
    p, bias, new = (
        nn.Parameter(torch.tensor(values, dtype=torch.float64)) for values in ([[3.0, 4.0]], [0.6], [[0.0, 0.0]])
    )
    optimizer = optimizers.larc(
        [ParameterGroup([p, bias, new])], batch=256, lr=0.5, weight_decay=0.1, momentum=0.9, trust_coefficient=0.01
    )
    p.grad, bias.grad, new.grad = (
        torch.tensor(values, dtype=torch.float64) for values in ([[0.0, 2.0]], [-0.2], [[1.0, 2.0]])
    )
    optimizer.step()
    # |p| 5, |g| 2: 0.01 * 5 / (2 + 0.5) = 0.02 of g + wd p = [0.3, 2.4]
    assert torch.allclose(
        p, torch.tensor([[3 - 0.5 * 0.02 * 0.3, 4 - 0.5 * 0.02 * 2.4]], dtype=torch.float64), atol=1e-9, rtol=0
    )
    # |p| 0.6, |g| 0.2: 0.01 * 0.6 / (0.2 + 0.06) of -0.2 + 0.06
    trust = 0.006 / 0.26
    assert bias.item() == pytest.approx(0.6 - 0.5 * trust * -0.14, abs=1e-8)
    assert new.tolist() == [[-0.5, -1.0]], "a parameter of norm 0 takes the plain gradient"
    at, moved = p.detach().clone(), bias.item()
    p.grad, bias.grad, new.grad = torch.zeros_like(p), torch.tensor([0.1], dtype=torch.float64), None
    optimizer.step()
    # A gradient of norm 0 is not scaled and adds no weight decay, so p moves by 0.9 of the last step.
    assert torch.allclose(
        p, at - 0.5 * 0.9 * torch.tensor([[0.02 * 0.3, 0.02 * 2.4]], dtype=torch.float64), atol=1e-9, rtol=0
    )
    velocity = 0.9 * trust * -0.14 + 0.01 * moved / (0.1 + 0.1 * moved) * (0.1 + 0.1 * moved)
    assert bias.item() == pytest.approx(moved - 0.5 * velocity, abs=1e-8)
    assert new.tolist() == [[-0.5, -1.0]], "without a gradient nothing moves, whatever its momentum"


def test_larc_and_lars_differ_by_more_than_rounding():
    """With a large weight decay: LARC divides by a sum of norms and also scales biases; timm's LARS scales only
    weights.
    """
    moved = {}
    for factory in (optimizers.larc, optimizers.lars):
        net = model()
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        before = net[0].bias.detach().clone()
        factory([ParameterGroup(list(net.parameters()))], batch=256, lr=0.5, weight_decay=0.1).step()
        moved[factory] = (net[0].bias - before).norm().item()
    assert moved[optimizers.larc] < 0.01 * moved[optimizers.lars]


def test_adamw_decays_no_parameter_of_one_dimension():
    groups = optimizers.adamw([ParameterGroup(list(model().parameters()))], batch=256).param_groups
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [(0.05, {2}), (0.0, {1})]
    (all_decay,) = optimizers.adamw(
        [ParameterGroup(list(model().parameters()))], batch=256, decay_one_dimensional=True
    ).param_groups
    assert (all_decay["weight_decay"], len(all_decay["params"])) == (0.05, 5), (
        "MoCo v3's AdamW also decays norms and biases"
    )


def test_a_clipped_trust_is_the_smaller_of_the_rate_and_the_factor():
    """For |p| = 5 and |g| = 2 the factor is 0.02 x 5 / (2 + 0.1 x 5) = 0.04. A rate of 0.5 becomes 0.04, a rate of 0.01
    stays, and a rate of 0 moves nothing.
    """
    for lr, rate in ((0.5, 0.04), (0.01, 0.01), (0.0, 0.0)):
        p, bias = (nn.Parameter(torch.tensor(values, dtype=torch.float64)) for values in ([[3.0, 4.0]], [0.6]))
        optimizer = optimizers.lars_timm(
            [ParameterGroup([p, bias])], batch=256, weight_decay=0.1, trust_coefficient=0.02, trust_clip=True
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        p.grad, bias.grad = torch.tensor([[0.0, 2.0]], dtype=torch.float64), torch.tensor([-0.2], dtype=torch.float64)
        optimizer.step()
        assert torch.allclose(p, torch.tensor([[3 - rate * 0.3, 4 - rate * 2.4]], dtype=torch.float64), atol=1e-9)
        assert bias.item() == pytest.approx(0.6 + lr * 0.2, abs=1e-15)


def test_adam_s_decay_is_part_of_the_gradient():
    """The first step of Adam is the rate times the sign of g + wd p, for biases as well."""
    p, bias = (nn.Parameter(torch.tensor(values, dtype=torch.float64)) for values in ([[3.0, -4.0]], [0.6]))
    optimizer = optimizers.adam([ParameterGroup([p, bias])], batch=128, lr=0.2, weight_decay=0.1)
    p.grad, bias.grad = torch.tensor([[-0.2, 0.1]], dtype=torch.float64), torch.tensor([-0.01], dtype=torch.float64)
    optimizer.step()
    assert p.tolist()[0] == pytest.approx([2.9, -3.9]) and bias.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    "factory",
    [optimizers.lars, optimizers.lars_timm, optimizers.larc, optimizers.sgd, optimizers.adam, optimizers.adamw],
)
def test_a_rate_that_is_not_positive_is_refused(factory):
    with pytest.raises(ValueError, match="optimizer.lr must be positive; got 0"):
        factory([ParameterGroup(list(model().parameters()))], batch=64, lr=0.0)


def now(step):
    return Now(step, "training", step, False, 0, step, {"head": 0.5})


def test_a_step_takes_its_rate_and_decay_and_a_group_its_own():
    """The second group has half the rate, the third takes its factor from a schedule of the method, and weight decay
    goes from 0.04 to 0.4.
    """
    parameters = list(model().parameters())
    groups = [
        ParameterGroup(parameters[:1]),
        ParameterGroup(parameters[1:2], rate=0.5),
        ParameterGroup(parameters[2:], rate="head", decay=False),
    ]
    optimizer = optimizers.adamw(groups, batch=256, lr=0.1, weight_decay=0.04)
    run = RunShape(4, 5, 64)
    optimisation = Optimisation(
        optimizer, OptimizerSchedule(warmup_epochs=0, final_fraction=0.0, final_weight_decay=0.4), run
    )
    optimisation.prepare(now(10), None)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.025, 0.05, 0.05])
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.22, 0.0, 0.0, 0.0])
    optimisation.prepare(now(10), 1.0)  # in a phase before the training
    assert optimisation.lr == pytest.approx(0.1)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.04)


def test_gradients_are_clipped_to_their_norm_over_all_parameters():
    parameters = list(model().parameters())
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.full_like(p, 3.0)
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
    optimizer = optimizers.sgd([ParameterGroup(parameters)], batch=256, lr=1.0, momentum=0.0, weight_decay=0.0)
    optimisation = Optimisation(
        optimizer, OptimizerSchedule(warmup_epochs=0, clip_gradient_norm=0.5), RunShape(1, 1, 64)
    )
    optimisation.step(now(0))
    for p, old in zip(parameters, before, strict=True):
        assert torch.allclose(p, old - 3.0 * 0.5 / norm, atol=1e-5)


def test_each_gradient_is_clipped_to_its_own_norm():
    """As in DINO, a parameter's gradient with a norm above 3 is multiplied by 3 / (norm + 1e-6); others stay."""
    parameters = list(model().parameters())
    before = [p.detach().clone() for p in parameters]
    for p, size in zip(parameters, (3.0, 0.01, 2.0, 0.02, 1.0), strict=True):
        p.grad = torch.full_like(p, size)
    gradients = [p.grad.clone() for p in parameters]
    optimizer = optimizers.sgd([ParameterGroup(parameters)], batch=256, lr=1.0, momentum=0.0, weight_decay=0.0)
    Optimisation(optimizer, OptimizerSchedule(warmup_epochs=0, clip_each_gradient_norm=0.5), RunShape(1, 1, 64)).step(
        now(0)
    )
    for p, old, g in zip(parameters, before, gradients, strict=True):
        assert torch.allclose(p, old - g * min(1.0, 0.5 / (g.norm() + 1e-6)), atol=1e-9)
    assert min(g.norm() for g in gradients) < 0.5 < max(g.norm() for g in gradients)


def test_a_group_frozen_for_an_epoch_moves_with_the_first_step_of_the_second():
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [ParameterGroup([first]), ParameterGroup([second], frozen_epochs=1)]
    optimizer = optimizers.adamw(groups, batch=256, lr=0.1, weight_decay=0.5)
    optimisation = Optimisation(optimizer, OptimizerSchedule(warmup_epochs=0), RunShape(2, 3, 64))
    for step in range(4):
        first.grad, second.grad = torch.ones(2), torch.ones(2)
        optimisation.step(Now(step, "training", step, False, *divmod(step, 3), {}))
        assert (second == 1).all() == (step < 3) and (first != 1).all(), (
            "a frozen group gets neither gradient steps nor weight decay"
        )


def test_a_rate_that_drops_at_shares_of_the_run_rounded_to_whole_epochs():
    """As in CMC, the rate falls to a tenth at epochs 120, 160 and 200 of 240, independently of batch and warm-up."""
    factor = OptimizerSchedule(warmup_epochs=1, final_fraction=None, drops=[0.5, 0.6667, 0.8333]).learning_rate(
        RunShape(240, 2, 64)
    )
    by_epoch = [1, 120, 160, 200]
    assert [factor[2 * epoch - 1] for epoch in by_epoch] == pytest.approx([1, 1, 0.1, 0.01])
    assert [factor[2 * epoch] for epoch in by_epoch] == pytest.approx([1, 0.1, 0.01, 0.001])
    assert factor[0] == 0.5


@pytest.mark.parametrize(
    "wrong", [{"drops": [0.5, 120]}, {"drops": [0.5], "drop_factor": 1.0}, {"drops": [0.5], "final_lr": 0.1}]
)
def test_drops_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match="schedule needs"):
        OptimizerSchedule(final_fraction=None, **wrong)


def test_a_run_of_more_steps_than_any_is_refused_before_a_table_of_them_is_made():
    RunShape(20_000, 1000, 64).of_schedules()
    with pytest.raises(UserError, match="epochs: expected at most 20,000, which are 20,000,000 steps of 64 images"):
        RunShape(4_000_000_000, 1000, 64).of_schedules()
