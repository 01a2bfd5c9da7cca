"""Treatments of negatives (reweighting, a margin, mixing): with every source of negatives they give what the equations
say, and the published methods agree with plain loops for fifty steps.
"""

import dataclasses
import functools
import math
from typing import Any

import fifty
import pytest
import torch
from fifty import STEPS, B
from test_contrastive import TAU, K, build
from test_contrastive import B as BATCH
from test_contrastive import D as WIDTH
from tiny import batch_of, now
from torch import nn
from torch.nn import functional as F

from caco import equations as eq
from caco.banks.fifo import FifoBank
from caco.banks.hardest import fetch, hardest
from caco.banks.learnable import LearnableBank
from caco.banks.rows import Rows
from caco.engine import optimizers
from caco.methods import sources
from caco.methods.contrastive import Contrastive
from caco.methods.nnclr import NNCLR
from caco.methods.treatments import Margin, Mixed, Reweighted, Step
from caco.nn.heads import Encoder, Projector

near = functools.partial(torch.allclose, rtol=0, atol=1e-11)
HARD: dict[str, Any] = {"positive_share": 0.1, "concentration": 1.0}
DEBIASED: dict[str, Any] = {"positive_share": 0.1, "concentration": 0.0}
MARGIN: dict[str, Any] = {"epsilon": 0.1, "alpha": 1.0}
OBJECTIVES = {
    "debiased": (lambda: Reweighted(**DEBIASED), functools.partial(eq.reweighted_loss, **DEBIASED)),
    "hard": (lambda: Reweighted(**HARD), functools.partial(eq.reweighted_loss, **HARD)),
    "margin": (lambda: Margin(**MARGIN), functools.partial(eq.margin_loss, **MARGIN)),
}
MIXED = {"hardest": 4, "pairs": 3, "with_query": 2, "warmup_epochs": 0, "seed": 5}
SETTINGS = {  # name -> positives, negatives, bank
    "none": (sources.OtherView, sources.BatchKeys, None),
    "positive": (sources.NearestKey, sources.BatchKeys, FifoBank),
    "negative": (sources.OtherView, sources.BankRows, LearnableBank),
    "both": (sources.BankRow, sources.BankRows, LearnableBank),
    "mocov2": (sources.OtherView, sources.BankRows, FifoBank),
    "adco": (sources.OtherView, sources.BankRowsAndBatchKeys, LearnableBank),
}


def built(setting, treatment, **settings):
    positives, negatives, bank = SETTINGS[setting]
    bank = bank and bank(size=K, dim=WIDTH, seed=0)
    return build(positives(), negatives(), bank, treatment=treatment, **settings)


def step_of(number=0, first=0, count=BATCH, epoch=0):
    return Step(torch.arange(first, first + count), dataclasses.replace(now(step=number), epoch=epoch))


def dense(setting, loss, q, k, m, made=None):
    """The loss of one direction, with a column for each row of the bank, the other view, the batch's other keys and the
    synthetic negatives.
    """
    columns = [] if made is None else [made]
    if setting == "both":
        return loss(q, m, eq.most_probable_positive(k, m), TAU, torch.cat(columns, 1) if columns else None)
    own = torch.eye(len(q), dtype=torch.bool)
    if setting in ("none", "positive", "adco"):
        columns = [(q @ k.T).masked_fill(own, -torch.inf), *columns]
    positive = m[eq.most_probable_positive(k, m)] if setting == "positive" else k
    columns = torch.cat([(q * positive).sum(1, keepdim=True), *columns], 1)
    rows = m if setting in ("negative", "mocov2", "adco") else q.new_empty(0, q.shape[1])
    return loss(q, rows, torch.full((len(q),), len(rows)), TAU, columns)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_encoder_s_gradient_and_the_bank_s_motion_over_every_source(setting, name):
    make, loss = OBJECTIVES[name]
    method, views = built(setting, make())
    outputs = method.loss(views)
    outputs.loss.backward()
    gradient = method.encoder.matrix.weight.grad.clone()
    method.zero_grad()
    w = None if method.bank is None else method.bank.rows.weight.detach().clone().requires_grad_()
    rows = None if w is None else F.normalize(w, dim=1)
    q, k = [method.encoder(view) for view in views], [method.twin(view) for view in views]
    expected = sum(dense(setting, loss, q[a], k[b], rows).mean() for a, b in ((0, 1), (1, 0)))
    expected.backward(retain_graph=True)
    assert near(outputs.loss, expected)
    assert near(gradient, method.encoder.matrix.weight.grad)
    if setting in ("negative", "adco"):  # no row is a positive, so the rows' whole gradient is the push
        method.bank.pull, method.bank.push = 0.0, 1.0
        assert near(method.bank.gradient(), -w.grad)
    if setting == "both":  # the part of the positive is computed for each query alone
        total = torch.zeros_like(w)
        for a, b in ((0, 1), (1, 0)):
            loss_B = dense(setting, loss, q[a], k[b], rows)
            for i, row in enumerate(eq.most_probable_positive(k[b], rows)):
                (of_query,) = torch.autograd.grad(loss_B[i] / BATCH, w, retain_graph=True)
                scale = torch.full((K, 1), -1.0, dtype=torch.float64)
                scale[row] = 1.0
                total += scale * of_query
        assert near(method.bank.gradient(), total)
        method.after_step(now(bank_lr=1.0))
        assert near(method.bank.rows.weight.detach(), w.detach() - total)


