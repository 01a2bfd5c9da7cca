"""Each row of the paper's Table VII (each setting of pn) computes the loss that the paper defines for it."""

import pytest
import torch
from tiny import now
from torch import nn
from torch.nn import functional as F

from caco import equations as eq
from caco.banks.fifo import FifoBank
from caco.banks.learnable import LearnableBank
from caco.methods import sources
from caco.methods.contrastive import Contrastive
from caco.methods.terms import Term, pair_terms

B, D, K, TAU = 6, 5, 11, 0.2


class Flat(nn.Module):
    """An encoder that is easy to compute by hand: a matrix applied to the pixels, normalised to length 1."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Flatten()
        self.matrix = nn.Linear(12, D, bias=False)

    def forward(self, images):
        return F.normalize(self.matrix(self.backbone(images)), dim=1)


def build(positives, negatives, bank, **settings):
    torch.manual_seed(0)
    encoder = Flat().double()
    method = Contrastive(
        encoder=encoder, bank=bank, positives=positives, negatives=negatives, temperature=TAU, **settings
    ).double()
    if method.twin is not None:  # make the twin differ from the encoder, so that tests can tell them apart
        with torch.no_grad():
            method.twin.encoder.matrix.weight.add_(0.1 * torch.randn(D, 12, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(B, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    return method, views


def dense_logits(positive_B, others_BE):
    return torch.cat([positive_B[:, None], others_BE], 1) / TAU


def others_of(q, k):
    """Cosines of each query with the keys of the other images, by a loop."""
    return torch.stack([torch.cat([q[i] @ torch.cat([k[:i], k[i + 1 :]]).T]) for i in range(len(q))])


def expected(setting, q, k, m):
    """The expected loss of one direction for each row of Table VII, written out from the paper."""
    if setting == "both":
        return eq.contrastive_loss(q, m, eq.most_probable_positive(k, m), TAU).mean()
    if setting == "negative":
        return eq.info_nce(q, k, m, TAU)
    positive = k if setting == "none" else m[eq.most_probable_positive(k, m)]
    logits = dense_logits((q * positive).sum(1), others_of(q, k))
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


SETTINGS = {
    "none": (sources.OtherView, sources.BatchKeys, None),
    "positive": (sources.NearestKey, sources.BatchKeys, FifoBank),
    "negative": (sources.OtherView, sources.BankRows, LearnableBank),
    "both": (sources.BankRow, sources.BankRows, LearnableBank),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_and_encoder_gradient_of_each_row_of_table_7(setting):
    positives, negatives, bank = SETTINGS[setting]
    method, views = build(positives(), negatives(), bank and bank(size=K, dim=D, seed=0))
    loss = method.loss(views).loss
    loss.backward()
    gradient = method.encoder.matrix.weight.grad.clone()

    method.zero_grad()
    m = None if bank is None else F.normalize(method.bank.rows.weight.detach(), dim=1)
    dense = sum(expected(setting, method.encoder(views[a]), method.twin(views[b]), m) for a, b in ((0, 1), (1, 0)))
    dense.backward()
    assert torch.allclose(loss, dense, atol=1e-12)
    assert torch.allclose(gradient, method.encoder.matrix.weight.grad, atol=1e-12)


def test_caco_s_bank_takes_the_sum_of_both_directions():
    method, views = build(sources.BankRow(), sources.BankRows(), LearnableBank(size=K, dim=D, seed=0, lr=1.0))
    w = method.bank.rows.weight.detach().clone()
    method.loss(views).loss.backward()
    gradient = sum(
        eq.bank_gradient(
            method.encoder(views[a]),
            w,
            eq.most_probable_positive(method.twin(views[b]), F.normalize(w, dim=1)),
            TAU,
        )
        for a, b in ((0, 1), (1, 0))
    )
    assert torch.allclose(method.bank.gradient(), gradient, atol=1e-12)
    method.after_step(now(bank_lr=1.0))
    assert torch.allclose(method.bank.rows.weight, w - gradient, atol=1e-12)


def test_the_negative_setting_pushes_rows_and_pulls_none():
    bank = LearnableBank(size=K, dim=D, seed=0, pull=0.0, push=1.0)
    method, views = build(sources.OtherView(), sources.BankRows(), bank, symmetric=False)
    w = bank.rows.weight.detach().clone()
    method.loss(views).loss.backward()
    q, k = method.encoder(views[0]).detach(), method.twin(views[1])
    extra = (q * k).sum(1, keepdim=True)
    dense = eq.bank_gradient(q, w, torch.full((B,), K), TAU, pull=0, push=1, extra_BE=extra)
    assert torch.allclose(bank.gradient(), dense, atol=1e-12)


def test_the_queue_of_the_positive_setting_takes_the_keys_of_both_views_after_the_step():
    method, views = build(sources.NearestKey(), sources.BatchKeys(), FifoBank(size=2 * B, dim=D, seed=0))
    before = method.bank.rows.weight.clone()
    method.loss(views).loss.backward()
    assert torch.equal(method.bank.rows.weight, before)
    method.after_step(now(bank_lr=0.0))
    assert torch.allclose(method.bank.rows.weight, torch.cat([method.twin(views[0]), method.twin(views[1])]))
    assert method.keys == []


def test_adco_s_denominator_has_the_bank_and_the_batch():
    bank = LearnableBank(size=K, dim=D, seed=0, pull=0.0, push=1.0, temperature=0.05)
    method, views = build(sources.OtherView(), sources.BankRowsAndBatchKeys(), bank, reduction="mean")
    w = bank.rows.weight.detach().clone()
    m = F.normalize(w, dim=1)
    loss = method.loss(views).loss
    loss.backward()
    dense, gradient = 0.0, 0.0
    for a, b in ((0, 1), (1, 0)):
        q, k = method.encoder(views[a]).detach(), method.twin(views[b])
        everything = torch.cat([q @ m.T, q @ k.T], 1)
        own = K + torch.arange(B)
        dense += F.cross_entropy(everything / TAU, own) / 2
        gradient += eq.bank_gradient(q, w, own, 0.05, pull=0, push=1, extra_BE=q @ k.T) / 2
    assert torch.allclose(loss, dense, atol=1e-12)
    assert torch.allclose(bank.gradient(), gradient, atol=1e-12)


def test_without_a_twin_keys_carry_gradients_and_both_views_are_negatives():
    """SimCLR with 2B - 2 negatives, computed with the usual matrix over all 2B embeddings."""
    method, views = build(sources.OtherView(), sources.BatchBothViews(), None, momentum=None, reduction="mean")
    loss = method.loss(views).loss
    loss.backward()
    gradient = method.encoder.matrix.weight.grad.clone()
    method.zero_grad()
    z = torch.cat([method.encoder(views[0]), method.encoder(views[1])])
    cosines = (z @ z.T / TAU).masked_fill(torch.eye(2 * B, dtype=torch.bool), -torch.inf)
    dense = F.cross_entropy(cosines, torch.arange(2 * B).roll(B))
    dense.backward()
    assert torch.allclose(loss, dense, atol=1e-12)
    assert torch.allclose(gradient, method.encoder.matrix.weight.grad, atol=1e-12)


def test_which_view_queries_which_key():
    assert pair_terms(2, 0, symmetric=True, reduction="sum") == [Term(1, 0, 1.0), Term(0, 1, 1.0)]
    assert pair_terms(2, 0, symmetric=True, reduction="mean") == [Term(1, 0, 0.5), Term(0, 1, 0.5)]
    assert pair_terms(2, 0, symmetric=False, reduction="sum") == [Term(0, 1, 1.0)]
    # CaCo with multi-crop: 2 terms of large views and 12 of small views
    many = pair_terms(2, 6, symmetric=True, reduction="mean")
    assert [term.weight for term in many] == pytest.approx([1 / 2] * 2 + [1 / 12] * 12)
    assert {term.key for term in many} == {0, 1}
    assert {(t.query, t.key) for t in many[2:]} == {(q, k) for q in range(2, 8) for k in (0, 1)}
    adco = pair_terms(2, 4, symmetric=False, reduction="sum")  # AdCo with multi-crop: one key and five queries, summed
    assert adco == [Term(q, 1, 1.0) for q in (0, 2, 3, 4, 5)]


def test_multi_crop_by_hand():
    """Two large and two small views: the keys of the large views choose the positives, and the loss is the mean of 2
    terms plus the mean of 4.
    """
    method, large = build(sources.BankRow(), sources.BankRows(), LearnableBank(size=K, dim=D, seed=0), reduction="mean")
    method.encoder.backbone = method.twin.encoder.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    large = [F.interpolate(view, size=4) for view in large]
    small = [torch.randn(B, 3, 2, 2, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (5, 6)]
    w = method.bank.rows.weight.detach()
    m = F.normalize(w, dim=1)
    loss = method.loss(large + small).loss
    loss.backward()
    label = [eq.most_probable_positive(method.twin(view), m) for view in large]
    q = [method.encoder(view).detach() for view in large + small]
    terms = [(0, 1, 1 / 2), (1, 0, 1 / 2)] + [(v, k, 1 / 4) for v in (2, 3) for k in (0, 1)]
    dense = sum(weight * eq.contrastive_loss(q[v], m, label[k], TAU).mean() for v, k, weight in terms)
    gradient = sum(weight * eq.bank_gradient(q[v], w, label[k], TAU) for v, k, weight in terms)
    assert torch.allclose(loss, dense, atol=1e-12)
    assert torch.allclose(method.bank.gradient(), gradient, atol=1e-12)


def test_the_warm_start_writes_the_keys_in_order_and_then_copies_the_encoder_to_the_twin():
    method, views = build(sources.BankRow(), sources.BankRows(), LearnableBank(size=10, dim=D, seed=0))
    assert method.warm_start_steps(B) == 2
    rows = method.bank.rows.weight.detach().clone()
    loss = method.warm_start_loss(views).loss
    q, k = method.encoder(views[0]), method.twin(views[1])
    assert torch.allclose(loss, eq.info_nce(q, k, F.normalize(rows, dim=1), 0.2), atol=1e-12)
    loss.backward()
    assert method.bank.anchors == [], "rows are overwritten, not learned, while the bank fills"
    method.after_step(now("warm start", 0))
    assert torch.equal(method.bank.rows.weight, torch.cat([k, rows[B:]]))
    method.warm_start_loss(list(reversed(views)))
    method.after_step(now("warm start", 1))
    assert torch.allclose(method.bank.rows.weight, torch.cat([k, method.twin(views[0])[:4]]))
    method.warm_start_loss(views)
    method.after_step(now("warm start", 2))  # a second pass starts at the first row again
    assert torch.equal(method.bank.rows.weight[:B], k)
    method.after_phase(now("warm start"))
    assert torch.equal(method.twin.encoder.matrix.weight, method.encoder.matrix.weight)
    assert method.keys == []


def test_the_warm_start_may_take_its_key_from_the_last_view():
    """AdCo with multi-crop: the query is a large view; the keys of the smallest crop are its positives and fill the
    bank.
    """
    bank = LearnableBank(size=10, dim=D, seed=0, pull=0.0)
    method, large = build(
        sources.OtherView(), sources.BankRowsAndBatchKeys(), bank, warm_start_key="last", symmetric=False
    )
    generator = torch.Generator().manual_seed(5)
    views = [*large, *(torch.randn(B, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(4))]
    rows = bank.rows.weight.detach().clone()
    loss = method.warm_start_loss(views).loss
    q, k = method.encoder(views[0]), method.twin(views[5])
    assert torch.allclose(loss, eq.info_nce(q, k, F.normalize(rows, dim=1), 0.2), atol=1e-12)
    method.after_step(now("warm start", 0))
    assert torch.equal(bank.rows.weight, torch.cat([k, rows[B:]]))
    two, other = (build(sources.OtherView(), sources.BankRows(), LearnableBank(size=10, dim=D, seed=0),
    warm_start_key=key)[0]
                  for key in ("second", "last"))  # fmt: skip
    assert torch.equal(two.warm_start_loss(large).loss, other.warm_start_loss(large).loss), (
        "with two views, the last view is the second"
    )
    assert not torch.equal(two.warm_start_loss(views).loss, other.warm_start_loss(views).loss)
    with pytest.raises(ValueError, match="warm_start_key: expected second . last, got 'first'"):
        build(sources.OtherView(), sources.BatchKeys(), None, warm_start_key="first")


def test_the_probability_of_figure_4():
    method, views = build(sources.BankRow(), sources.BankRows(), LearnableBank(size=K, dim=D, seed=0), symmetric=False)
    metrics = method.loss(views).metrics
    m = F.normalize(method.bank.rows.weight.detach(), dim=1)
    q = method.encoder(views[0])
    p = eq.probabilities(q, m, TAU)
    assert torch.allclose(metrics["max_probability"], p.amax(1).mean(), atol=1e-12)
    chosen = eq.most_probable_positive(method.twin(views[1]), m)
    assert torch.allclose(metrics["positive_probability"], p[torch.arange(B), chosen].mean(), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (sources.BankRow(), sources.BatchKeys(), None),
            "needs the bank's rows as negatives; got BankRow with BatchKeys",
        ),
        ((sources.OtherView(), sources.BankRows(), None), "needs a bank; got bank=null"),
        ((sources.NearestKey(), sources.BatchKeys(), None), "needs a bank; got bank=null"),
    ],
)
def test_combinations_without_a_meaning_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)


def test_a_queue_takes_the_keys_of_the_warm_start_as_it_takes_all_others():
    method, views = build(
        sources.NearestKey(), sources.BatchKeys(), FifoBank(size=10, dim=D, seed=0), warm_start_steps=2
    )
    rows = method.bank.rows.weight.detach().clone()
    loss = method.warm_start_loss(views).loss
    k = method.twin(views[1])
    assert torch.allclose(loss, eq.info_nce(method.encoder(views[0]), k, F.normalize(rows, dim=1), 0.2), atol=1e-12)
    method.after_step(now("warm start", 0))
    assert torch.equal(method.bank.rows.weight, torch.cat([k, rows[B:]]))
    assert int(method.bank.next_row) == B


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("bank", [None, LearnableBank(size=K, dim=D, seed=0, initialisation="random")])
def test_where_no_rows_are_filled_the_warm_start_s_negatives_are_the_batch_s_other_keys(momentum, bank):
    """The bank is missing, or its rows stay random. Without a twin, the keys come from the encoder and have
    gradients.
    """
    method, views = build(sources.OtherView(), sources.BatchKeys(), bank, momentum=momentum, warm_start_steps=2)
    assert method.needs.whole_batch
    rows = None if bank is None else bank.rows.weight.detach().clone()
    q, k = method.encoder(views[0]), (method.twin if momentum else method.encoder)(views[1])
    dense = F.cross_entropy(
        dense_logits((q * k).sum(1), others_of(q, k)) * (TAU / 0.2), torch.zeros(B, dtype=torch.int64)
    )
    loss = method.warm_start_loss(views).loss
    assert torch.allclose(loss, dense, atol=1e-12)
    (by_hand,) = torch.autograd.grad(dense, method.encoder.matrix.weight)
    (ours,) = torch.autograd.grad(loss, method.encoder.matrix.weight)
    assert torch.allclose(ours, by_hand, atol=1e-12)
    method.after_step(now("warm start", 0))
    assert bank is None or torch.equal(bank.rows.weight, rows)


@pytest.mark.parametrize(
    ("bank", "settings", "steps"),
    [
        (LearnableBank, {}, 2),  # as published: the warm start fills each row once
        (FifoBank, {}, 0),
        (LearnableBank, {"warm_start_passes": 3}, 6),
        (FifoBank, {"warm_start_passes": 3}, 6),
        (LearnableBank, {"warm_start_steps": 5}, 5),
        (LearnableBank, {"warm_start_steps": 0}, 0),
        (None, {"warm_start_steps": 5}, 5),
        (None, {}, 0),
    ],
)
def test_how_long_the_warm_start_is(bank, settings, steps):
    bank = None if bank is None else bank(size=10, dim=D, seed=0)
    method, _ = build(sources.OtherView(), sources.BatchKeys(), bank, **settings)
    assert method.warm_start_steps(B) == steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_start_steps": 5, "warm_start_passes": 1}, "warm_start: expected steps or passes, got both, 5 and 1"),
        ({"warm_start_passes": 1}, "warm_start.passes counts passes over a bank, but this method has no bank; got 1"),
        ({"warm_start_steps": -1}, "warm_start_steps: expected int from 0 or None, got -1"),
    ],
)
def test_warm_starts_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(sources.OtherView(), sources.BatchKeys(), None, **settings)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"momentum": 1.5}])
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        Contrastive(encoder=Flat(), bank=None, positives=sources.OtherView(), negatives=sources.BatchKeys(), **wrong)
