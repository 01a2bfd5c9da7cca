"""The banks move their rows as the equations say, start with the same rows on every machine, and count how rows are
used.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from caco import equations as eq
from caco.banks.fifo import FifoBank
from caco.banks.learnable import LearnableBank
from caco.banks.rows import Rows, random_rows
from caco.config import composition
from caco.errors import UserError
from caco.runs.identity import identity, run_hash
from caco.schedules import RunShape


def queries(step, B=8, D=6):
    generator = torch.Generator().manual_seed(step)
    return F.normalize(torch.randn(B, D, generator=generator, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("reading", ["code", "paper"])
@pytest.mark.parametrize(("pull", "push", "temperature"), [(1, 1, None), (0, 1, 0.02), (0.5, 0.5, 0.3)])
def test_five_steps_follow_the_dense_equations(reading, pull, push, temperature):
    bank = LearnableBank(
        size=13, dim=6, seed=0, pull=pull, push=push, lr=0.7, temperature=temperature, reading=reading
    ).double()
    w, v = bank.rows.weight.detach().clone(), torch.zeros(13, 6, dtype=torch.float64)
    for step in range(5):
        q = queries(step)
        positive = bank.rows.most_probable(queries(100 + step))
        bank.score(q, positive, temperature=0.1).loss_B.mean().backward()
        bank.update(lr=0.7, keys_GD=q)
        gradient = eq.bank_gradient(q, w, positive, temperature or 0.1, pull=pull, push=push)
        w, v = eq.bank_update(w, v, gradient, lr=0.7, momentum=0.9, reading=reading)
    assert torch.allclose(bank.rows.weight, w, atol=1e-11)
    assert torch.allclose(bank.rows.velocity, v, atol=1e-11)


def test_rows_move_only_in_update_and_gradients_accumulate_until_then():
    def bank_after(parts):
        bank = LearnableBank(size=13, dim=6, seed=0, lr=1.0).double()
        before = bank.rows.weight.detach().clone()
        for q in parts:
            positive = bank.rows.most_probable(q)
            (bank.score(q, positive, temperature=0.1).loss_B.sum() / 8).backward()
        assert torch.equal(bank.rows.weight, before)
        bank.update(lr=1.0, keys_GD=queries(0))
        return bank.rows.weight.detach()

    assert torch.allclose(bank_after([queries(0)]), bank_after(queries(0).split(2)), atol=1e-12)


def test_a_frozen_bank_never_moves():
    bank = LearnableBank(size=13, dim=6, seed=0, pull=0, push=0).double()
    before = bank.rows.weight.clone()
    q = queries(0).requires_grad_()
    bank.score(q, bank.rows.most_probable(q), temperature=0.1).loss_B.mean().backward()
    bank.update(lr=3.0, keys_GD=q)
    assert torch.equal(bank.rows.weight, before)


def test_the_rate_scales_with_the_batch_only_when_asked():
    def rates(**settings):
        return LearnableBank(size=4, dim=2, seed=0, lr=3.0, warmup_epochs=0, **settings).rates(RunShape(10, 1, 64))

    assert rates() == [3.0] * 10
    assert rates(lr_reference_batch=1024) == [0.1875] * 10
    assert rates(final_lr=1.0)[5] == pytest.approx(2.0)
    assert rates(final_lr=1.0, lr_reference_batch=1024)[5] == pytest.approx(2.0 / 16)


@pytest.mark.parametrize("bank", [LearnableBank, FifoBank])
def test_more_rows_than_the_machine_has_memory_for_are_refused_before_they_are_drawn(bank):
    with pytest.raises(UserError, match=r"bank\.size: 2,000,000,000 rows of 128 numbers take 1,907 GiB of memory"):
        bank(size=2_000_000_000, dim=128)


def test_random_rows_are_unit_and_do_not_depend_on_how_they_are_shared_out():
    whole = random_rows(0, 10_000, 3, seed=5)
    assert torch.allclose(whole.norm(dim=1), torch.ones(10_000))
    assert torch.equal(whole[4_000:9_000], random_rows(4_000, 9_000, 3, seed=5))
    assert not torch.equal(whole, random_rows(0, 10_000, 3, seed=6))
    assert len(torch.unique(whole, dim=0)) == 10_000
    assert whole.mean(0).abs().max() < 0.03  # the rows are spread over the whole sphere


@pytest.mark.parametrize(("reading", "initialisation", "norms"), [
    ("code", "random", "normal"), ("code", "keys", "unit"), ("paper", "random", "unit"), ("paper", "keys", "unit"),
])  # fmt: skip
def test_random_rows_of_the_code_reading_have_the_norms_of_a_plain_normal_law(reading, initialisation, norms):
    chosen = composition.compose(
        [f"bank_learning.reading={reading}", f"bank_learning.initialisation={initialisation}"]
    ).bank
    assert chosen.random_norms == norms
    bank = LearnableBank(
        size=4096, dim=256, seed=5, reading=reading, initialisation=initialisation, random_norms=chosen.random_norms
    )
    assert torch.allclose(F.normalize(bank.rows.weight, dim=1), random_rows(0, 4096, 256, seed=5)), (
        "the directions are the same"
    )
    norm = bank.rows.weight.detach().norm(dim=1)
    # The norm of D normal numbers is about sqrt(D), with a standard deviation of 1 / sqrt(2).
    assert norm.mean() == pytest.approx(16.0 if norms == "normal" else 1.0, abs=0.05)
    assert norm.std() == pytest.approx(0.5**0.5 if norms == "normal" else 0.0, abs=0.03)


def test_a_run_with_random_rows_is_another_one_since_they_have_those_norms():
    random = composition.compose(["bank_learning.initialisation=random"])
    then = composition.compose(["bank_learning.initialisation=random", "bank.random_norms=unit"])
    assert (random.bank.random_norms, composition.compose([]).bank.random_norms) == ("normal", "unit")
    assert run_hash(random) != run_hash(then) and "bank.random_norms" not in identity(then)


def test_the_queue_keeps_the_last_keys_in_order_and_gives_no_key_to_its_own_step():
    bank = FifoBank(size=5, dim=2, seed=0)
    keys = F.normalize(torch.arange(1, 15, dtype=torch.float32).reshape(7, 2), dim=1)
    for start in (0, 2, 4):
        part = keys[start : start + 2]
        assert not any(torch.equal(row, key) for row in bank.rows.weight for key in part)
        bank.update(lr=0.0, keys_GD=part)
    expected = keys[[5, 1, 2, 3, 4]]  # the sixth key replaced the first
    assert torch.equal(bank.rows.weight, expected)
    bank.update(lr=0.0, keys_GD=keys)  # there are more keys than rows, so the last five stay
    assert sorted(bank.rows.weight.tolist()) == sorted(keys[2:].tolist())
    bank.update(lr=0.0, keys_GD=-keys[:1])  # the next key replaces the oldest of them
    assert sorted(bank.rows.weight.tolist()) == sorted(torch.cat([keys[3:], -keys[:1]]).tolist())


def test_statistics_by_hand():
    rows = Rows(size=4, dim=2, seed=0, learnable=True)
    with torch.no_grad():
        rows.weight.copy_(torch.tensor([[1.0, 0.0], [3.0, 0.01], [0.0, 2.0], [-2.0, 0.0]]))
    rows.most_probable(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    values = rows.statistics()
    assert values["rows_used"] == 50.0
    three_and_one = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert values["use_entropy"] == pytest.approx(100 * three_and_one)
    assert values["near_duplicates"] == 50.0  # the first two rows point the same way
    assert values["row_norm_mean"] == pytest.approx(2.0, abs=1e-4)
    assert values["row_norm_std"] == pytest.approx(0.5**0.5, abs=1e-4)
    assert "rows_used" not in rows.statistics(), "counts of use start again after each report"


def test_use_is_not_counted_in_evaluation():
    rows = Rows(size=4, dim=2, seed=0, learnable=True).eval()
    rows.most_probable(torch.tensor([[1.0, 0.0]]))
    assert rows.uses.sum() == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 1}, "size: expected int from 2, got 1"),
        ({"dim": 0}, "dim: expected int from 1 up to 1048576, got 0"),
        ({"temperature": 0.0}, "temperature: expected float above 0 or None, got 0.0"),
        ({"momentum": 1.0}, "momentum: expected float from 0 below 1, got 1.0"),
        ({"pull": -1.0}, "pull: expected float from 0, got -1.0"),
        ({"lr_reference_batch": 0}, "lr_reference_batch: expected int from 1 or None, got 0"),
        ({"random_norms": "one"}, r"random_norms: expected unit \| normal, got 'one'"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LearnableBank(**{"size": 8, "dim": 4, "seed": 0} | wrong)
