"""Losses that weight negatives differently, computed with a streamed bank, agree with the dense equations in values and
in all gradients (by autograd).
"""

import functools

import pytest
import torch
from test_fused import path, stored, unit  # noqa: F401 - path: with every kernel, and without
from torch.nn import functional as F

from caco import equations as eq
from caco.banks import motion, reweighted, scoring
from caco.banks.kernels import fused
from caco.banks.learnable import LearnableBank
from caco.methods.treatments import Margin, Reweighted

OBJECTIVES = {
    "debiased": (
        Reweighted(positive_share=0.1, concentration=0.0),
        functools.partial(eq.reweighted_loss, positive_share=0.1, concentration=0.0),
    ),
    "hard": (
        Reweighted(positive_share=0.1, concentration=1.0),
        functools.partial(eq.reweighted_loss, positive_share=0.1, concentration=1.0),
    ),
    "hard alone": (
        Reweighted(positive_share=0.0, concentration=0.5),
        functools.partial(eq.reweighted_loss, positive_share=0.0, concentration=0.5),
    ),
    "margin": (Margin(), functools.partial(eq.margin_loss, epsilon=0.1, alpha=1.0)),
    "margin alone": (Margin(epsilon=0.2, alpha=None), functools.partial(eq.margin_loss, epsilon=0.2, alpha=None)),
}
near = functools.partial(torch.allclose, rtol=0, atol=1e-11)
# Where the positive comes from: a row of the bank (CaCo); the first extra column (MoCo); the same with a masked column
# and more extra columns (AdCo); a row, with extra columns besides.
KINDS = ["rows", "extra", "extra and batch", "rows and batch"]


def problem(kind, B=6, K=11, D=5):
    q, w = unit(B, D, seed=1), stored(K, D, seed=2)
    extra = None if kind == "rows" else 0.9 * unit(B, 1 if kind == "extra" else 4, seed=3)
    if extra is not None and extra.shape[1] > 1:
        extra[:, 2] = -torch.inf
    positive = torch.full((B,), K) if kind.startswith("extra") else torch.arange(B) * 3 % K
    return q, w, extra, positive


def expected_rows(dense, q, w, positive, tau, extra, weight, *, pull, push):
    """The gradient that the bank descends, by autograd: `pull` times the gradient at each query's positive row, minus
    `push` times that at its negative rows.
    """

    def loss(w, q, positive, extra):
        return dense(q[None], F.normalize(w, dim=1), positive[None], tau, None if extra is None else extra[None]).sum()

    of_query = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, None if extra is None else 0))(
        w, q, positive, extra
    )
    scale = torch.where(torch.arange(len(w)) == positive[:, None], pull, -push).double() * weight[:, None]
    return torch.einsum("nk,nkd->kd", scale, of_query)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tau", "bank_tau"), [(0.5, None), (0.1, None), (0.5, 0.1)])
def test_loss_and_all_gradients_are_autograd_s_of_the_dense_equation(monkeypatch, name, kind, tau, bank_tau):
    monkeypatch.setattr(scoring, "BLOCK_ELEMENTS", 18)  # so the 11 rows are read in blocks of 3
    objective, dense = OBJECTIVES[name]
    q, w, extra, positive = problem(kind)
    weight = torch.linspace(0.1, 1, len(q), dtype=torch.float64)
    dense_q, dense_extra = q.clone().requires_grad_(), None if extra is None else extra.clone().requires_grad_()
    loss = dense(dense_q, F.normalize(w, dim=1), positive, tau, dense_extra)
    (loss * weight).sum().backward()

    fast_q, fast_extra = q.clone().requires_grad_(), None if extra is None else extra.clone().requires_grad_()
    anchors = []
    score = reweighted.score(
        fast_q,
        w,
        positive,
        objective=objective,
        first_row=0,
        size=len(w),
        tau=tau,
        bank_tau=bank_tau,
        extra_BE=fast_extra,
        anchors=anchors,
    )
    (score.loss_B * weight).sum().backward()
    assert near(score.loss_B, loss)
    assert near(fast_q.grad, dense_q.grad)
    assert extra is None or near(fast_extra.grad, dense_extra.grad)
    for pull, push in [(1.0, 1.0), (0.0, 1.0), (0.5, 2.0)]:
        gradient = motion.row_gradient(w, 0, scoring.Anchors.joined(anchors), pull=pull, push=push)
        assert near(
            gradient, expected_rows(dense, q, w, positive, bank_tau or tau, extra, weight, pull=pull, push=push)
        )
    cosines = torch.cat([q @ F.normalize(w, dim=1).T, *([] if extra is None else [extra])], 1)
    p = torch.softmax(cosines / tau * objective.exponents[0], 1)
    assert near(score.max_probability_B, p[:, : len(w)].amax(1))