def mixed_by_hand(treatment, q, m, left_out, step, term):
    """The synthetic rows of each query, [B, E, D], computed one at a time from the publication's definition."""
    made = []
    at, share = treatment.draws(step, (term + 1) * len(q), min(treatment.candidates, len(m) - (left_out is not None)))
    at, share = at[-len(q) :], share[-len(q) :]
    for i in range(len(q)):
        cosines = m @ q[i]
        if left_out is not None:
            cosines[left_out[i]] = -torch.inf
        near_rows = m[cosines.argsort(descending=True)[: treatment.candidates]]
        s = treatment.pairs
        pairs = [share[i, n] * near_rows[at[i, n]] + (1 - share[i, n]) * near_rows[at[i, s + n]] for n in range(s)]
        own = [
            share[i, s + n] * q[i] + (1 - share[i, s + n]) * near_rows[at[i, 2 * s + n]]
            for n in range(treatment.with_query)
        ]
        made.append(torch.stack([x / x.norm() for x in pairs + own]).detach())
    return torch.stack(made)


@pytest.mark.parametrize("setting", ["both", "negative", "mocov2", "adco"])
@pytest.mark.parametrize("candidates", [4, 1024])
def test_mixed_negatives_over_every_bank(monkeypatch, setting, candidates):
    """The mixed negatives are constants: encoder and rows get the gradients of the loss with them in its
    denominator.
    """
    monkeypatch.setattr("caco.methods.treatments.PART_ELEMENTS", 60)  # two queries at a time
    treatment = Mixed(**MIXED | {"hardest": candidates})
    method, views = built(setting, treatment)
    outputs = method(batch_of(views), now(step=3))
    outputs.loss.backward()
    gradient = method.encoder.matrix.weight.grad.clone()
    method.zero_grad()
    w = method.bank.rows.weight.detach()
    m = F.normalize(w, dim=1)
    expected, rows_gradient = 0.0, torch.zeros_like(w)
    for term, (a, b) in enumerate(((1, 0), (0, 1))):
        q, k = method.encoder(views[a]), method.twin(views[b])
        chosen = eq.most_probable_positive(k, m) if setting == "both" else None
        made = torch.einsum("bed,bd->be", mixed_by_hand(treatment, q.detach(), m, chosen, step_of(3), term), q)
        expected = expected + dense(setting, eq.contrastive_loss, q, k, m, made).mean()
        extra = [] if setting == "both" else [(q * k).sum(1, keepdim=True)]
        extra += [(q @ k.T).masked_fill(torch.eye(BATCH, dtype=torch.bool), -torch.inf)] if setting == "adco" else []
        positive = torch.full((BATCH,), K) if chosen is None else chosen
        rows_gradient += eq.bank_gradient(q.detach(), w, positive, TAU, extra_BE=torch.cat([*extra, made], 1).detach())
    expected.backward()
    assert near(outputs.loss, expected)
    assert near(gradient, method.encoder.matrix.weight.grad)
    if setting != "mocov2":
        assert near(method.bank.gradient(), rows_gradient)


