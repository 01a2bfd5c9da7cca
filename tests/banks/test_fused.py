"""The fused kernel, and the streamed PyTorch code that replaces it where it was not built, agree with the dense
equations in float64 to the precision stated below.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from caco import equations as eq
from caco import instructions
from caco.banks import scoring
from caco.banks.kernels import fused
from caco.banks.learnable import LearnableBank
from caco.banks.nearest import most_probable_row
from caco.banks.unusable import UnusableError
from caco.errors import UserError

PATHS = ["streamed", "plain", "avx2", "wide", "avx512", "amx", "amx bfloat16"]
LOSS = {"amx": 1.2e-5, "amx bfloat16": 5e-3}  # error of a cosine, and so of loss times tau; other paths: float32
GRADIENT = {"amx": 1e-5, "amx bfloat16": 2e-3}  # error of a query's gradient times tau^2
ROWS = {"amx": 2e-5, "amx bfloat16": 5e-3}  # error of rows and velocity after five steps, times tau


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Every code path that this processor can run; "wide" is the tile shape of AVX-512 with AVX2 instructions."""
    if request.param == "streamed":
        monkeypatch.setattr(instructions, "LEVEL", "torch")
        assert not fused.supports(torch.ones(1))
        yield request.param
        return
    wanted = request.param.removesuffix(" bfloat16")
    monkeypatch.setattr(instructions, "LEVEL", wanted)
    if (serves := instructions.used(instructions.BANK)) != wanted:
        pytest.skip(f"needs a kernel that uses {wanted}; here it is {serves}")
    with torch.autocast("cpu", torch.bfloat16, enabled=request.param != wanted):
        yield request.param


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def stored(K, D, seed):
    """Rows with norms between 0.5 and 3."""
    return unit(K, D, seed=seed) * torch.linspace(0.5, 3, K, dtype=torch.float64)[:, None]


# (B, K, D): all 1; no multiple of a tile; several tiles of queries; several blocks of rows, for wide and narrow rows.
SHAPES = [(1, 2, 1), (5, 7, 3), (12, 16, 16), (97, 193, 20), (130, 777, 128), (31, 500, 200), (200, 97, 256)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [0.3, 0.08, 0.02])
def test_loss_label_and_query_gradient(path, shape, tau):
    B, K, D = shape
    q, k, w = unit(B, D, seed=1), unit(B, D, seed=2), stored(K, D, seed=3)
    m = F.normalize(w, dim=1)
    label = eq.most_probable_positive(k, m)
    dense_q = q.clone().requires_grad_()
    dense = eq.contrastive_loss(dense_q, m, label, tau)
    dense.mean().backward()

    fast_q, fast_w = q.float().requires_grad_(), w.float()
    fast_label = most_probable_row(k.float(), fast_w, 0)
    score = scoring.score(fast_q, fast_w, label, first_row=0, size=K, tau=tau)
    score.loss_B.mean().backward()
    assert ((k * m[label]).sum(1) - (k * m[fast_label]).sum(1)).max() < 1e-6
    assert torch.allclose(score.loss_B.double(), dense, atol=LOSS.get(path, 3e-6) / tau)
    assert torch.allclose(fast_q.grad.double(), dense_q.grad, atol=GRADIENT.get(path, 2e-6) / tau**2 / B)
    assert torch.allclose(
        score.max_probability_B.double(), eq.probabilities(q, m, tau).amax(1), atol=LOSS.get(path, 2e-6) / tau
    )


