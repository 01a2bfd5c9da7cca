"""Barlow Twins computes what its authors' code computes: the correlations, the loss, two rates, fifty steps."""

import fifty
import pytest
import torch
from fifty import B, D, backbone, normed
from tiny import batch_of, now

from caco.engine import optimizers
from caco.methods.barlow import BarlowTwins, off_diagonal


def barlow(**settings):
    return BarlowTwins(encoder=fifty.encoder(layers=2), **settings).double()


def embedding(w, view):
    x = normed(
        backbone(w, view) @ w["encoder.projector.0.weight"].T,
        w["encoder.projector.1.weight"],
        w["encoder.projector.1.bias"],
    )
    return x.clamp_min(0) @ w["encoder.projector.3.weight"].T


def loss_of(x, y, weight=0.0051):
    """The loss by a loop over the entries of the cross-correlation matrix c."""
    x, y = normed(x), normed(y)
    loss = 0.0
    for d in range(x.shape[1]):
        for e in range(x.shape[1]):
            c = (x[:, d] * y[:, e]).sum() / len(x)
            loss = loss + ((c - 1) ** 2 if d == e else weight * c**2)
    return loss


def test_loss_and_gradient():
    method, views = barlow(), fifty.views_of(0)
    w = fifty.weights_of(method)
    outputs = method(batch_of(views), now())
    outputs.loss.backward()
    expected = loss_of(*(embedding(w, view) for view in views))
    assert torch.allclose(outputs.loss, expected, atol=1e-12)
    gradients = fifty.gradients_of(expected, w)
    for name, p in method.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=1e-12), name
    parts = outputs.metrics["invariance"] + 0.0051 * outputs.metrics["redundancy"]
    assert torch.allclose(parts, expected, atol=1e-12)


def test_lightly_s_loss_is_the_same():
    lightly = pytest.importorskip("lightly.loss").BarlowTwinsLoss(lambda_param=0.0051)  # its default is 0.005
    method, views = barlow(), fifty.views_of(0)
    theirs = lightly(*(method.encoder(view, unit=False) for view in views))
    assert torch.allclose(method(batch_of(views), now()).loss, theirs, atol=1e-12)


def test_the_rest_of_a_matrix_is_all_but_its_diagonal():
    x = torch.arange(16.0).view(4, 4)
    assert sorted(off_diagonal(x).flatten().tolist()) == [float(i) for i in range(16) if i % 5]


def test_fifty_steps():
    """Weights have one rate; parameters of one dimension have another rate and no weight decay. Both rates warm up from
    0 and end at 1/1000.
    """
    method = barlow()
    w, velocity, losses = fifty.weights_of(method), {}, []
    optimizer = optimizers.lars(method.parameter_groups(), batch=B, reference_batch=None, lr=0.5, weight_decay=1e-2)
    ours = fifty.train(method, optimizer, **fifty.FROM_ZERO, final_fraction=0.001)
    for t in range(fifty.STEPS):
        loss = loss_of(*(embedding(w, view) for view in fifty.views_of(t)))
        rates = [fifty.from_zero(t, peak, 0.001 * peak) for peak in (0.5, 0.5 * 0.0048 / 0.2)]
        fifty.lars(w, fifty.gradients_of(loss, w), velocity, rates[0], 1e-2, one_dimensional_lr=rates[1])
        losses.append(loss)
    fifty.assert_same_training(ours, method, losses, w)


def test_small_views_are_compared_with_the_large_ones_and_all_pairs_averaged():
    method = barlow()
    views = [*fifty.views_of(0), torch.nn.functional.interpolate(fifty.views_of(1)[0], size=(2, 1))]
    method.encoder.backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((2, 2)), method.encoder.backbone)
    z = [method.encoder(view, unit=False) for view in views]
    expected = (loss_of(z[0], z[1]) + loss_of(z[0], z[2]) + loss_of(z[1], z[2])) / 3
    assert torch.allclose(method(batch_of(views), now()).loss, expected, atol=1e-12)
    assert method.costs([16, 16, 8]).matrices == 3
    assert method.costs([16, 16, 8, 8]).matrices == 5, "two small views are not compared with each other"


def test_a_scale_is_a_factor_on_the_loss():
    views = batch_of(fifty.views_of(0))
    assert torch.allclose(
        barlow(loss_scale=0.0625)(views, now()).loss, 0.0625 * barlow()(views, now()).loss, atol=1e-14
    )


def test_its_batch_stays_whole():
    assert barlow().needs.whole_batch
    assert barlow().costs([16, 16]).summed_bytes == 4 * D * D


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match=r"loss_scale: expected float above 0, got 0\.0"):
        barlow(loss_scale=0.0)
