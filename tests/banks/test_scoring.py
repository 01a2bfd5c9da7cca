"""The streamed score equals the dense equations in loss, labels and all gradients, for any block size."""

import pytest
import torch
from torch.nn import functional as F

from caco import equations as eq
from caco.banks import motion, scoring
from caco.banks.nearest import most_probable_row


def problem(B=6, K=11, D=5, E=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = F.normalize(torch.randn(B, D, generator=generator, dtype=torch.float64), dim=1)
    w = torch.randn(K, D, generator=generator, dtype=torch.float64) * 2
    extra = torch.rand(B, E, generator=generator, dtype=torch.float64) * 2 - 1 if E else None
    positive = torch.randint(0, K + E, (B,), generator=generator)
    return q, w, extra, positive


@pytest.mark.parametrize("block_elements", [1, 6, 24, 1 << 20])  # blocks of 1, 1, 4 and all 11 rows
@pytest.mark.parametrize("E", [0, 3])
@pytest.mark.parametrize(("pull", "push", "bank_tau"), [(1, 1, 0.3), (0, 1, 0.05), (1, 0, 0.3), (0.5, 2, 1.0)])
@pytest.mark.parametrize("tau", [0.3, 0.02])
def test_loss_and_all_gradients(monkeypatch, block_elements, E, pull, push, bank_tau, tau):
    monkeypatch.setattr(scoring, "BLOCK_ELEMENTS", block_elements)
    q, w, extra, positive = problem(E=E)
    weight_B = torch.linspace(0.1, 1, len(q), dtype=torch.float64)

    dense_q, dense_extra = q.clone().requires_grad_(), extra.clone().requires_grad_() if E else None
    m = F.normalize(w, dim=1)
    dense = eq.contrastive_loss(dense_q, m, positive, tau, dense_extra)
    (dense * weight_B).sum().backward()
    expected_w = eq.bank_gradient(q, w, positive, bank_tau, pull=pull, push=push, extra_BE=extra, weight_B=weight_B)

    fast_q, fast_w, anchors = q.clone().requires_grad_(), w.clone().requires_grad_(), []
    fast_extra = extra.clone().requires_grad_() if E else None
    score = scoring.score(
        fast_q, fast_w, positive, first_row=0, size=len(w), tau=tau, bank_tau=bank_tau, extra_BE=fast_extra,
        anchors=anchors,
    )  # fmt: skip
    (score.loss_B * weight_B).sum().backward()

    assert torch.allclose(score.loss_B, dense, atol=1e-12)
    assert torch.allclose(fast_q.grad, dense_q.grad, atol=1e-12)
    assert fast_w.grad is None
    assert torch.allclose(
        motion.row_gradient(w, 0, scoring.Anchors.joined(anchors), pull=pull, push=push), expected_w, atol=1e-12
    )
    if E:
        assert torch.allclose(fast_extra.grad, dense_extra.grad, atol=1e-12)
    p = eq.probabilities(q, m, tau, extra)[:, : len(w)]
    assert torch.allclose(score.max_probability_B, p.amax(1), atol=1e-12)


def test_float32_stays_close_to_the_float64_equations_at_a_low_temperature(monkeypatch):
    # the kernels have their tests in test_fused.py
    monkeypatch.setattr(scoring.fused, "supports", lambda *tensors: False)
    q, w, _, positive = problem(B=64, K=1000, D=32)
    dense = eq.contrastive_loss(q, F.normalize(w, dim=1), positive, 0.02)
    fast = scoring.score(q.float(), w.float(), positive, first_row=0, size=1000, tau=0.02)
    assert (fast.loss_B - dense).abs().max() < 1e-4  # the losses are around 25


def test_a_masked_column_takes_no_part():
    q, w, extra, _ = problem(E=3)
    positive = torch.zeros(len(q), dtype=torch.int64)
    masked = extra.clone()
    masked[:, 1] = -torch.inf
    masked.requires_grad_()
    score = scoring.score(q, w, positive, first_row=0, size=11, tau=0.3, extra_BE=masked)
    score.loss_B.sum().backward()
    without = scoring.score(q, w, positive, first_row=0, size=11, tau=0.3, extra_BE=extra[:, [0, 2]])
    assert torch.allclose(score.loss_B, without.loss_B)
    assert torch.equal(masked.grad[:, 1], torch.zeros(len(q), dtype=torch.float64))


def test_rows_that_need_no_gradient_get_none():
    q, w, _, _ = problem()
    scoring.score(q.requires_grad_(), w, torch.zeros(6, dtype=torch.int64), first_row=0, size=11, tau=0.3)
    assert w.grad is None


@pytest.mark.parametrize("block_elements", [1, 24, 1 << 20])
def test_the_most_probable_row_is_that_of_equation_11_and_the_lowest_of_equals(monkeypatch, block_elements):
    monkeypatch.setattr(scoring, "BLOCK_ELEMENTS", block_elements)
    _, w, _, _ = problem()
    k = F.normalize(torch.randn(40, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64), dim=1)
    w[9] = w[2]  # of equal rows, the first must be chosen
    w[10] = w[0] * 3  # also if they differ only in their norm
    row = most_probable_row(k, w, 0)
    cosine = (k[:, None] * F.normalize(w, dim=1)).sum(2)  # a matrix product may round equal rows differently
    assert torch.equal(row, (cosine > cosine.amax(1, keepdim=True) - 1e-12).to(torch.uint8).argmax(1))
    assert (row != 9).all()
    assert (row == 2).any(), "the test would prove nothing if no key chose the duplicated row"


def test_scores_streamed_by_pytorch_are_float32_under_autocast(monkeypatch):
    monkeypatch.setattr(scoring.fused, "supports", lambda *tensors: False)
    q, w, _, positive = problem(B=32, K=100, D=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scoring.score(q.float(), w.float(), positive % 100, first_row=0, size=100, tau=0.05)
    outside = scoring.score(q.float(), w.float(), positive % 100, first_row=0, size=100, tau=0.05)
    assert torch.equal(inside.loss_B, outside.loss_B)


def test_shapes_that_do_not_fit_are_refused():
    q, w, _, positive = problem()
    with pytest.raises(ValueError, match="as wide as the bank's rows, 4; got 5"):
        scoring.score(q, w[:, :4], positive, first_row=0, size=11, tau=0.1)
    with pytest.raises(ValueError, match=r"each of 6 queries; got shape \[5\]"):
        scoring.score(q, w, positive[:5], first_row=0, size=11, tau=0.1)