@pytest.mark.parametrize("reading", ["code", "paper"])
@pytest.mark.parametrize(("pull", "push", "bank_tau"), [(1, 1, None), (0, 1, 0.02), (1, 0, 0.3), (0.5, 2, 0.05)])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("keep", [False, True], ids=["computed again", "kept"])
def test_rows_and_velocity_after_five_steps_of_two_terms(path, reading, pull, push, bank_tau, extra, keep):
    B, K, D, tau = 37, 211, 24, 0.1
    settings = {"pull": pull, "push": push, "temperature": bank_tau, "reading": reading, "weight_decay": 1e-2}
    settings["keep_probabilities"] = keep and push > 0
    bank = LearnableBank(size=K, dim=D, seed=0, lr=0.7, **settings)
    with torch.no_grad():
        bank.rows.weight[40] = bank.rows.weight[3]  # two equal rows
        bank.rows.weight[200] = bank.rows.weight[3]
    w, v = bank.rows.weight.detach().double(), torch.zeros(K, D, dtype=torch.float64)
    for step in range(5):
        gradient = torch.zeros_like(w)
        for term in range(2):
            q, other = unit(B, D, seed=10 * step + term), unit(B, D, seed=10 * step + 5 + term)
            columns = (q * other).sum(1, keepdim=True) if extra else None
            positive = torch.arange(B) * 7 % K if term else torch.full((B,), 40)
            if extra:
                positive[::3] = K
            score = bank.score(q.float(), positive, temperature=tau, extra_BE=columns.float() if extra else None)
            score.loss_B.mean().backward()
            gradient += eq.bank_gradient(q, w, positive, bank_tau or tau, pull=pull, push=push, extra_BE=columns)
        w, v = eq.bank_update(w, v, gradient + 1e-2 * w, lr=0.7, momentum=0.9, reading=reading)
        kept = bank.room is not None and path not in ("streamed", "amx", "amx bfloat16")
        assert [len(anchors.kept) for anchors in bank.anchors] == [kept, kept]
        bank.update(lr=0.7, keys_GD=q)
    atol = ROWS[path] / (bank_tau or tau) if path in ROWS else 1e-4
    assert torch.allclose(bank.rows.weight.double(), w, atol=atol)
    assert torch.allclose(bank.rows.velocity.double(), v, atol=atol)
    assert (w - bank.rows.weight[0].double()).abs().max() > 0.1, (
        "the rows must differ from one another, or the test would prove nothing"
    )


def test_equal_rows_go_to_the_lowest_index_however_many_there_are(path):
    rows = stored(1000, 32, seed=0).float()
    rows[[30, 31, 900]] = rows[7].clone()  # fewer equal rows than the search keeps candidates
    rows[100:140] = rows[12] * 2.0 ** torch.arange(-20, 20)[:, None]  # more equal directions than that
    keys = torch.cat([F.normalize(rows[[7, 12]], dim=1), unit(50, 32, seed=1).float()])
    label = most_probable_row(keys, rows, 0)
    assert label[:2].tolist() == [7, 12]
    exact = keys.double() @ F.normalize(rows.double(), dim=1).T
    assert torch.equal(label, (exact > exact.amax(1, keepdim=True) - 1e-12).to(torch.uint8).argmax(1))


@pytest.mark.parametrize("path", PATHS[1:], indirect=True)
def test_the_nearest_rows_cosines_are_within_the_bound_that_comes_with_them(path):
    """Only few rows can be the nearest to a scattered key. For a key amid a crowd of rows there are many, which a
    bfloat16 or even a float32 cannot tell apart.
    """
    rows = stored(3000, 40, seed=0).float()
    noise = torch.randn(200, 40, generator=torch.Generator().manual_seed(1))
    rows[500:600] = rows[12] + 1e-6 * noise[:100]
    rows[700:800] = rows[13] + 3e-3 * noise[100:]
    keys = torch.cat([F.normalize(rows[[12, 13]], dim=1), unit(60, 40, seed=2).float()])
    value, row, error = fused.nearest(keys, rows)
    assert value.shape[1] == (16 if path.startswith("amx") else 4), (
        "more candidates would only cost time where float32 can tell rows apart"
    )
    exact = keys.double() @ F.normalize(rows.double(), dim=1).T
    named = row >= 0
    off = (value.double() - exact.gather(1, row.clamp(min=0))).abs()
    assert named[:, 0].all() and (off <= error[:, None])[named].all()
    assert 1e-3 * error.max() < off[named].max() and error.max() < 0.01, (
        "the bound must be near the real errors, or it would be useless"
    )
    # A row that is not among the candidates is too far to be the nearest, unless all candidates may be the nearest.
    crowded = value[:, -1] >= value[:, 0] - 2 * error
    assert crowded.nonzero().tolist() == [[0]]
    assert (row == exact.argmax(1, keepdim=True)).any(1)[~crowded].all()


def test_a_row_that_is_nearer_by_less_than_float32_can_tell_is_found(path):
    """The cosines of the rows differ by 1e-9, so only float64 can order them."""
    key = torch.zeros(1, 64)
    key[0, 0] = 1.0
    rows = torch.zeros(500, 64)
    rows[:, 0] = 1.0
    rows[torch.arange(500), 1 + torch.arange(500) % 63] = torch.linspace(2e-4, 3e-4, 500).flip(
        0
    )  # the offset falls, so the last row is the nearest
    assert most_probable_row(key, rows, 0).tolist() == [499]


