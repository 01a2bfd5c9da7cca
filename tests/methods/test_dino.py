"""DINO's student predicts its teacher, whose centre, temperature and weights change as published; the expected values
are computed independently here.
"""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from driven import drive, tiny_encoder, views_of
from recorded import final
from test_swav import loss_by_hand
from tiny import batch_of, compose, now, train
from torch import nn
from torch.nn import functional as F

from caco import equations
from caco.config import composition
from caco.config.composition import instantiate
from caco.engine.assembly import build_method
from caco.engine.optimizers import OptimizerSchedule, adamw, lars, lars_timm, sgd
from caco.methods.dino import DINO
from caco.nn.backbones import timm_backbone
from caco.nn.heads import Encoder, Projector
from caco.nn.weights import load_backbone
from caco.schedules import RunShape

B, D, K = 6, 5, 7
HEAD = {"layers": 3, "activation": "gelu"}


def dino(**settings):
    """DINO with a teacher that differs from the student, and a centre that is not 0, so that tests notice mistakes."""
    method = DINO(encoder=tiny_encoder(**HEAD), num_prototypes=K, **settings).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in (*method.twin.parameters(), *method.twin_prototypes.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        method.centre.copy_(0.1 * torch.randn(K, generator=generator, dtype=torch.float64))
    return method


def scores_by_hand(encoder, prototypes, views):
    """Scores by view. The backbone takes all views of one size together, the head takes all views; the rows of its last
    layer are g v / |v|.
    """
    small = [encoder.backbone(views[2])] if len(views) > 2 else []
    z = encoder.projector(torch.cat([encoder.backbone(torch.cat(views[:2])), *small]))
    z = z / z.norm(dim=1, keepdim=True)
    rows = prototypes.weight / prototypes.weight.norm(dim=1, keepdim=True)
    return (z @ (rows if prototypes.norm is None else rows * prototypes.norm).T).split(len(views[0]))


def taught_by_hand(method, views, centre, temperature):
    """The teacher's raw scores for the two large views, and the targets computed from them."""
    with torch.no_grad():
        y = scores_by_hand(method.twin.encoder, method.twin_prototypes.encoder, views[:2])
    targets = []
    for view in y:
        e = ((view - centre) / temperature).exp()
        targets.append(e / e.sum(1, keepdim=True))
    return torch.cat(y), targets


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_loss_and_gradients_are_those_of_the_publication(norm_last_layer):
    method, views = dino(norm_last_layer=norm_last_layer), views_of(0, B)
    if not norm_last_layer:
        with torch.no_grad():
            method.prototypes.norm.mul_(torch.arange(1, K + 1)[:, None] / 3)
    other = copy.deepcopy(method)
    outputs = method(batch_of(views), now(teacher_temperature=0.06))
    outputs.loss.backward()
    raw, targets = taught_by_hand(other, views, other.centre, 0.06)
    by_hand = loss_by_hand(scores_by_hand(other.encoder, other.prototypes, views), targets)
    by_hand.backward()
    assert torch.allclose(outputs.loss, by_hand, atol=1e-12)
    assert torch.allclose(targets[0], equations.dino_targets(raw[:B], other.centre, 0.06), atol=1e-12)
    learning = [p for group in method.parameter_groups() for p in group.parameters]
    assert len(learning) == len(list(other.encoder.parameters())) + (1 if norm_last_layer else 2)
    for p, q in zip(learning, [*other.encoder.parameters(), *other.prototypes.parameters()], strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-12)
    assert all(p.grad is None for p in method.twin.parameters()), "the teacher must not get gradients"


def test_lightly_computes_the_same_loss_centre_and_temperatures():
    theirs = pytest.importorskip("lightly.loss").DINOLoss(
        K, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=3
    )
    theirs = theirs.double()
    method = dino(first_teacher_temperature=0.04, teacher_temperature=0.07, teacher_temperature_epochs=3)
    theirs.center.copy_(method.centre)
    temperatures = method.schedules(RunShape(5, 2, B))["teacher_temperature"]
    for step in range(4):
        views = views_of(step, B)
        at = now(teacher_temperature=temperatures[step], twin_momentum=0.9)
        raw, _ = taught_by_hand(method, views, method.centre, 1.0)
        expected = theirs(
            list(raw.split(B)), list(scores_by_hand(method.encoder, method.prototypes, views)), epoch=step // 2
        )
        assert method(batch_of(views), at).loss.item() == pytest.approx(expected.item(), abs=1e-7)
        method.after_step(at)
        assert torch.allclose(method.centre, theirs.center.flatten(), atol=1e-12)


def test_the_temperature_changes_with_the_epoch_and_the_momentum_with_the_step():
    """The temperature is linspace(0.04, 0.07, 4) and then 0.07, for both units of the schedule; the momentum goes from
    0.996 to 1 by a cosine over the steps.
    """
    method = DINO(encoder=tiny_encoder(), num_prototypes=K, teacher_temperature=0.07, teacher_temperature_epochs=4)
    for unit in ("step", "epoch"):
        tables = method.schedules(RunShape(6, 3, B, unit))
        assert tables["teacher_temperature"] == pytest.approx(
            [t for t in (0.04, 0.05, 0.06, 0.07, 0.07, 0.07) for _ in range(3)]
        )
    tables = method.schedules(RunShape(6, 3, B))
    assert tables["twin_momentum"] == pytest.approx(
        [1 - 0.004 * (1 + math.cos(math.pi * t / 18)) / 2 for t in range(18)]
    )
    short = method.schedules(RunShape(2, 3, B))["teacher_temperature"]
    assert short == pytest.approx([0.04] * 3 + [0.05] * 3), "a run may end before its temperature has risen"
    constant = DINO(encoder=tiny_encoder(), num_prototypes=K).schedules(RunShape(2, 1, B))
    assert constant["teacher_temperature"] == [0.04, 0.04]


def test_centre_and_teacher_move_after_the_step_from_raw_scores_and_new_weights():
    method, views = dino(), views_of(0, B)
    raw, _ = taught_by_hand(method, views, 0.0, 1.0)
    centre, teacher = (
        method.centre.clone(),
        [p.clone() for p in (*method.twin.parameters(), *method.twin_prototypes.parameters())],
    )
    at = now(twin_momentum=0.75, teacher_temperature=0.04)
    method(batch_of(views), at).loss.backward()
    assert torch.equal(method.centre, centre), "the centre must not change before the loss is known to be finite"
    with torch.no_grad():
        for p in (*method.encoder.parameters(), *method.prototypes.parameters()):
            p.sub_(0.1 * p.grad)
    method.after_step(at)
    assert torch.allclose(method.centre, 0.9 * centre + 0.1 * raw.mean(0), atol=1e-12)
    student = (*method.encoder.parameters(), *method.prototypes.parameters())
    for old, new, p in zip(
        teacher, (*method.twin.parameters(), *method.twin_prototypes.parameters()), student, strict=True
    ):
        assert torch.allclose(new, 0.75 * old + 0.25 * p, atol=1e-12)


def test_a_batch_in_two_parts_has_the_centre_of_the_whole():
    """Images influence each other only in BatchNorm, so `accumulate` is allowed; without BatchNorm, loss and centre are
    those of the whole batch.
    """

    def without_norm():
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return DINO(
            encoder=Encoder(backbone=backbone, projector=Projector(in_dim=12, dim=D, layers=1)), num_prototypes=K
        ).double()

    views, at = views_of(0, B), now(teacher_temperature=0.04)
    whole, parts = without_norm(), without_norm()
    loss = whole(batch_of(views), at).loss
    losses = [parts(part, at).loss for part in batch_of(views).parts(2)]
    assert torch.allclose(torch.stack(losses).mean(), loss, atol=1e-12)
    whole.after_step(at)
    parts.after_step(at)
    assert torch.allclose(whole.centre, parts.centre, atol=1e-12) and whole.centre.abs().max() > 1e-3
    assert torch.equal(whole.uses, parts.uses) and not whole.needs.whole_batch and parts.taught == []


def test_fifty_steps_are_those_of_a_plain_loop():
    """Five steps per epoch, with AdamW, a schedule of weight decay, each gradient clipped, the last layer frozen for an
    epoch, and all schedules computed by hand.
    """
    method = dino(teacher_temperature=0.07, teacher_temperature_epochs=4, momentum=0.9)
    net = copy.deepcopy(method)
    frozen = {}

    def remember(step):
        frozen[step] = method.prototypes.weight.detach().clone()

    peak, low, decays, clip = 0.02, 1e-4, (0.04, 0.4), 0.03
    optimizer = adamw(method.parameter_groups(), batch=B, lr=peak, reference_batch=None, weight_decay=decays[0])
    schedule = OptimizerSchedule(
        warmup_epochs=2,
        warmup_start=0.0,
        final_fraction=None,
        final_lr=low,
        final_weight_decay=decays[1],
        clip_each_gradient_norm=clip,
    )
    ours = drive(method, optimizer, schedule, RunShape(10, 5, B), 50, remember)
    assert torch.equal(frozen[0], frozen[4]) and not torch.equal(frozen[4], frozen[5])

    def cosine(start, end, total, t):
        return end + (start - end) * (1 + math.cos(math.pi * t / total)) / 2

    rates = [*np.linspace(0, peak, 10), *(cosine(peak, low, 40, t) for t in range(40))]
    temperatures = [0.04, 0.05, 0.06, *[0.07] * 7]
    parameters = {**{f"encoder.{n}": p for n, p in net.encoder.named_parameters()}, "last": net.prototypes.weight}
    moments, times, clipped = {name: [0.0, 0.0] for name in parameters}, dict.fromkeys(parameters, 0), 0
    theirs = []
    for step in range(50):
        views = views_of(step, B)
        raw, targets = taught_by_hand(net, views, net.centre, temperatures[step // 5])
        loss = loss_by_hand(scores_by_hand(net.encoder, net.prototypes, views), targets)
        theirs.append(loss.item())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        with torch.no_grad():
            for name, p in parameters.items():
                g = gradients[name]
                if (factor := clip / (g.norm() + 1e-6)) < 1:
                    g, clipped = g * factor, clipped + 1
                if name == "last" and step < 5:
                    continue
                times[name] += 1
                first, second = moments[name]
                moments[name] = first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
                corrected = first / (1 - 0.9 ** times[name]), second / (1 - 0.999 ** times[name])
                decay = cosine(*decays, 50, step) if p.ndim > 1 else 0.0
                p -= rates[step] * (decay * p + corrected[0] / (corrected[1].sqrt() + 1e-8))
            m = cosine(0.9, 1.0, 50, step)
            for t, s in ((net.twin.encoder, net.encoder), (net.twin_prototypes.encoder, net.prototypes)):
                for a, b in zip(t.parameters(), s.parameters(), strict=True):
                    a.copy_(m * a + (1 - m) * b)
            net.centre.copy_(0.9 * net.centre + 0.1 * raw.mean(0))
    assert 50 < clipped < 50 * len(parameters), (
        "some but not all gradients must be clipped, or the test would not notice clipping"
    )
    assert ours == pytest.approx(theirs, abs=1e-8)
    assert abs(ours[-1] - ours[0]) > 0.1
    for (name, p), q in zip(method.named_parameters(), net.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-7), name


def test_its_head_starts_as_published():
    cfg = composition.job_config(composition.compose(["method=dino_vit"]))
    projector = instantiate(cfg.projector, in_dim=384)
    assert [type(layer) for layer in projector] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    for layer in list(projector)[::2]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02) and (layer.bias == 0).all()
    convnet = instantiate(composition.compose(["method=dino"]).projector, in_dim=64)
    assert [type(layer) for layer in list(convnet)[:6]] == [nn.Linear, nn.BatchNorm1d, nn.GELU] * 2
    method = DINO(encoder=Encoder(backbone=nn.Flatten(), projector=projector), num_prototypes=9)
    z = F.normalize(torch.randn(3, 256), dim=1)
    rows = torch.linalg.lstsq(torch.eye(256), method.prototypes(torch.eye(256))).solution.T
    assert torch.allclose(rows.norm(dim=1), torch.ones(9), atol=1e-5), "the rows must have the norm g = 1"
    assert torch.equal(method.prototypes(z), method.twin_prototypes(z)), "the teacher starts as a copy"


@pytest.mark.parametrize(
    ("name", "peak", "end", "sizes", "decay", "temperatures"),
    [
        ("dino", 0.3 * 4080 / 256, 0.0048, [224] * 2 + [96] * 6, 1e-6, (0.04, 0.07)),
        ("dino_vit", 5e-4 * 4080 / 256, 1e-6, [224] * 2 + [96] * 8, 0.04, (0.04, 0.04)),
    ],
)
def test_its_configurations_are_the_published_ones(name, peak, end, sizes, decay, temperatures):
    cfg = composition.job_config(composition.compose([f"method={name}", "batch=4080"]))
    method = instantiate({**cfg.method, "num_prototypes": 9}, encoder=tiny_encoder())
    optimizer = instantiate(cfg.optimizer, groups=method.parameter_groups())
    decays = {group["weight_decay"] for group in optimizer.param_groups if group["params"][0].ndim > 1}
    assert decays == {decay} and optimizer.param_groups[0]["lr"] == pytest.approx(peak)
    assert instantiate(cfg.augmentation).sizes == sizes
    views = cfg.augmentation.views
    assert [(view.blur_p, view.solarize_p, view.interpolation) for view in views.values()] == [
        (1.0, 0.0, "bicubic"), (0.1, 0.2, "bicubic"), (0.5, 0.0, "bicubic")
    ]  # fmt: skip
    run = RunShape(100, 2, 4080)
    schedule = OptimizerSchedule(**{key: value for key, value in cfg.schedule.items() if key != "unit"})
    rates = [peak * factor for factor in schedule.learning_rate(run, peak)]
    assert (rates[0], rates[19], rates[20]) == pytest.approx((0, peak, peak))
    assert rates[-1] == pytest.approx(end + (peak - end) * (1 + math.cos(math.pi * 179 / 180)) / 2)
    table = method.schedules(run)["teacher_temperature"]
    assert (table[0], table[-1]) == temperatures and method.last_layer_frozen_epochs == 1


@pytest.mark.parametrize("optimizer", [sgd, lars, lars_timm, functools.partial(adamw, decay_one_dimensional=True)])
def test_biases_and_norms_decay_with_no_optimiser(optimizer):
    """As in get_params_groups of the published code, for each optimiser."""
    method = dino(norm_last_layer=False)
    groups = optimizer(method.parameter_groups(), batch=256, lr=1.0, weight_decay=0.1).param_groups
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    learning = {p for p in (*method.encoder.parameters(), *method.prototypes.parameters())}
    assert decays.keys() == learning and {p: 0.1 if p.ndim > 1 else 0.0 for p in learning} == decays
    assert {1, 2} <= {p.ndim for p in learning}


def test_a_vit_takes_both_sizes_and_its_teacher_drops_no_path():
    torch.manual_seed(0)
    backbone = timm_backbone(name="vit_tiny_patch16_224", image_size=32, drop_path_rate=0.5)
    projector = Projector(
        in_dim=192,
        hidden_dim=16,
        dim=8,
        batch_norm=False,
        bias=True,
        activation="gelu",
        initialisation="truncated_normal_0.02",
    )
    method = DINO(encoder=Encoder(backbone=backbone, projector=projector), num_prototypes=K).train()
    views = [torch.randn(4, 3, side, side) for side in (32, 32, 16)]
    assert torch.equal(method.twin(views[:2]), method.twin(views[:2])), (
        "in training mode the teacher drops no path, so its output is the same twice"
    )
    assert not torch.equal(method.encoder(views[:2]), method.encoder(views[:2]))
    loss = method(batch_of(views), now()).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in method.encoder.parameters())


def test_evaluators_see_the_teacher_and_so_does_who_loads_a_checkpoint(tmp_path):
    small = [
        "augmentation=digits",
        "projector=small",
        "projector.hidden_dim=16",
        "projector.dim=8",
        "optimizer=sgd",
        "method.num_prototypes=24",
    ]
    train(tmp_path, "method=dino", *small, "max_steps=2", "eval=[]", bank=False)
    state = final(tmp_path)["method"]
    assert final(tmp_path)["backbone"] == "twin.encoder.backbone"
    cfg = compose("method=dino", *small, bank=False)
    backbone = instantiate(cfg.backbone)
    load_backbone(next((tmp_path / "checkpoints").glob("*.pt")), "caco", backbone)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[f"twin.encoder.backbone.{name}"])
    assert not torch.equal(backbone.bn1.running_mean, state["encoder.backbone.bn1.running_mean"])
    method = build_method(cfg)
    assert method.backbone is method.twin.encoder.backbone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.5}, "momentum: expected float from 0 up to 1, got 1.5"),
        ({"teacher_temperature": 0.0}, r"teacher_temperature: expected float above 0, got 0\.0"),
        ({"teacher_temperature_epochs": -1}, "teacher_temperature_epochs: expected int from 0, got -1"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DINO(encoder=tiny_encoder(), num_prototypes=K, **settings)