def test_both_branches_of_the_clamp_are_among_these_problems():
    objective = Reweighted(positive_share=0.1, concentration=1.0)
    clamped = set()
    for kind in KINDS:
        q, w, extra, positive = problem(kind)
        for tau in (0.5, 0.1):
            q_leaf = q.clone().requires_grad_()
            anchors = []
            reweighted.score(
                q_leaf,
                w,
                positive,
                objective=objective,
                first_row=0,
                size=len(w),
                tau=tau,
                extra_BE=extra,
                anchors=anchors,
            ).loss_B.sum().backward()
            clamped |= set((anchors[0].share_N == 0).tolist())
    assert clamped == {True, False}


def test_of_infonce_it_is_the_plain_score():
    """With a margin of 0, or with no false negatives and equal weights, the loss is plain InfoNCE."""
    q, w, extra, positive = problem("rows and batch")
    plain = scoring.score(q, w, positive, first_row=0, size=len(w), tau=0.1, extra_BE=extra, anchors=(asked := []))
    for objective in (Margin(epsilon=0.0), Reweighted(positive_share=0.0, concentration=0.0)):
        other = reweighted.score(
            q.requires_grad_(),
            w,
            positive,
            objective=objective,
            first_row=0,
            size=len(w),
            tau=0.1,
            extra_BE=extra,
            anchors=(anchors := []),
        )
        assert torch.allclose(plain.loss_B, other.loss_B, atol=1e-12)
        assert torch.allclose(plain.max_probability_B, other.max_probability_B, atol=1e-12)
        other.loss_B.mean().backward()
        gradient = motion.row_gradient(w, 0, scoring.Anchors.joined(anchors), pull=0.7, push=1.5)
        assert torch.allclose(
            gradient, eq.bank_gradient(q.detach(), w, positive, 0.1, pull=0.7, push=1.5, extra_BE=extra), atol=1e-12
        )
    assert asked == []


def test_hand_arithmetic_of_two_negatives():
    """One query has cosine 1/2 with its positive, and 1/2 and 0 with its negatives; with tau 1/2, pos = e and neg = e,
    1.
    """
    q, m = (
        torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        torch.tensor([[0.5, 0.75**0.5], [0.5, -(0.75**0.5)], [0.0, 1.0]], dtype=torch.float64),
    )
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    weights = torch.stack([e, e / e]) / ((e + 1) / 2)
    hard = (weights * torch.stack([e, e / e])).sum()
    lowest = 2 * (-2 * e / e).exp()
    assert 0 < (e + 1 - 1.34 * e) / 0.33 < lowest and e + 1 - 1.8 * e < 0, (
        "the last two shares must leave something below the clamp, and nothing at all"
    )
    cases = [
        (0.0, 1.0, hard),
        (0.1, 1.0, (hard - 0.2 * e) / 0.9),
        (0.1, 0.0, (e + 1 - 0.2 * e) / 0.9),
        (0.67, 0.0, lowest),
        (0.9, 0.0, lowest),
    ]
    for share, concentration, left in cases:
        expected = -(e / (e + left)).log()
        objective = Reweighted(positive_share=share, concentration=concentration)
        assert torch.allclose(
            eq.reweighted_loss(q, m, torch.tensor([0]), 0.5, positive_share=share, concentration=concentration),
            expected,
        )
        assert torch.allclose(
            reweighted.score(q, m, torch.tensor([0]), objective=objective, first_row=0, size=3, tau=0.5).loss_B,
            expected,
        )
    moved = -(e ** (1 - 0.4) / (e ** (1 - 0.4) + e + 1)).log()
    plain = -(e / (e + e + 1)).log()
    for alpha, expected in ((1.0, (plain + moved) / 2), (None, moved), (3.0, (plain + 3 * moved) / 4)):
        assert torch.allclose(eq.margin_loss(q, m, torch.tensor([0]), 0.5, epsilon=0.1, alpha=alpha), expected)
        assert torch.allclose(
            reweighted.score(
                q, m, torch.tensor([0]), objective=Margin(alpha=alpha), first_row=0, size=3, tau=0.5
            ).loss_B,
            expected,
        )


@pytest.mark.parametrize("name", ["debiased", "hard", "margin"])
def test_float32_by_every_kernel_stays_close_to_float64(path, name):  # noqa: F811
    stays_close(name, "extra", 0.05, {"amx": 1e-3, "amx bfloat16": 0.3}.get(path, 1e-4))


@pytest.mark.parametrize("name", ["debiased", "hard", "margin"])
def test_float32_in_pytorch_s_blocks_stays_close_to_float64_where_rows_are_positives(name):
    stays_close(name, "rows", None, 1e-4)