def test_mixing_begins_after_its_warm_up_and_not_in_the_warm_start():
    method, views = built("mocov2", Mixed(**MIXED | {"warmup_epochs": 2}), warm_start_steps=1)
    plain, _ = built("mocov2", None)
    for epoch, same in ((0, True), (1, True), (2, False)):
        losses = [made.loss(views, step_of(epoch=epoch)).loss for made in (method, plain)]
        assert torch.equal(*losses) == same
    assert torch.equal(method(batch_of(views), now("warm start")).loss, plain.warm_start_loss(views).loss)


def test_draws_are_of_seed_step_direction_and_image_alone():
    treatment = Mixed(hardest=50, pairs=400, with_query=300, seed=0)
    at, share = treatment.draws(step_of(7), 2 * BATCH, 50)
    assert at.shape == (2 * BATCH, 1100) and share.shape == (2 * BATCH, 700)
    for part in range(2):  # the draws belong to the images, also in a part of the batch or on another rank
        of_part = treatment.draws(step_of(7, first=3 * part, count=3), 6, 50)
        for whole, some in zip((at, share), of_part, strict=True):
            assert torch.equal(whole.unflatten(0, (2, BATCH))[:, 3 * part : 3 * part + 3], some.unflatten(0, (2, 3)))
    for other in (
        treatment.draws(step_of(8), 2 * BATCH, 50),
        Mixed(hardest=50, pairs=400, with_query=300, seed=1).draws(step_of(7), 2 * BATCH, 50),
    ):
        assert (other[0] == at).float().mean() < 0.05 and (other[1] == share).float().mean() < 0.05
    assert (at[:BATCH] == at[BATCH:]).float().mean() < 0.05, "the two directions draw differently"
    assert set(at.unique().tolist()) == set(range(50))
    # The mean of n uniform draws has the standard deviation sqrt(1 / 12 n) times the range; allow 4 of these.
    for values, middle in ((at / 49, 0.5), (share[:, :400], 0.5), (share[:, 400:] * 2, 0.5)):
        assert values.min() >= 0 and values.max() <= 1
        assert abs(values.double().mean() - middle) < 4 / math.sqrt(12 * values.numel()) + 0.01
    assert share[:, 400:].max() < 0.5 and share[:, :400].max() > 0.99


@pytest.mark.parametrize("count", [1, 7, 29, 30, 100])
@pytest.mark.parametrize("left_out", [False, True])
def test_the_hardest_rows_are_those_of_the_whole_matrix(monkeypatch, count, left_out):
    monkeypatch.setattr("caco.banks.scoring.BLOCK_ELEMENTS", 20)
    rows = Rows(size=30, dim=6, seed=0, learnable=True).double()
    with torch.no_grad():
        rows.weight.mul_(torch.linspace(0.5, 3, 30)[:, None])
    q = F.normalize(torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=1)
    cosines = q @ F.normalize(rows.weight, dim=1).T
    out = torch.arange(9) * 3 if left_out else None
    if left_out:
        cosines = cosines.scatter(1, out[:, None], -torch.inf)
    found = hardest(q, rows, count, out)
    assert torch.equal(found, cosines.argsort(dim=1, descending=True)[:, : min(count, 30 - left_out)])
    m_UD, at = fetch(rows, found)
    assert len(m_UD) == min(found.numel(), 30), "neither more rows than the bank has nor more than are asked for"
    assert near(m_UD[at], F.normalize(rows.weight, dim=1)[found])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nnclr_s_predictions_are_reweighted_like_any_negatives(name):
    make, loss = OBJECTIVES[name]
    torch.manual_seed(0)
    encoder = Encoder(backbone=nn.Flatten(), projector=Projector(in_dim=12, dim=WIDTH, layers=1)).double()
    method = NNCLR(
        encoder=encoder,
        bank=FifoBank(size=K, dim=WIDTH, seed=0),
        predictor_hidden_dim=7,
        temperature=TAU,
        treatment=make(),
    ).double()
    views = [torch.randn(BATCH, 3, 2, 2, dtype=torch.float64) for _ in range(2)]
    queue = F.normalize(method.bank.rows.weight.detach(), dim=1)
    z = [F.normalize(encoder(view, unit=False), dim=1) for view in views]
    p = [F.normalize(method.predictor(encoder(view, unit=False)), dim=1) for view in views]
    own, nothing = torch.arange(BATCH), torch.empty(0, WIDTH, dtype=torch.float64)
    expected = (
        sum(
            loss(
                queue[(z[a] @ queue.T).argmax(1)], nothing, own, TAU, queue[(z[a] @ queue.T).argmax(1)] @ p[1 - a].T
            ).mean()
            for a in (0, 1)
        )
        / 2
    )
    assert near(method.loss(views).loss, expected)