@pytest.mark.parametrize("tau", [0.01, 0.002])
def test_temperatures_whose_logits_leave_float32_s_range(path, tau):
    q, w = unit(6, 8, seed=0), -unit(6, 8, seed=0).repeat(5, 1)  # the cosine of each query with its own row is -1
    positive = torch.arange(6)
    dense = eq.contrastive_loss(q, F.normalize(w, dim=1), positive, tau)
    fast = scoring.score(q.float(), w.float(), positive, first_row=0, size=30, tau=tau).loss_B
    assert torch.allclose(fast.double(), dense, rtol=1e-5, atol=LOSS.get(path, 0) / tau)


def test_rows_move_right_where_probabilities_leave_a_bfloat16_s_exponents(path):
    """At this low a temperature for the rows, one bfloat16 per number is not enough at any precision of the run, so the
    rows move as in float32.
    """
    B, K, D, bank_tau = 20, 97, 24, 0.004
    bank = LearnableBank(size=K, dim=D, seed=0, temperature=bank_tau)
    w, q, positive = bank.rows.weight.detach().double(), unit(B, D, seed=1), torch.arange(B) * 3
    bank.score(q.float(), positive, temperature=0.1).loss_B.mean().backward()
    gradient = eq.bank_gradient(q, w, positive, bank_tau, pull=1, push=1)
    bank.update(lr=1.0, keys_GD=q)
    assert torch.allclose(bank.rows.velocity.double(), gradient, atol=5e-3 * gradient.abs().max())
    assert gradient.abs().max() > 1


@pytest.mark.parametrize("path", ["plain", "avx2", "wide", "avx512"], indirect=True)
def test_kept_probabilities_move_the_rows_as_those_computed_again(path):
    """Over several tiles of queries and blocks of rows, in parts of unequal size."""

    def moved(keep):
        bank = LearnableBank(size=1000, dim=200, seed=0, lr=1.0, keep_probabilities=keep)
        for _ in range(2):
            for q in unit(250, 200, seed=1).float().split([130, 1, 119]):
                q.requires_grad_()
                bank.score(q, bank.rows.most_probable(q.detach()), temperature=0.1).loss_B.sum().backward()
            bank.update()
        return bank

    kept, computed = moved(True), moved(False)
    assert torch.allclose(kept.rows.weight, computed.rows.weight, rtol=0, atol=3e-6)
    assert computed.rows.velocity.abs().max() > 0.1, "the rows must have moved, or the test would prove nothing"


def test_probabilities_that_nothing_needs_are_not_kept():
    with pytest.raises(UserError, match="bank.keep_probabilities: only the push of negatives needs probabilities"):
        LearnableBank(size=10, dim=4, push=0.0, keep_probabilities=True)


def test_the_memory_of_kept_probabilities_is_used_again(path, capfd):
    bank = LearnableBank(size=100, dim=16, seed=0, keep_probabilities=True)
    scoring._say_that_nothing_is_kept.cache_clear()
    q = unit(30, 16, seed=1).float().requires_grad_()
    for _ in range(3):
        for _ in range(2):  # the second time without a backward pass, as in an evaluation
            loss = bank.score(q, bank.rows.most_probable(q.detach()), temperature=0.1).loss_B.mean()
        loss.backward()
        del loss
        bank.update()
    said = capfd.readouterr().err.count("bank.keep_probabilities has no effect here")
    assert (len(bank.room.free), said) == ((0, 1) if path in ("streamed", "amx", "amx bfloat16") else (2, 0))


def test_gradients_of_parts_of_a_batch_are_those_of_the_whole(path):
    def moved(parts):
        bank = LearnableBank(size=301, dim=16, seed=0, lr=1.0)
        for q in unit(24, 16, seed=1).float().chunk(parts):
            (bank.score(q, bank.rows.most_probable(q), temperature=0.1).loss_B.mean() / parts).backward()
        bank.update(lr=1.0, keys_GD=q)
        return bank.rows.weight.detach()

    assert torch.allclose(moved(1), moved(4), atol=1e-6)


