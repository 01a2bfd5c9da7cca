"""What every method and every setting of pn in conf/ must do. The tests find the options in conf/, so they test new
ones automatically.
"""

import pytest
import torch
from cases import CASES, LONG, bank_of, has_bank
from recorded import assert_same, final, record
from tiny import batch_of, compose, noise, now, train

from caco.engine.assembly import build_method

PARAMETERS = [pytest.param(case, marks=pytest.mark.long if case in LONG else ()) for case in CASES]


@pytest.mark.parametrize("case", PARAMETERS)
def test_it_runs_records_and_goes_on_to_the_same_bits(tmp_path, case):
    overrides = [*CASES[case], "max_steps=7", "checkpoint.every_steps=4"]
    bank = has_bank(overrides)
    train(tmp_path, *overrides, bank=bank)
    whole, rows = final(tmp_path), record(tmp_path)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(set(losses)) == 7, "every step must give a different loss"
    (tmp_path / "checkpoints" / "step_000000007.pt").unlink()
    (tmp_path / "summary.json").unlink()
    train(tmp_path, *overrides, bank=bank)
    assert_same(whole, final(tmp_path))
    assert record(tmp_path) == rows


def batch(cfg, step):
    views, patches = noise(cfg, 8, torch.Generator().manual_seed(step))
    return batch_of(views, patches=patches)


@pytest.mark.parametrize("case", PARAMETERS)
def test_bank_and_twin_move_only_when_told(case):
    cfg = compose(*CASES[case], bank=has_bank(CASES[case]))
    method = build_method(cfg).train()
    bank, twin = getattr(method, "bank", None), getattr(method, "twin", None)
    rows = None if bank is None else bank.rows.weight.detach().clone()
    twin = None if twin is None else [p.clone() for p in twin.parameters()]
    method(batch(cfg, 0), now()).loss.backward()
    if twin is not None:
        assert all(torch.equal(a, b) for a, b in zip(twin, method.twin.parameters(), strict=True))
        assert all(p.grad is None for p in method.twin.parameters())
    if rows is not None:
        assert torch.equal(rows, method.bank.rows.weight)
        method.after_step(now(bank_lr=0.5))
        assert not torch.equal(rows, method.bank.rows.weight)
    assert all(p.grad is not None for group in method.parameter_groups() for p in group.parameters), (
        "every parameter must get a gradient"
    )


QUEUED = [pytest.param(case, marks=pytest.mark.long if case in LONG else ()) for case in CASES
          if has_bank(CASES[case]) and bank_of(CASES[case])._target_.endswith("FifoBank")]  # fmt: skip


@pytest.mark.parametrize("case", QUEUED)
def test_no_key_is_a_negative_of_its_own_image(case):
    """A queue that returned this step's keys at once would contain a vector equal to the query's own key."""
    cfg = compose(*CASES[case], bank=has_bank(CASES[case]))
    method = build_method(cfg).train()
    for step in range(3):
        before = method.bank.rows.weight.detach().clone()
        method(batch(cfg, step), now())
        for keys in method._step_keys().split(8):
            assert (keys @ before.T).max() < 1 - 1e-6
        assert torch.equal(before, method.bank.rows.weight)
        method.after_step(now(bank_lr=0.0))