@pytest.mark.parametrize("setting", ["none", "positive"])
def test_mixing_is_refused_where_no_row_of_a_bank_is_a_negative(setting):
    with pytest.raises(
        ValueError,
        match=(
            "Mixed makes further negatives from the bank's rows, but with BatchKeys the rows are no negatives; expected"
            " method=mocov2"
        ),
    ):
        built(setting, Mixed())


def test_a_bank_that_knows_no_other_loss_is_refused_with_one_and_serves_without():
    class Old(FifoBank):
        def score(self, q_BD, positive_B, *, temperature, extra_BE=None, learn=True):
            return super().score(q_BD, positive_B, temperature=temperature, extra_BE=extra_BE)

    def make(treatment):
        return build(sources.OtherView(), sources.BankRows(), Old(size=K, dim=WIDTH, seed=0), treatment=treatment)

    with pytest.raises(ValueError, match="Margin has a loss other than InfoNCE, but Old.score takes no `objective`"):
        make(Margin())
    for treatment in (None, Mixed(**MIXED)):
        method, views = make(treatment)
        assert method(batch_of(views), now()).loss.isfinite()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hardest": 0}, "hardest: expected int from 1, got 0"),
        (
            {"pairs": 0, "with_query": 0},
            r"one of negatives\.pairs and negatives\.with_query must be above 0; got 0 for both",
        ),
        ({"warmup_epochs": -1}, "warmup_epochs: expected int from 0, got -1"),
    ],
)
def test_impossible_mixtures_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Mixed(**settings)


# Fifty steps of the published methods, compared with loops that do not use caco's sources, banks and treatments.


def unit_output(w, view):
    x = fifty.backbone(w, view) @ w["encoder.projector.0.weight"].T + w["encoder.projector.0.bias"]
    x = x.clamp_min(0) @ w["encoder.projector.2.weight"].T + w["encoder.projector.2.bias"]
    return x / x.norm(dim=1, keepdim=True)


ROWS = 24


def queue_method(treatment):
    return Contrastive(
        encoder=fifty.encoder(layers=2, batch_norm=False, bias=True), bank=FifoBank(size=ROWS, dim=fifty.D, seed=0),
        positives=sources.OtherView(),
        negatives=sources.BankRows(), treatment=treatment, temperature=0.2, momentum=0.9, final_momentum=0.9,
        symmetric=False, reduction="mean",
    ).double()  # fmt: skip


def ifm_by_hand(q, k, queue, t):
    """IFM: the mean of the plain cross entropy and that of l+ - eps and l- + eps, with eps applied before the
    temperature.
    """
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1)
    moved = logits + 0.1
    moved[:, 0] = logits[:, 0] - 0.1
    target = torch.zeros(B, dtype=torch.int64)
    return (F.cross_entropy(logits / 0.2, target) + F.cross_entropy(moved / 0.2, target)) / 2


def mochi_by_hand(q, k, queue, t):
    """MoCHi: all rows of the queue are negatives; from the third epoch on, six and three further ones are mixed from
    the ten hardest of each query.
    """
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1)
    if t >= 10:
        step = Step(torch.arange(B), now(step=t))
        made = mixed_by_hand(Mixed(hardest=10, pairs=6, with_query=3, seed=1), q.detach(), queue, None, step, 0)
        logits = torch.cat([logits, (made * q[:, None]).sum(2)], 1)
    return F.cross_entropy(logits / 0.2, torch.zeros(B, dtype=torch.int64))