def test_threads_do_not_change_what_is_chosen_and_nothing_by_more_than_rounding(path):
    def outcome(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            bank = LearnableBank(size=5000, dim=64, seed=0)
            q = unit(100, 64, seed=1).float().requires_grad_()
            label = bank.rows.most_probable(q.detach())
            loss = bank.score(q, label, temperature=0.1).loss_B
            loss.mean().backward()
            bank.update(lr=1.0, keys_GD=q)
        finally:
            torch.set_num_threads(before)
        return label, loss.detach(), q.grad, bank.rows.weight.detach()

    one, three = outcome(1), outcome(3)
    assert torch.equal(one[0], three[0])
    for a, b in zip(one[1:], three[1:], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for _ in range(3):  # repeated, because the rows that a thread gets depend on timing
        assert all(torch.equal(a, b) for a, b in zip(three, outcome(3), strict=True))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda q, w: w.index_fill_(0, torch.tensor([17, 200]), 0.0),
            "2 rows of the bank have no direction; the first is row 17, whose norm is 0.0",
        ),
        (lambda q, w: w[5].fill_(float("inf")), "1 row of the bank has no direction; .* row 5, whose norm is inf"),
        (
            lambda q, w: q[3].fill_(float("nan")),
            "1 of 20 queries are not finite unit vectors.* query 3, whose norm is nan",
        ),
        (lambda q, w: q[4].mul_(9), "1 of 20 queries are not finite unit vectors.* query 4, whose norm is (9.0|8.99)"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_numbers(path, spoil, message):
    w = stored(300, 16, seed=0).float()
    q = F.normalize(w[:20], dim=1)
    spoil(q, w)
    most_probable_row(q, w, 0)  # any row is allowed, but the search must end
    with pytest.raises(UnusableError, match=message):
        scoring.score(q, w, torch.zeros(20, dtype=torch.int64), first_row=0, size=300, tau=0.1)


def test_the_run_s_precision_decides_which_products_are_rounded(monkeypatch):
    """precision=bf16 means autocast around the method's loss; it applies to the score and to the motion of the rows
    that follows from it.
    """
    told = []
    monkeypatch.setattr(scoring.fused, "supports", lambda *tensors: True)
    monkeypatch.setattr(scoring.fused, "update", lambda *tensors, bf16, **settings: told.append(("update", bf16)))

    def forward(q, w, taus, shifts, *, with_sums, bf16, kept):
        told.append(("score", bf16))
        return [torch.ones(len(q), dtype=torch.float64)], torch.ones(len(q)), torch.zeros_like(q)

    monkeypatch.setattr(scoring.fused, "forward", forward)
    for autocast, dtype in [(False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float16)]:
        bank = LearnableBank(size=10, dim=4, seed=0)
        with torch.autocast("cpu", dtype, enabled=autocast):
            loss = bank.score(
                F.normalize(torch.ones(3, 4)).requires_grad_(), torch.arange(3), temperature=0.1
            ).loss_B.mean()
        loss.backward()
        bank.update(lr=1.0, keys_GD=torch.ones(3, 4))
    assert told == [
        ("score", False),
        ("update", False),
        ("score", True),
        ("update", True),
        ("score", False),
        ("update", False),
    ]


@pytest.mark.parametrize("path", ["plain", "avx2", "wide", "avx512"], indirect=True)
def test_without_tiles_it_stays_float32_under_bf16(path):
    q, w = unit(20, 16, seed=0).float(), stored(100, 16, seed=1).float()
    bf16, full = (fused.forward(q, w, [0.1], [0.0], with_sums=True, bf16=bf16) for bf16 in (True, False))
    assert torch.equal(bf16[0][0], full[0][0]) and torch.equal(bf16[2], full[2])


def test_without_the_kernel_one_line_says_so_and_the_numbers_stay(monkeypatch, capsys):
    monkeypatch.setattr(instructions, "LEVEL", None)
    monkeypatch.setattr(instructions, "compiled", lambda part: None)
    fused._loaded.cache_clear()
    rows, own = torch.eye(4), torch.arange(4)
    try:
        losses = [scoring.score(rows, rows, own, first_row=0, size=4, tau=0.5).loss_B for _ in range(2)]
    finally:
        fused._loaded.cache_clear()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "fused kernel was not built here" in told
    for loss in losses:
        assert loss.tolist() == pytest.approx([math.log(1 + 3 * math.exp(-2))] * 4, abs=1e-6)
