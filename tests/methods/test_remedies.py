"""Remedies for a bank of which early keys use few rows: several weighted positives, the other view as the positive at
first, renewed rows, and a loss term for even use.
"""

import pytest
import torch
from tiny import compose
from torch.nn import functional as F

from caco import equations
from caco.banks.balance import mean_activation_divergence
from caco.banks.learnable import LearnableBank
from caco.banks.rows import Rows
from caco.engine.assembly import build_method
from caco.errors import UserError
from caco.methods.base import Now
from caco.methods.contrast import contrast, weighted
from caco.methods.sources import BankRow, BankRows, NearestRows, OtherViewThenRow, Step
from caco.methods.terms import Term
from caco.schedules import RunShape

K, B, D, TAU = 24, 6, 8, 0.2
ONE = [Term(0, 1, 1.0)]


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def a_bank(**settings):
    bank = LearnableBank(size=K, dim=D, seed=0, warmup_epochs=0, **settings).double()
    bank.rows.weight.data = unit(K, D, seed=3) * torch.linspace(0.5, 2, K, dtype=torch.float64)[:, None]
    return bank


def at(step, steps=10, name="row_share"):
    table = OtherViewThenRow(first_share=0.0, last_share=1.0).schedules(
        RunShape(epochs=steps, steps_per_epoch=1, batch=B)
    )[name]
    return Step(torch.arange(B), Now(step, "training", step, False, step, 0, {name: table[step]}))


def scored(source, bank, q_BD, k_BD, step=None):
    """The queries' loss with all positives that a source gives, and their gradient; the bank keeps the rows'
    gradient.
    """
    q_BD = q_BD.clone().requires_grad_()
    positives = source.all_of(k_BD, bank, step)
    score = contrast([q_BD] * len(positives), [k_BD] * len(positives), positives, BankRows(), bank, TAU)
    loss = weighted(score, ONE * len(positives), positives)
    loss.backward()
    return loss.detach(), q_BD.grad


def test_nearest_rows_are_the_published_loss_each_by_the_softmax_of_its_cosine_and_move_along_its_gradient():
    bank, q_BD, k_BD = a_bank(), unit(B, D, seed=1), unit(B, D, seed=2)
    loss, q_grad = scored(NearestRows(count=4, temperature=0.3), bank, q_BD, k_BD)

    w_KD, q_BD = bank.rows.weight.detach().clone().requires_grad_(), q_BD.requires_grad_()
    m_KD = F.normalize(w_KD, dim=1)
    row_BC, weight_BC = equations.nearest_row_weights(k_BD, m_KD.detach(), 4, 0.3)
    each_CB = torch.stack([F.cross_entropy(q_BD @ m_KD.T / TAU, row_B, reduction="none") for row_B in row_BC.T])
    wanted = equations.several_positives_loss(each_CB, weight_BC.T).mean()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert torch.allclose(q_grad, q_BD.grad, atol=1e-12)
    # A row can be a positive of one query and a negative of another; then it is both pulled and pushed. With pull and
    # push 1 this is Eq. 6.
    gradient = sum(
        equations.bank_gradient(q_BD.detach(), w_KD.detach(), row_B, TAU, weight_B=weight_B / B)
        for row_B, weight_B in zip(row_BC.T, weight_BC.T, strict=True)
    )
    assert torch.allclose(bank.gradient(), gradient, atol=1e-12)


def test_one_nearest_row_is_caco():
    q_BD, k_BD = unit(B, D, seed=1), unit(B, D, seed=2)
    (one, one_grad), (caco, caco_grad) = (
        scored(source, a_bank(), q_BD, k_BD) for source in (NearestRows(count=1), BankRow())
    )
    assert one.item() == pytest.approx(caco.item(), rel=1e-12)
    assert torch.allclose(one_grad, caco_grad, atol=1e-14)


def test_every_row_that_is_a_positive_counts_as_chosen():
    bank, k_BD = a_bank(renewed_after_steps=1), unit(B, D, seed=2)
    positives = NearestRows(count=3).all_of(k_BD, bank, None)
    chosen = torch.cat([positive.row_B for positive in positives])
    assert bank.rows.uses.sum() == 3 * B and torch.equal(bank.rows.uses, torch.bincount(chosen, minlength=K))
    before = bank.rows.weight.detach().clone()
    bank.rows.renew(unit(K, D, seed=9))
    assert torch.equal(bank.rows.weight[chosen], before[chosen]), "no positive is replaced"


def test_more_nearest_rows_than_the_bank_has_are_refused():
    with pytest.raises(UserError, match=f"method.positives.count: expected at most the bank's {K} rows, got {K + 1}"):
        NearestRows(count=K + 1).all_of(unit(B, D, seed=2), a_bank(), None)


