"""The equations in caco/equations.py agree with autograd in float64, with arithmetic by hand, and with each other."""

import math

import pytest
import torch
from torch.nn import functional as F

from caco import equations as eq

TAU = 0.3


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)

    def unit(*shape):
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    q_BD, k_BD, m_KD = unit(5, 4), unit(5, 4), unit(7, 4)
    return q_BD, k_BD, m_KD, eq.most_probable_positive(k_BD, m_KD)


def test_by_hand_two_rows_in_the_plane():
    """For q = (1, 0), rows (0.6, 0.8) and (0, 1), and tau 0.5, all numbers below were computed with a pocket
    calculator.
    """
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    m = torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    positive = eq.most_probable_positive(q, m)
    assert positive.tolist() == [0]
    p0 = math.exp(1.2) / (math.exp(1.2) + 1)  # cosines 0.6 and 0, divided by 0.5: logits 1.2 and 0
    assert eq.probabilities(q, m, 0.5)[0].tolist() == pytest.approx([p0, 1 - p0], abs=1e-12)
    assert p0 == pytest.approx(0.768525, abs=1e-6)
    assert eq.contrastive_loss(q, m, positive, 0.5).item() == pytest.approx(0.263282, abs=1e-6)
    # Tangents: q - 0.6 m_0 = (0.64, -0.48); q - 0 m_1 = (1, 0). Both rows move towards q by (1 - p0) = p1.
    moved = eq.bank_step_equation_10(q, m, positive, 0.5, eta=0.1)
    step = 0.1 / 0.5 * 0.231475
    expected = [[0.6 + step * 0.64, 0.8 - step * 0.48], [step, 1.0]]
    assert torch.allclose(moved, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_info_nce_by_hand():
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    k = torch.tensor([[0.8, 0.6]], dtype=torch.float64)
    m = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    by_hand = math.log(1 + math.exp(-1.6) + math.exp(-3.6))  # logits 1.6, 0 and -2 with tau 0.5
    assert eq.info_nce(q, k, m, 0.5).item() == pytest.approx(by_hand, abs=1e-12)


def test_info_nce_is_the_loss_with_the_positive_in_an_extra_column(problem):
    q, k, m, _ = problem
    extra = (q * k).sum(-1, keepdim=True)
    loss = eq.contrastive_loss(q, m, torch.full((5,), 7), TAU, extra).mean()
    assert torch.allclose(loss, eq.info_nce(q, k, m, TAU), atol=1e-14)


def test_the_loss_is_minus_log_p_at_the_positive(problem):
    q, _, m, positive = problem
    p = eq.probabilities(q, m, TAU)
    assert torch.allclose(p.sum(1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(eq.contrastive_loss(q, m, positive, TAU), -p[torch.arange(5), positive].log())


def test_ties_go_to_the_lowest_index():
    m = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert eq.most_probable_positive(torch.tensor([[1.0, 0.0]]), m).tolist() == [1]


def test_tangents_are_orthogonal_to_the_rows_and_never_point_away_from_the_query(problem):
    q, _, m, _ = problem
    tangent = eq.tangent(q, m)
    assert torch.einsum("bkd,kd->bk", tangent, m).abs().max() < 1e-14
    assert (torch.einsum("bkd,bd->bk", tangent, q) >= -1e-14).all()


def test_equations_8_and_9_are_autograd_through_normalised_rows(problem):
    q, _, m, positive = problem
    w = m.clone().requires_grad_()
    eq.contrastive_loss(q[:1], F.normalize(w, dim=1), positive[:1], TAU).sum().backward()
    p = eq.probabilities(q[:1], m, TAU)
    j = positive[0]
    expected = eq.negative_gradient(q[:1], m, p, TAU)[0]
    expected[j] = eq.positive_gradient(q[:1], m[positive[:1]], p[0, positive[:1]], TAU)[0]
    assert torch.allclose(w.grad, expected, atol=1e-13)


@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize(("pull", "push"), [(1, 1), (0, 1), (1, 0), (0, 0), (0.5, 2)])
def test_the_bank_gradient_is_autograd_with_the_negatives_sign_flipped(problem, pull, push, with_extra):
    """The oracle uses no formula of the code: for each query, autograd of Eq. 3 with rows of any norm; negative rows
    ascend (Eq. 6).
    """
    q, k, m, positive = problem
    norms = torch.linspace(0.5, 3, 7, dtype=torch.float64)[:, None]
    extra = q @ k.T if with_extra else None
    if with_extra:
        positive = positive.clone()
        positive[2:] = 7 + torch.arange(2, 5)  # some positives are extra columns, which the bank never moves
    expected = torch.zeros_like(m)
    for i in range(5):
        w = (m * norms).requires_grad_()
        row_extra = extra[i : i + 1] if with_extra else None
        loss = eq.contrastive_loss(q[i : i + 1], F.normalize(w, dim=1), positive[i : i + 1], TAU, row_extra)
        (grad,) = torch.autograd.grad(loss.sum(), w)
        scale = torch.full((7, 1), -float(push), dtype=torch.float64)
        if positive[i] < 7:
            scale[positive[i]] = pull
        expected += scale * grad / 5
    actual = eq.bank_gradient(q, m * norms, positive, TAU, pull=pull, push=push, extra_BE=extra)
    assert torch.allclose(actual, expected, atol=1e-13)


def test_equation_10_is_descent_on_the_bank_gradient_at_unit_rows(problem):
    """Eq. 10 sums over the batch and the code takes the mean, so a step with eta is a step with eta * B in the code."""
    q, _, m, positive = problem
    moved = eq.bank_step_equation_10(q, m, positive, TAU, eta=0.2)
    gradient = eq.bank_gradient(q, m, positive, TAU)
    rows, velocity = eq.bank_update(m, torch.zeros_like(m), gradient, lr=0.2 * 5, momentum=0.9, reading="code")
    assert torch.allclose(moved, rows, atol=1e-13)
    assert torch.equal(velocity, gradient)


def test_the_two_readings_differ_by_the_norm_alone(problem):
    q, _, m, positive = problem
    gradient, velocity = eq.bank_gradient(q, m, positive, TAU), torch.ones_like(m)
    code, v_code = eq.bank_update(m, velocity, gradient, lr=0.5, momentum=0.9, reading="code")
    paper, v_paper = eq.bank_update(m, velocity, gradient, lr=0.5, momentum=0.9, reading="paper")
    assert torch.allclose(paper.norm(dim=1), torch.ones(7, dtype=torch.float64))
    assert torch.allclose(F.normalize(code, dim=1), paper)
    assert torch.equal(v_code, v_paper)
    with pytest.raises(ValueError, match="'paper' or 'code'; got 'papr'"):
        eq.bank_update(m, velocity, gradient, lr=0.5, momentum=0.9, reading="papr")


def test_two_rows_of_a_symmetric_batch_sum(problem):
    """The contributions of the queries add up, so a batch gives the sum of its parts."""
    q, _, m, positive = problem
    weight = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = eq.bank_gradient(q, m, positive, TAU, weight_B=weight)
    parts = sum(eq.bank_gradient(q[s], m, positive[s], TAU, weight_B=weight[s]) for s in (slice(0, 2), slice(2, 5)))
    assert torch.allclose(whole, parts, atol=1e-14)


def test_wrong_shape_of_positives_is_refused(problem):
    q, _, m, _ = problem
    with pytest.raises(ValueError, match=r"shape \[5\].*got \[3\]"):
        eq.bank_weights(eq.probabilities(q, m, TAU), torch.zeros(3, dtype=torch.int64), pull=1, push=1)
