"""VICReg computes what its authors' code computes: the three terms, and fifty steps."""

import fifty
import pytest
import torch
from fifty import B, D, backbone, normed
from tiny import batch_of, now

from caco.engine import optimizers
from caco.methods.vicreg import VICReg


def vicreg(**settings):
    return VICReg(encoder=fifty.encoder(layers=2, bias=True, last_bias=False), **settings).double()


def embedding(w, view):
    x = backbone(w, view) @ w["encoder.projector.0.weight"].T + w["encoder.projector.0.bias"]
    x = normed(x, w["encoder.projector.1.weight"], w["encoder.projector.1.bias"]).clamp_min(0)
    return x @ w["encoder.projector.3.weight"].T


def terms_of(x, y):
    """The invariance, variance and covariance terms, by loops over the coordinates."""
    variance = covariance = 0.0
    for z in (x, y):
        centred = z - z.mean(0)
        for d in range(D):
            sd = (z[:, d].var(correction=1) + 1e-4).sqrt()
            variance = variance + (1 - sd).clamp_min(0) / D / 2
            for e in range(D):
                if d != e:
                    covariance = covariance + ((centred[:, d] * centred[:, e]).sum() / (len(z) - 1)) ** 2 / D
    return ((x - y) ** 2).mean(), variance, covariance


def by_hand(w, views):
    invariance, variance, covariance = terms_of(*(embedding(w, view) for view in views))
    return 25 * invariance + 25 * variance + covariance


def test_loss_and_gradient():
    method, views = vicreg(), fifty.views_of(0)
    w = fifty.weights_of(method)
    outputs = method(batch_of(views), now())
    outputs.loss.backward()
    expected = by_hand(w, views)
    assert torch.allclose(outputs.loss, expected, atol=1e-12)
    gradients = fifty.gradients_of(expected, w)
    for name, p in method.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=1e-11), name
    terms = terms_of(*(embedding(w, view) for view in views))
    assert terms[1] > 0, "the variance term must not be 0: some coordinate must vary by less than 1"
    for name, value in zip(("invariance", "variance", "covariance"), terms, strict=True):
        assert torch.allclose(outputs.metrics[name], value, atol=1e-12), name


def test_lightly_s_loss_is_the_same():
    lightly = pytest.importorskip("lightly.loss").VICRegLoss()
    method, views = vicreg(), fifty.views_of(0)
    theirs = lightly(*(method.encoder(view, unit=False) for view in views))
    assert torch.allclose(method(batch_of(views), now()).loss, theirs, atol=1e-11)


def test_fifty_steps():
    method = vicreg()
    w, velocity, losses = fifty.weights_of(method), {}, []
    optimizer = optimizers.lars(method.parameter_groups(), batch=B, reference_batch=None, lr=0.02, weight_decay=1e-2)
    ours = fifty.train(method, optimizer, **fifty.FROM_ZERO, final_fraction=0.001)
    for t in range(fifty.STEPS):
        loss = by_hand(w, fifty.views_of(t))
        fifty.lars(w, fifty.gradients_of(loss, w), velocity, fifty.from_zero(t, 0.02, 0.00002), 1e-2)
        losses.append(loss)
    fifty.assert_same_training(ours, method, losses, w)


def test_small_views_are_near_the_large_ones_and_vary_as_these_do():
    method = vicreg()
    views = [*fifty.views_of(0), torch.nn.functional.interpolate(fifty.views_of(1)[0], size=(2, 1))]
    method.encoder.backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((2, 2)), method.encoder.backbone)
    z = [method.encoder(view, unit=False) for view in views]
    near = [terms_of(z[a], z[b])[0] for a, b in ((0, 1), (0, 2), (1, 2))]
    # compared with itself, a view gives its own variance term and twice its covariance term
    alone = [terms_of(x, x) for x in z]
    metrics = method(batch_of(views), now()).metrics
    assert torch.allclose(metrics["invariance"], sum(near) / 3, atol=1e-12)
    assert torch.allclose(metrics["variance"], sum(variance for _, variance, _ in alone) / 3, atol=1e-12)
    assert torch.allclose(metrics["covariance"], sum(covariance for *_, covariance in alone) / 3, atol=1e-12)


def test_its_batch_stays_whole():
    assert vicreg().needs.whole_batch
    assert vicreg().costs([16, 16]).matrices == 2


def test_impossible_weights_are_refused():
    with pytest.raises(ValueError, match="_weight: expected float from 0, got -1"):
        vicreg(covariance_weight=-1.0)
