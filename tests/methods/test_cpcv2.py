"""CPC v2: a context sees only the patches above, and a prediction must be told apart from all patches of the batch.
Loss and fifty steps are compared with code written independently from the publication.
"""

import copy
import math

import pytest
import torch
from driven import drive, tiny_encoder
from test_infomin import refused
from tiny import OF_PATCHES, batch_of, compose, layers_of, now
from torch import nn

from caco.config import composition
from caco.config.composition import instantiate
from caco.engine.assembly import build_encoder, build_method
from caco.engine.optimizers import OptimizerSchedule, adamw
from caco.engine.training import run_training
from caco.errors import UserError
from caco.methods.cpcv2 import ContextNetwork, CPCv2
from caco.nn.backbones import small_resnet, timm_backbone
from caco.runs.identity import plain
from caco.schedules import RunShape

B, H, F, D = 4, 4, 6, 5


def cpc(**settings):
    encoder = tiny_encoder(dim=D, layers=1)
    small = {"grid": H, "distances": [2, 3], "hidden_dim": 7, "blocks": 2, "averaging": 0.9}
    return CPCv2(encoder=encoder, **{**small, **settings}).double().train()


def batch_at(step: int, images: int = B):
    generator = torch.Generator().manual_seed(900 + step)
    return batch_of([], patches=torch.randn(images, H * H, 3, 4, 4, generator=generator, dtype=torch.float64))


# The networks, computed for one place of the grid at a time.


def context_by_hand(network, z):
    """The context network on z[b][i][j], vectors of the places. A block is a 1 x 1 convolution, ReLU, 1 x 3 with zeros
    outside, 2 x 1 with a row of zeros above, ReLU, 1 x 1, added to its input; a ReLU comes last."""
    images, rows, columns, _ = z.shape
    x = z
    for one, _, row, _, column, _, last in network.blocks:
        a = (x @ one.weight[:, :, 0, 0].T + one.bias).clamp_min(0)
        b = torch.zeros(images, rows, columns, len(row.bias), dtype=z.dtype) + row.bias
        for j in range(columns):
            for s in (-1, 0, 1):
                if 0 <= j + s < columns:
                    b[:, :, j] += a[:, :, j + s] @ row.weight[:, :, 0, s + 1].T
        above = torch.cat([torch.zeros_like(b[:, :1]), b[:, :-1]], 1)
        c = b @ column.weight[:, :, 1, 0].T + above @ column.weight[:, :, 0, 0].T + column.bias
        x = x + c.clamp_min(0) @ last.weight[:, :, 0, 0].T + last.bias
    return x.clamp_min(0)


def turned(grid, turns):
    """[b][i][j] rotated by quarter turns; one turn makes the right column the top row."""
    for _ in range(turns):
        side = grid.shape[1]
        grid = torch.stack([torch.stack([grid[:, j, side - 1 - i] for j in range(side)], 1) for i in range(side)], 1)
    return grid


def loss_by_hand(method, patches, groups=1):
    """The loss of the published pseudocode: rows k to H - 1 are predicted from the contexts k rows above, and each
    prediction is classified among the targets of all patches.
    """
    images, total = len(patches), 0.0
    z = method.encoder.backbone(patches.reshape(-1, *patches.shape[2:])).reshape(images, H, H, F)
    head = method.encoder.projector[0]
    for turns in range(len(method.prediction.contexts)):
        grid = turned(z, turns)
        context, target = context_by_hand(method.prediction.contexts[turns], grid), grid @ head.weight.T + head.bias
        for number, k in enumerate(method.prediction.distances):
            layer = method.prediction.predictors[turns][number]
            losses = []
            for image in range(images):
                group = images // groups
                first = image // group * group
                others = [target[b, i, j] for b in range(first, first + group) for i in range(H) for j in range(H)]
                for i in range(H - k):
                    for j in range(H):
                        predicted = 0.1 * (layer.weight[:, :, 0, 0] @ context[image, i, j] + layer.bias)
                        logits = torch.stack([predicted @ other for other in others])
                        right = (image - first) * H * H + (i + k) * H + j
                        losses.append(torch.logsumexp(logits, 0) - logits[right])
            total = total + sum(losses) / len(losses)
    return total