def test_the_other_view_is_the_positive_at_first_and_the_row_at_last():
    q_BD, k_BD, source = unit(B, D, seed=1), unit(B, D, seed=2), OtherViewThenRow()
    m_KD = F.normalize(a_bank().rows.weight.detach(), dim=1)
    logits_BK, own_B = q_BD @ m_KD.T / TAU, (q_BD * k_BD).sum(1) / TAU
    of_view_B = torch.logsumexp(torch.cat([own_B[:, None], logits_BK], 1), 1) - own_B
    of_row_B = F.cross_entropy(logits_BK, equations.most_probable_positive(k_BD, m_KD), reduction="none")
    for step in (at(0), at(3), at(9)):
        share = step.now["row_share"]
        wanted = equations.several_positives_loss(
            torch.stack([of_view_B, of_row_B]), torch.tensor([[1 - share], [share]], dtype=torch.float64)
        ).mean()
        loss, _ = scored(source, a_bank(), q_BD, k_BD, step)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert at(0).now["row_share"] == 0 and at(9).now["row_share"] > 0.97


def test_positives_of_both_kinds_go_with_plain_negatives_alone():
    with pytest.raises(
        UserError, match="OtherViewThenRow gives positives of two kinds.*got Reweighted, expected negatives=plain"
    ):
        build_method(compose("pn=both_blended", "negatives=hard"))


def test_the_share_of_the_row_is_a_schedule_of_the_run():
    method = build_method(
        compose("pn=both_blended", "method.positives.first_share=0.25", "method.positives.last_share=0.75")
    )
    shares = method.schedules(RunShape(epochs=4, steps_per_epoch=5, batch=B))["row_share"]
    assert len(shares) == 20 and shares[0] == 0.25 and shares[10] == pytest.approx(0.5) and 0.74 < shares[-1] < 0.75


def test_the_divergence_of_the_mean_activation_and_its_gradient_are_those_of_the_equation_in_blocks_too(monkeypatch):
    rows = Rows(size=300, dim=16, seed=0, learnable=True).double()
    q_BD, given_BD = (unit(40, 16, seed=5).requires_grad_() for _ in range(2))
    wanted = equations.mean_activation_divergence(q_BD, F.normalize(rows.weight.detach(), dim=1), 0.1)
    wanted.backward()
    # so 300 rows make five blocks, the last of 20 rows
    monkeypatch.setattr("caco.banks.scoring.BLOCK_ELEMENTS", 40 * 70)
    given = mean_activation_divergence(given_BD, rows, 0.1)
    (2 * given).backward()
    assert given.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert torch.allclose(given_BD.grad, 2 * q_BD.grad, atol=1e-14)
    assert rows.weight.grad is None


def test_it_is_0_in_even_use_and_log_k_where_all_queries_meet_one_row():
    rows = Rows(size=D, dim=D, seed=0, learnable=True).double()
    rows.weight.data = torch.eye(D, dtype=torch.float64)
    assert mean_activation_divergence(torch.eye(D, dtype=torch.float64), rows, 0.1).item() == pytest.approx(
        0, abs=1e-12
    )
    one = torch.eye(D, dtype=torch.float64)[:1].expand(5, -1)
    assert mean_activation_divergence(one, rows, 0.001).item() == pytest.approx(torch.tensor(float(D)).log().item())


def test_rows_that_no_key_has_chosen_for_so_many_steps_become_keys_in_order_and_rest_of_them_wait():
    bank = a_bank(renewed_after_steps=2, lr=0.0)
    before, keys = bank.rows.weight.detach().clone(), unit(5, D, seed=7)
    bank.rows.velocity += 1.0
    for step in range(3):
        bank.rows.note_chosen(torch.tensor([0, 2, 3]))
        bank.anchors.clear()
        bank.rows.renew(keys)
        if step == 0:
            assert torch.equal(bank.rows.weight, before), "no row has been idle for two steps yet"
    renewed = [
        1,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
        12,
    ]  # five rows after the second step, five after the third; rows 0, 2 and 3 are in use
    assert torch.equal(bank.rows.weight[renewed], torch.cat([keys, keys]))
    assert (bank.rows.velocity[renewed] == 0).all() and (bank.rows.velocity[[0, 2, 3, 13]] == 1).all()
    rest = [0, 2, 3, *range(13, K)]
    assert torch.equal(bank.rows.weight[rest], before[rest])
    assert bank.rows.statistics()["rows_renewed"] == pytest.approx(100 * 10 / K)
    assert bank.rows.statistics()["rows_renewed"] == 0


def test_in_one_s_own_loop_rows_become_the_keys_that_the_loss_was_given():
    bank, q_BD, k_BD = a_bank(renewed_after_steps=1, lr=0.0), unit(B, D, seed=1).requires_grad_(), unit(B, D, seed=2)
    used = set(bank.rows.most_probable(k_BD).tolist())
    bank.score(q_BD, bank.rows.most_probable(k_BD), temperature=TAU).loss_B.mean().backward()
    with pytest.raises(UserError, match="expected keys_GD, or keys given to `loss` since the last update"):
        bank.update()
    bank.loss(q_BD, k_BD, temperature=TAU).backward()
    bank.update()
    unused = [row for row in range(K) if row not in used]
    assert torch.allclose(bank.rows.weight[unused[:B]], k_BD, atol=1e-12)


def test_rows_that_do_not_learn_are_not_renewed():
    with pytest.raises(UserError, match="bank.renewed_after_steps: rows that do not learn cannot be renewed"):
        LearnableBank(size=K, dim=D, seed=0, pull=0.0, push=0.0, renewed_after_steps=2)
