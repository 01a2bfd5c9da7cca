"""BYOL computes what its authors' code computes: the loss, the heads, the twin, fifty steps of LARS."""

import math

import fifty
import pytest
import torch
from fifty import B, backbone, cosine, normed
from tiny import batch_of, now

from caco.engine import optimizers
from caco.methods.byol import BYOL

PROJECTOR = {"layers": 2, "bias": True, "last_bias": False, "initialisation": "truncated_normal_fan_in"}


def byol(**settings):
    return BYOL(encoder=fifty.encoder(**PROJECTOR), predictor_hidden_dim=16, **settings).double()


def head(w, name, x):
    """A head: linear layer with a bias, BatchNorm, ReLU, linear layer without a bias."""
    x = normed(x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"], w[f"{name}.1.weight"], w[f"{name}.1.bias"]).clamp_min(
        0
    )
    return x @ w[f"{name}.3.weight"].T


def by_hand(w, twin, views):
    """The loss 4 - 2 cos(p1, z2') - 2 cos(p2, z1')."""
    p = [head(w, "predictor", head(w, "encoder.projector", backbone(w, view))) for view in views]
    with torch.no_grad():
        z = [head(twin, "encoder.projector", backbone(twin, view)) for view in views]
    return (4 - 2 * cosine(p[0], z[1]) - 2 * cosine(p[1], z[0])).mean()


def test_loss_and_gradient():
    method, views = byol(), fifty.views_of(0)
    w, twin = fifty.weights_of(method), fifty.twin_of(method.twin)
    outputs = method(batch_of(views), now())
    outputs.loss.backward()
    expected = by_hand(w, twin, views)
    assert torch.allclose(outputs.loss, expected, atol=1e-12)
    gradients = fifty.gradients_of(expected, w)
    for name, p in method.named_parameters():
        assert (p.grad is None) == name.startswith("twin."), name
        assert p.grad is None or torch.allclose(p.grad, gradients[name], atol=1e-12), name


def test_a_prediction_of_zero_costs_what_its_target_is_and_no_nan():
    """The normalisation n(x) divides by sqrt(max(|x|^2, 1e-12)), so a zero vector gives no NaN."""
    method = byol()
    with torch.no_grad():
        method.predictor[3].weight.zero_()
    outputs = method(batch_of(fifty.views_of(0)), now())
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(2.0)  # |0 - n(z')|^2 = 1 in both directions
    assert method.predictor[3].weight.grad.isfinite().all()


def test_lightly_s_similarities_make_the_same_loss():
    similarity = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    method, views = byol(), fifty.views_of(0)
    p = [method.predictor(method.encoder(view, unit=False)) for view in views]
    z = [method.twin(view, unit=False) for view in views]
    theirs = (
        similarity(p[0], z[1]) + similarity(p[1], z[0])
    ) / 2  # lightly's examples average the two directions, the authors add them
    assert torch.allclose(method(batch_of(views), now()).loss, 4 + 4 * theirs, atol=1e-12)


def test_fifty_steps():
    """The twin moves after the step with the momentum for the number of steps before it; LARS warms up from 0."""
    method = byol(momentum=0.9)
    w, twin, velocity, losses = fifty.weights_of(method), fifty.twin_of(method.twin), {}, []
    optimizer = optimizers.lars(method.parameter_groups(), batch=B, reference_batch=None, lr=0.3, weight_decay=1e-2)
    ours = fifty.train(method, optimizer, **fifty.FROM_ZERO, final_fraction=0.0)
    for t in range(fifty.STEPS):
        loss = by_hand(w, twin, fifty.views_of(t))
        fifty.lars(w, fifty.gradients_of(loss, w), velocity, fifty.from_zero(t, 0.3, 0.0), 1e-2)
        fifty.follow(twin, w, 1 - (1 - 0.9) * (1 + math.cos(math.pi * t / fifty.STEPS)) / 2)
        losses.append(loss)
    fifty.assert_same_training(ours, method, losses, w, twin)


def test_small_views_predict_each_large_one_and_are_not_predicted():
    method, views = byol(), [*fifty.views_of(0), torch.nn.functional.interpolate(fifty.views_of(1)[0], size=(2, 1))]
    for encoder in (method.encoder, method.twin.encoder):
        encoder.backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((2, 2)), encoder.backbone)
    p = [method.predictor(method.encoder(view, unit=False)) for view in views]
    z = [method.twin(view) for view in views[:2]]
    terms = [2 - 2 * cosine(p[a], z[b]).mean() for a, b in ((0, 1), (1, 0), (2, 0), (2, 1))]
    assert torch.allclose(method(batch_of(views), now()).loss, sum(terms), atol=1e-12)
    method.reduction = "mean"
    assert torch.allclose(method(batch_of(views), now()).loss, sum(terms) / 2, atol=1e-12)
    costs = method.costs([16, 16, 8, 8])
    assert (costs.encoded, costs.followed, costs.terms) == ([0, 1, 2, 3], [0, 1], 6)


def test_the_twin_is_drawn_anew_or_a_copy():
    drawn, copied = byol(), byol(twin_initialisation="copy")
    assert not torch.equal(drawn.twin.encoder.projector[0].weight, drawn.encoder.projector[0].weight)
    for ours, theirs in zip(copied.twin.encoder.parameters(), copied.encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_part_of_a_batch_is_a_batch():
    assert not byol().needs.whole_batch


@pytest.mark.parametrize("wrong", [{"momentum": 1.5}, {"final_momentum": -0.1}])
def test_impossible_momenta_are_refused(wrong):
    with pytest.raises(ValueError, match="expected float from 0 up to 1"):
        byol(**wrong)


def test_one_view_is_refused():
    with pytest.raises(ValueError, match="expected at least 2 of them, got 1"):
        byol()(batch_of(fifty.views_of(0, 1)), now())