@pytest.mark.parametrize(
    ("treatment", "by_hand"),
    [(Margin(), ifm_by_hand), (Mixed(hardest=10, pairs=6, with_query=3, warmup_epochs=2, seed=1), mochi_by_hand)],
    ids=["ifm", "mochi"],
)
def test_fifty_steps_of_a_queue_s_method(treatment, by_hand):
    method = queue_method(treatment)
    w, twin, velocity, losses = fifty.weights_of(method), fifty.twin_of(method.twin), {}, []
    queue, place = F.normalize(method.bank.rows.weight.detach(), dim=1), 0
    optimizer = optimizers.sgd(method.parameter_groups(), batch=B, reference_batch=None, lr=0.05, weight_decay=1e-3)
    ours = fifty.train(method, optimizer, warmup_epochs=0, final_fraction=0.0)
    for t in range(STEPS):
        fifty.follow(twin, w, 0.9)
        views = fifty.views_of(t)
        q, k = unit_output(w, views[0]), unit_output(twin, views[1]).detach()
        loss = by_hand(q, k, queue, t)
        lr = 0.05 * (1 + math.cos(math.pi * t / STEPS)) / 2
        fifty.sgd(w, fifty.gradients_of(loss, w), velocity, {"": lr}, 1e-3)
        queue[place : place + B] = k
        place = (place + B) % ROWS
        losses.append(loss)
    fifty.assert_same_training(ours, method, losses, w, twin)
    assert near(method.bank.rows.weight.detach(), queue, atol=1e-8)


def hcl_by_hand(u, beta):
    """HCL's loss over all 2B embeddings, with tau 0.5 and tau+ 0.1."""
    similarity = torch.exp(u @ u.T / 0.5)
    partner = torch.arange(2 * B).roll(B)
    others = ~(torch.eye(2 * B, dtype=torch.bool) | F.one_hot(partner, 2 * B).bool())
    pos, neg, n = similarity[torch.arange(2 * B), partner], similarity[others].view(2 * B, 2 * B - 2), 2 * B - 2
    weights = neg**beta / (neg**beta).mean(1, keepdim=True)
    ng = ((weights * neg).sum(1) - 0.1 * n * pos) / (1 - 0.1)
    ng = torch.clamp(ng, min=n * math.exp(-1 / 0.5))
    return -torch.log(pos / (pos + ng)).mean()


@pytest.mark.parametrize("beta", [1.0, 0.0], ids=["hcl", "debiased"])
def test_fifty_steps_of_simclr_s_methods(beta):
    """Adam at a constant rate, with weight decay as part of the gradient."""
    encoder = fifty.encoder(layers=2, batch_norm=False, bias=True)
    method = Contrastive(
        encoder=encoder, positives=sources.OtherView(), negatives=sources.BatchBothViews(), temperature=0.5,
        momentum=None, reduction="mean",
        treatment=Reweighted(positive_share=0.1, concentration=beta),
    ).double()  # fmt: skip
    w, first, second, losses = fifty.weights_of(method), {}, {}, []
    optimizer = optimizers.adam(method.parameter_groups(), batch=B, reference_batch=None, lr=1e-3, weight_decay=1e-2)
    ours = fifty.train(method, optimizer, warmup_epochs=0, final_fraction=1.0)
    for t in range(STEPS):
        loss = hcl_by_hand(torch.cat([unit_output(w, view) for view in fifty.views_of(t)]), beta)
        for name, g in fifty.gradients_of(loss, w).items():
            with torch.no_grad():
                g = g + 1e-2 * w[name]
                first[name] = 0.9 * first.get(name, 0.0) + 0.1 * g
                second[name] = 0.999 * second.get(name, 0.0) + 0.001 * g**2
                rate = 1e-3 / (1 - 0.9 ** (t + 1))
                w[name] -= rate * first[name] / ((second[name] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        losses.append(loss)
    fifty.assert_same_training(ours, method, losses, w)
