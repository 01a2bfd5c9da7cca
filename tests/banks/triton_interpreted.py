"""The Triton kernels in Triton's interpreter, on a CPU. test_triton.py runs this file in a new process with
TRITON_INTERPRET=1.

The kernels must pass what tests/banks/test_fused.py demands of every code path.
"""

import numpy as np
import pytest
import test_fused
import test_reweighted
import torch
import triton.language as tl
from test_fused import stored, unit
from torch.nn import functional as F
from triton.runtime import interpreter

from caco import equations as eq
from caco import instructions
from caco.banks import motion, scoring
from caco.banks.kernels import cards, fused, triton_passes
from caco.banks.nearest import most_probable_row

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # from queries that are refused


@pytest.fixture(autouse=True)
def serves(monkeypatch):
    """Use the kernels for CPU tensors, with large blocks, because the interpreter's time depends on their number."""
    monkeypatch.setattr(fused, "supports", lambda *tensors: True)
    monkeypatch.setattr(instructions, "LEVEL", None)
    for name in ("forward", "nearest_row", "update"):
        monkeypatch.setattr(fused, name, getattr(triton_passes, name))
    large = cards.Card("interpreter", (), 0, dict.fromkeys(cards.TABLE[0].blocks, (cards.Blocks(64, 256, 4, 1),) * 2))
    monkeypatch.setattr(triton_passes, "_card", lambda device: large)
    monkeypatch.setattr(triton_passes, "CHUNK", 128)
    monkeypatch.setattr(triton_passes, "EXACT_ROWS", 256)
    # The interpreter stores a bfloat16 as the integer of its bits and would multiply these integers, and it truncates a
    # float32 to bfloat16 where GPUs round. `widened` and `rounded` correct both.
    builder, held = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(x):
        return (
            held((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        )

    def rounded(self, x, kind):
        if (x.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, kind)
        return held(torch.from_numpy(x.data.copy()).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))
    monkeypatch.setattr(builder, "cast_impl", rounded)
    with np.errstate(all="ignore"):  # masked rows after the last one divide by zero
        yield


@pytest.mark.parametrize("shape", [(1, 2, 1), (5, 7, 3), (97, 193, 20), (130, 777, 128), (31, 500, 200)])
@pytest.mark.parametrize("tau", [0.3, 0.02])
def test_loss_label_and_query_gradient(shape, tau):
    test_fused.test_loss_label_and_query_gradient("triton", shape, tau)


@pytest.mark.parametrize(
    ("reading", "pull", "push", "bank_tau", "extra"),
    [
        ("code", 1, 1, None, False),
        ("paper", 0, 1, 0.02, True),
        ("code", 1, 0, 0.3, True),
        ("paper", 0.5, 2, 0.05, False),
    ],
)
def test_rows_and_velocity_after_five_steps_of_two_terms(reading, pull, push, bank_tau, extra):
    settings = reading, pull, push, bank_tau, extra
    test_fused.test_rows_and_velocity_after_five_steps_of_two_terms("triton", *settings, keep=False)


def test_hard_negatives_take_two_passes_that_add_up():
    test_reweighted.stays_close("hard", "extra", 0.05, 1e-4)


def test_equal_rows_go_to_the_lowest_index_however_many_there_are():
    test_fused.test_equal_rows_go_to_the_lowest_index_however_many_there_are("triton")


def test_a_row_that_is_nearer_by_less_than_float32_can_tell_is_found():
    test_fused.test_a_row_that_is_nearer_by_less_than_float32_can_tell_is_found("triton")


@pytest.mark.parametrize("tau", [0.01, 0.002])
def test_temperatures_whose_logits_leave_float32_s_range(tau):
    test_fused.test_temperatures_whose_logits_leave_float32_s_range("triton", tau)


def test_gradients_of_parts_of_a_batch_are_those_of_the_whole():
    test_fused.test_gradients_of_parts_of_a_batch_are_those_of_the_whole("triton")


@pytest.mark.parametrize(
    ("spoil", "message"), test_fused.test_what_cannot_be_scored_is_refused_with_numbers.pytestmark[0].args[1]
)
def test_what_cannot_be_scored_is_refused_with_numbers(spoil, message):
    test_fused.test_what_cannot_be_scored_is_refused_with_numbers("triton", spoil, message)


def test_a_step_is_that_of_pytorch_s_blocks_and_the_same_to_the_bit_when_repeated(monkeypatch):
    k, w = unit(70, 40, seed=2).float(), stored(900, 40, seed=3).float()
    moves = {"pull": 0.7, "push": 1.5, "lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "normalise": True}

    def step():
        q, moved, velocity, anchors = unit(70, 40, seed=1).float().requires_grad_(), w.clone(), w / 9, []
        row = most_probable_row(k, w, 0)
        score = scoring.score(q, moved, row, first_row=0, size=900, tau=0.015, bank_tau=0.1, anchors=anchors)
        (score.loss_B * torch.linspace(-1, 1, 70)).sum().backward()
        motion.move(moved, velocity, 0, scoring.Anchors.joined(anchors), **moves)
        return row, score.loss_B.detach(), score.max_probability_B, q.grad, moved, velocity

    once, again = step(), step()
    monkeypatch.setattr(fused, "supports", lambda *tensors: False)
    for one, same, streamed in zip(once, again, step(), strict=True):
        assert torch.equal(one, same)
        assert (one - streamed).abs().max() <= 1e-4 * streamed.abs().max()


def test_products_of_bfloat16_change_sums_and_motion_by_less_than_a_hundredth():
    q, w, v = unit(70, 100, seed=1), stored(900, 100, seed=3), unit(900, 100, seed=4) / 1000
    m, positive, tau = F.normalize(w, dim=1), torch.arange(70) * 11, 0.1
    e = (q @ m.T / tau).exp()
    z, peak, sums = triton_passes.forward(q.float(), w.float(), [tau], [0.0], with_sums=True, bf16=True)
    moved, velocity = w.float(), v.float()
    triton_passes.update(
        moved, velocity, q.float(), positive, e.sum(1).log().float(), torch.full((70,), 1 / 70), tau=tau, pull=1.0,
        push=1.0, lr=1.0,
        momentum=0.9, weight_decay=0.0, normalise=False, bf16=True,
    )  # fmt: skip
    gradient = eq.bank_gradient(q, w, positive, tau)
    for got, exact in [
        (z[0], e.sum(1)),
        (peak, (q @ m.T).amax(1)),
        (sums, e @ m),
        (0.9 * v - velocity, -gradient),
        (w - moved, 0.9 * v + gradient),
    ]:
        assert 1e-6 < (got - exact).norm() / exact.norm() < 1e-2, (
            "bfloat16 rounds to 2^-9; an exact result would not be bfloat16"
        )


@pytest.mark.parametrize("crowded", ["everywhere", "one place"])
def test_the_bound_of_nearest_holds_for_every_row_not_named(crowded):
    """Some rows are so close together that neither bfloat16 nor a few candidates decide which is nearest; others would
    all be kept in the same place of a program.
    """
    near = F.normalize(unit(1, 64, seed=0) + 0.02 * unit(1500, 64, seed=1), dim=1)
    rows = near if crowded == "everywhere" else unit(1500, 64, seed=3)
    rows[3::256] = near[3::256]
    keys = F.normalize(unit(1, 64, seed=0) + 0.3 * unit(40, 64, seed=2), dim=1)
    cosine = keys @ rows.T
    for bf16, error in ((True, triton_passes.ROUNDING), (False, 1e-5)):
        row, bound = triton_passes._candidates(
            keys.float(), rows.float(), torch.tensor([40], dtype=torch.int32), bf16=bf16
        )
        assert (row >= 0).all() and (row.sort().values.diff(dim=1) > 0).all()
        unnamed = cosine.scatter(1, row, -1.0).amax(1)
        assert (bound >= unnamed - error).all()
    assert torch.equal(most_probable_row(keys.float(), rows.float(), 0), nearest_in_float64(keys, rows))


def nearest_in_float64(keys, rows):
    cosine = keys.float().double() @ F.normalize(rows.float().double(), dim=1).T
    return (cosine >= cosine.amax(1, keepdim=True) - 1e-12).to(torch.uint8).argmax(1)


@pytest.mark.parametrize("doubtful", [0, 5, 64, 65, 130])
def test_keys_of_which_rounding_leaves_several_rows_are_searched_for_again_however_many_they_are(doubtful):
    """Some keys have twelve nearest rows that float32 cannot tell apart, and some have nearest rows that are equal;
    each of the other keys has one nearest row.
    """
    rows, keys = unit(900, 24, seed=1), unit(130, 24, seed=2)
    rows[::9] = rows[0]
    near = F.normalize(rows[1] + 3e-5 * unit(12, 24, seed=3), dim=1)
    rows[2:900:80] = near
    keys[:doubtful:2], keys[1:doubtful:2] = rows[0], near[3]
    keys, rows = keys[torch.randperm(130, generator=torch.Generator().manual_seed(0))], 3 * rows
    assert torch.equal(most_probable_row(keys.float(), rows.float(), 0), nearest_in_float64(keys, rows))


@pytest.mark.parametrize("D", [40, 200])
@pytest.mark.parametrize("entry", cards.TABLE, ids=lambda entry: entry.name)
def test_every_entry_of_the_table_of_cards_gives_the_equations(monkeypatch, entry, D):
    """The trial compares every kernel, with the block sizes of the entry, with caco/equations.py."""
    monkeypatch.setattr(triton_passes, "_card", lambda device: entry)
    monkeypatch.setattr(triton_passes, "CHUNK", cards.CHUNK)
    triton_passes.trial(CPU, D)


def test_the_trial_passes_and_notices_kernels_that_give_something_else(monkeypatch):
    triton_passes.trial(CPU, 48)
    with pytest.raises(ValueError, match="widths up to 256; got 257"):
        triton_passes.trial(CPU, 257)
    monkeypatch.setattr(triton_passes, "update", lambda *arguments, **options: None)
    with pytest.raises(ArithmeticError, match="off by"):
        triton_passes.trial(CPU, 48)