def stays_close(name, kind, bank_tau, tolerance):
    """Compare loss, the queries' gradient, and rows and velocity after two steps of two terms each, with weight decay
    and normalised rows.
    """
    B, K, D, tau = 37, 211, 24, 0.1
    objective, dense = OBJECTIVES[name]
    pull, push = (1.0, 0.5) if kind == "rows" else (0.0, 1.0)
    bank = LearnableBank(
        size=K, dim=D, seed=0, pull=pull, push=push, temperature=bank_tau, reading="paper", weight_decay=1e-2
    )
    w, v = bank.rows.weight.detach().double(), torch.zeros(K, D, dtype=torch.float64)
    weight = torch.full((B,), 1 / B, dtype=torch.float64)
    for step in range(2):
        gradient = torch.zeros_like(w)
        for term in range(2):
            q, other = unit(B, D, seed=10 * step + term), unit(B, D, seed=10 * step + 5 + term)
            extra = None if kind == "rows" else (q * other).sum(1, keepdim=True)
            positive = torch.arange(B) * 5 % K if kind == "rows" else torch.full((B,), K)
            dense_q, fast_q = q.clone().requires_grad_(), q.float().requires_grad_()
            loss = dense(dense_q, F.normalize(w, dim=1), positive, tau, extra)
            loss.mean().backward()
            score = bank.score(
                fast_q,
                positive,
                temperature=tau,
                extra_BE=None if extra is None else extra.float(),
                objective=objective,
            )
            score.loss_B.mean().backward()
            assert torch.allclose(score.loss_B.double(), loss, atol=tolerance)
            assert torch.allclose(fast_q.grad.double(), dense_q.grad, atol=tolerance / tau / B)
            gradient += expected_rows(dense, q, w, positive, bank_tau or tau, extra, weight, pull=pull, push=push)
        w, v = eq.bank_update(w, v, gradient + 1e-2 * w, lr=0.7, momentum=0.9, reading="paper")
        bank.update(lr=0.7, keys_GD=q)
    assert torch.allclose(bank.rows.velocity.double(), v, atol=tolerance / (bank_tau or tau))
    assert torch.allclose(bank.rows.weight.double(), w, atol=tolerance / (bank_tau or tau))
    assert v.abs().max() > 0.05, "the rows must have moved, or the test would prove nothing"


def test_kernels_serve_where_no_positive_is_a_row_and_pytorch_where_one_is(monkeypatch):
    served = []
    monkeypatch.setattr(fused, "supports", lambda *tensors: True)
    monkeypatch.setattr(fused, "update", lambda *tensors, tau, lr, **settings: served.append((tau, lr)))

    def forward(q, w, taus, shifts, *, with_sums, bf16, kept):
        served.append(tuple(taus))
        return [torch.ones(len(q), dtype=torch.float64) for _ in taus], torch.ones(len(q)), torch.zeros_like(q)

    monkeypatch.setattr(fused, "forward", forward)
    bank = LearnableBank(size=10, dim=4, seed=0, temperature=0.5)
    q = F.normalize(torch.ones(3, 4), dim=1)
    objective = Reweighted()
    for positive in (torch.full((3,), 10), torch.arange(3)):
        extra = torch.full((3, 1), 0.5)
        bank.score(
            q.clone().requires_grad_(), positive, temperature=0.2, extra_BE=extra, objective=objective
        ).loss_B.mean().backward()
        bank.update(lr=1.0, keys_GD=q)
        if positive[0] == 10:
            assert served == [
                (0.1, 0.25),
                (0.2, 0.5),
                (0.25, 0.0),
                (0.5, 1.0),
            ], "expected two passes with two temperatures each, and the rows to move with the last"
        served.clear()
    assert served == []


def test_a_low_temperature_that_leaves_float32_s_range():
    """Every negative is opposite to its query, at a temperature where exp of the logit leaves the range of float32."""
    q = unit(6, 8, seed=0)
    w = torch.cat([q, -q.repeat(4, 1)])
    positive = torch.arange(6)
    for objective in (Reweighted(positive_share=0.0, concentration=1.0), Margin(epsilon=0.0)):
        loss = reweighted.score(
            q.float(), w.float(), positive, objective=objective, first_row=0, size=30, tau=0.004
        ).loss_B
        exact = reweighted.score(q, w, positive, objective=objective, first_row=0, size=30, tau=0.004).loss_B
        assert loss.isfinite().all() and torch.allclose(loss.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reweighted(positive_share=1.0), "positive_share: expected float from 0 below 1, got 1.0"),
        (lambda: Reweighted(concentration=-1.0), "concentration: expected float from 0, got -1.0"),
        (lambda: Margin(epsilon=-0.1), "epsilon: expected float from 0, got -0.1"),
        (lambda: Margin(alpha=-1.0), "alpha: expected float from 0 or None, got -1.0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
