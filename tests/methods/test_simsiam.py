"""SimSiam computes what its authors' code computes: the loss, the heads, a constant rate for the predictor, fifty steps
of SGD.
"""

import math

import fifty
import pytest
import torch
from fifty import B, backbone, cosine, normed
from tiny import batch_of, now

from caco.engine import optimizers
from caco.methods.simsiam import SimSiam

PROJECTOR = {"layers": 3, "last_batch_norm": True, "last_affine": False}


def simsiam(**settings):
    return SimSiam(encoder=fifty.encoder(**PROJECTOR), predictor_hidden_dim=12, **settings).double()


def by_hand(w, views):
    z, p = [], []
    for view in views:
        x = backbone(w, view)
        for layer in (0, 3):
            x = x @ w[f"encoder.projector.{layer}.weight"].T
            x = normed(
                x, w[f"encoder.projector.{layer + 1}.weight"], w[f"encoder.projector.{layer + 1}.bias"]
            ).clamp_min(0)
        z.append(normed(x @ w["encoder.projector.6.weight"].T))
        x = normed(z[-1] @ w["predictor.0.weight"].T, w["predictor.1.weight"], w["predictor.1.bias"]).clamp_min(0)
        p.append(x @ w["predictor.3.weight"].T + w["predictor.3.bias"])
    return -(cosine(p[0], z[1].detach()) + cosine(p[1], z[0].detach())).mean() / 2


def test_loss_and_gradient():
    method, views = simsiam(), fifty.views_of(0)
    w = fifty.weights_of(method)
    outputs = method(batch_of(views), now())
    outputs.loss.backward()
    expected = by_hand(w, views)
    assert torch.allclose(outputs.loss, expected, atol=1e-12)
    gradients = fifty.gradients_of(expected, w)
    for name, p in method.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=1e-12), name


def test_a_bias_before_the_last_batchnorm_would_change_nothing():
    """The published projector has such a bias, drawn at random and not learned; BatchNorm cancels it."""
    method, views = simsiam(), fifty.views_of(0)
    loss = method(batch_of(views), now()).loss
    method.encoder.projector[6].bias = torch.nn.Parameter(
        torch.randn(fifty.D, dtype=torch.float64), requires_grad=False
    )
    assert torch.allclose(method(batch_of(views), now()).loss, loss, atol=1e-12)


def test_lightly_s_similarities_make_the_same_loss():
    similarity = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    method, views = simsiam(), fifty.views_of(0)
    z = [method.encoder(view, unit=False) for view in views]
    p = [method.predictor(x) for x in z]
    theirs = 0.5 * (similarity(p[0], z[1].detach()) + similarity(p[1], z[0].detach()))
    assert torch.allclose(method(batch_of(views), now()).loss, theirs, atol=1e-12)


@pytest.mark.parametrize("constant", [True, False])
def test_fifty_steps(constant):
    """The encoder's rate follows a cosine over epochs, the predictor's is constant; biases and BatchNorm also decay."""
    method = simsiam(constant_predictor_rate=constant)
    w, velocity, losses = fifty.weights_of(method), {}, []
    optimizer = optimizers.sgd(method.parameter_groups(), batch=B, reference_batch=None, lr=0.05, weight_decay=1e-2)
    ours = fifty.train(method, optimizer, warmup_epochs=0, final_fraction=0.0, unit="epoch")
    for t in range(fifty.STEPS):
        loss = by_hand(w, fifty.views_of(t))
        lr = 0.05 * (1 + math.cos(math.pi * (t // 5) / 10)) / 2
        rates = {"encoder.": lr, "predictor.": 0.05 if constant else lr}
        fifty.sgd(w, fifty.gradients_of(loss, w), velocity, rates, 1e-2)
        losses.append(loss)
    fifty.assert_same_training(ours, method, losses, w)


def test_a_part_of_a_batch_is_a_batch_and_small_views_predict_the_large_ones():
    method = simsiam()
    assert not method.needs.whole_batch
    terms = method.terms([16, 16, 8, 8])
    assert [term.weight for term in terms] == [0.5, 0.5] + [0.25] * 4
    assert {term.key for term in terms} == {0, 1}
    assert method.costs([16, 16, 8, 8]).followed == []


def test_a_collapse_is_said_in_words():
    assert simsiam().warning({"embedding_spread": 0.9}) is None
    assert "collapsed: embedding_spread 0.010" in simsiam().warning({"embedding_spread": 0.01})