def test_the_context_network_by_hand():
    torch.manual_seed(0)
    network = ContextNetwork(width=F, hidden_dim=7, blocks=3).double()
    z = torch.randn(2, 5, 4, F, dtype=torch.float64)
    ours = network(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.allclose(ours, context_by_hand(network, z), atol=1e-12, rtol=0)


def test_a_context_sees_its_row_and_those_above_and_nothing_below():
    torch.manual_seed(0)
    network = ContextNetwork(width=F).double()
    z = torch.randn(1, F, 6, 6, dtype=torch.float64, requires_grad=True)
    for row in range(6):
        (gradient,) = torch.autograd.grad(network(z)[0, :, row, 3].sum(), z)
        seen = gradient[0].abs().amax((0, 2)) > 0
        assert not seen[row + 1 :].any() and seen[row] and seen[max(0, row - 5) : row].all()


def test_the_other_directions_look_from_the_other_sides():
    """When the grid is rotated, a context sees what is to the right of it, below it, or to the left."""
    method = cpc(distances=[2])
    for turns, (axis, ahead) in enumerate([(0, 1), (1, -1), (0, -1), (1, 1)]):
        z = torch.randn(1, H, H, F, dtype=torch.float64, requires_grad=True)
        prediction = method.prediction(z)[turns][0]
        (gradient,) = torch.autograd.grad(prediction[0, 0].sum(), z)
        seen = gradient[0].abs().sum(-1) > 0
        lines = seen.any(1 - axis).tolist()
        assert lines == ([True, False, False, False] if ahead > 0 else [False, False, False, True]), turns


@pytest.mark.parametrize("settings", [{}, {"distances": [3], "directions": 1}, {"group_size": 2}])
def test_loss_and_gradients_are_those_of_the_publication(settings):
    method, batch = cpc(**settings), batch_at(0)
    net = copy.deepcopy(method)
    loss = method(batch, now()).loss
    loss.backward()
    by_hand = loss_by_hand(net, batch.patches, groups=B // settings.get("group_size", B))
    by_hand.backward()
    assert torch.allclose(loss, by_hand, atol=1e-11, rtol=0)
    for (name, p), other in zip(method.named_parameters(), net.named_parameters(), strict=True):
        same = p.grad is None and other[1].grad is None or torch.allclose(p.grad, other[1].grad, atol=1e-12, rtol=0)
        assert same, name
    assert method.encoder.projector[0].weight.grad.abs().max() > 1e-3, "the targets learn too"


def test_chance_is_the_logarithm_of_the_patches():
    """Predictions that are all zero give a loss of log(B H W) for each direction and distance."""
    method = cpc(scale=1e-9)
    assert method(batch_at(0), now()).loss.item() == pytest.approx(4 * 2 * math.log(B * H * H), abs=1e-6)


def test_fifty_steps_are_those_of_a_plain_loop():
    """Adam (0.8, 0.999) at a constant rate with gradient clipping by the norm over all parameters, and a moving average
    of the weights after each step.
    """
    method = cpc(distances=[2], directions=2, group_size=2)
    net, average = copy.deepcopy(method), copy.deepcopy(method.encoder)
    rate, clip = 3e-3, 0.036
    optimizer = adamw(
        method.parameter_groups(), batch=B, lr=rate, reference_batch=None, betas=(0.8, 0.999), weight_decay=0.0
    )
    schedule = OptimizerSchedule(warmup_epochs=0, final_fraction=1.0, clip_gradient_norm=clip)
    ours = drive(method, optimizer, schedule, RunShape(10, 5, B), 50, batch_at=batch_at)

    learned = {name: p for name, p in net.named_parameters() if p.requires_grad}
    first, second, theirs, was_cut = {}, {}, [], 0
    for step in range(50):
        loss = loss_by_hand(net, batch_at(step).patches, groups=2)
        gradients = torch.autograd.grad(loss, learned.values())
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        was_cut += bool(norm > clip)
        with torch.no_grad():
            for (name, p), g in zip(learned.items(), gradients, strict=True):
                g = g * min(1.0, clip / (norm.item() + 1e-6))
                first[name] = 0.8 * first.get(name, 0.0) + 0.2 * g
                second[name] = 0.999 * second.get(name, 0.0) + 0.001 * g * g
                corrected = first[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                p -= rate * corrected[0] / (corrected[1].sqrt() + 1e-8)
            for mine, its in zip(average.parameters(), net.encoder.parameters(), strict=True):
                mine.copy_(0.9 * mine + 0.1 * its)
        theirs.append(loss.item())
    assert 0 < was_cut < 50, "some but not all gradients must be clipped, or the test would not notice clipping"
    assert ours == pytest.approx(theirs, abs=1e-8) and len({round(loss, 9) for loss in ours}) == 50
    for name, p in learned.items():
        assert torch.allclose(dict(method.named_parameters())[name], p, atol=1e-7), name
    for mine, its in zip(method.twin.encoder.parameters(), average.parameters(), strict=True):
        assert torch.allclose(mine, its, atol=1e-7)


def test_evaluators_see_the_average_with_the_encoder_s_statistics():
    method = cpc()
    assert method.backbone is method.twin.encoder.backbone
    method(batch_at(0), now()).loss.backward()
    assert not torch.allclose(method.twin.encoder.backbone[1].running_var, method.encoder.backbone[1].running_var)
    method.after_step(now(twin_momentum=0.9))
    assert torch.equal(method.twin.encoder.backbone[1].running_var, method.encoder.backbone[1].running_var)
    without = cpc(averaging=None)
    assert (
        without.twin is None
        and without.backbone is without.encoder.backbone
        and without.schedules(RunShape(2, 3, B)) == {}
    )
    assert method.schedules(RunShape(2, 3, B)) == {"twin_momentum": [0.9] * 6}


@pytest.mark.parametrize(("make", "settings"), [(small_resnet, {"width": 8}), (timm_backbone, {"name": "resnet18"})])
def test_layer_normalisation_is_over_channels_and_places_of_an_image_and_nowhere_else(make, settings):
    torch.manual_seed(0)
    backbone = make(layer_norm=True, **settings).double().train()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in backbone.modules())
    layers = [layer for layer in backbone.modules() if isinstance(layer, nn.GroupNorm)]
    x = torch.randn(2, layers[0].num_channels, 3, 3, dtype=torch.float64)
    centred = x - x.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(
        layers[0](x), centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt(), atol=1e-12
    )
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(backbone(images)[:1], backbone(images[:1]), atol=1e-10), (
        "an image's features do not depend on the other images"
    )
    with pytest.raises(UserError, match="backbone.layer_norm is for ResNets"):
        timm_backbone(name="vit_tiny_patch16_224", layer_norm=True)


def test_the_published_recipe():
    cfg = composition.job_config(composition.compose(["method=cpcv2", "batch=512"]))
    tree = plain(cfg)
    assert tree["bank"] is None and tree["backbone"]["name"] == "resnet50" and tree["backbone"]["layer_norm"] is True
    assert {key: tree["optimizer"][key] for key in ("lr", "reference_batch", "betas", "weight_decay")} == {
        "lr": 4e-4, "reference_batch": 512, "betas": [0.8, 0.999], "weight_decay": 0.0,
    }  # fmt: skip
    assert tree["schedule"]["final_fraction"] == 1.0 and tree["schedule"]["clip_gradient_norm"] == 0.01
    expected = {"hidden_dim": 256, "blocks": 5, "scale": 0.1, "directions": 4, "averaging": 0.9999, "grid": 6}
    assert {key: tree["method"][key] for key in expected} == expected
    with torch.device("meta"):
        encoder = build_encoder(cfg)
        method = instantiate(cfg.method, encoder=encoder)
    assert layers_of(encoder.projector) == "2048-64b"
    assert [tuple(layer.weight.shape) for layer in method.prediction.contexts[0].blocks[0] if isinstance(layer,
    nn.Conv2d)] == [
        (256, 2048, 1, 1), (256, 256, 1, 3), (256, 256, 2, 1), (2048, 256, 1, 1),
    ]  # fmt: skip
    views = instantiate(cfg.augmentation)
    assert (
        views.sizes == []
        and views.patches.each.then["gray"].p == 0.25
        and views.patches.each.then["drop_channels"].p == 0.8
    )
    assert views.patches.each.then["elastic"].p == 0.2 and views.patches.each.then["two_operations"].operations == 2


def test_views_and_images_that_it_cannot_take_are_refused(tmp_path):
    told = refused("preset=demo", "method=cpcv2")
    assert (
        "no view of this augmentation is cut into patches; choose one of cpcv2, cpcv2_cifar."
        " Images with sides below 24 pixels" in told
    )
    small = ["method=cpcv2", *OF_PATCHES["cpcv2"], "projector=small", "projector.dim=8", "optimizer=sgd"]
    with pytest.raises(UserError, match="takes 25 patches of each image; got a grid of 6 x 6"):
        run_training(compose(*small, "method.grid=5", "method.distances=[3]", bank=False), tmp_path)
    with pytest.raises(UserError, match="images of digits/train are too small for patches"):
        run_training(
            compose(*small, "data._target_=caco.data.sets.folders.digits", "data.size=16", bank=False), tmp_path
        )
    method = build_method(compose(*small, bank=False))
    assert method.needs.whole_batch is False and method.needs.num_patches == 36
    six = batch_of([], patches=torch.randn(6, 36, 3, 12, 12))
    for take in (lambda: method.phases(RunShape(2, 3, 6)), lambda: method(six, now())):
        with pytest.raises(
            UserError, match="group_size: expected null, or a divisor of the 6 images that a process takes at once"
        ):
            take()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distances": []}, r"distances: expected list of int from 1, 1 or more of them, got \[\]"),
        ({"distances": [4]}, "from 1 to grid - 1, 3"),
        ({"distances": [2, 2]}, "different numbers"),
        ({"directions": 5}, "directions: expected int from 1 up to 4, got 5"),
        ({"group_size": 1}, "group_size: expected int from 2 or None, got 1"),
        ({"averaging": 1.0}, r"averaging: expected float from 0 below 1 or None, got 1\.0"),
    ],
)
def test_values_out_of_their_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        cpc(**settings)
