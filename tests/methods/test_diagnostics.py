"""Signs of collapse: computed by hand for embeddings with known values, and logged for every method."""

import math

import pytest
import rank_worker
import torch
from cases import CASES, METHODS, has_bank
from processes import ranks
from recorded import record
from test_contracts import batch
from tiny import batch_of, compose, now, train
from torch.nn import functional as F

from caco import equations
from caco.engine.assembly import build_method
from caco.methods import diagnostics
from caco.methods.base import Method

D = 8
WELL = {"bank/rows_used": 90.0, "bank/near_duplicates": 1.0, "prototypes/use_perplexity": 20.0}


def axes(num_each: int) -> torch.Tensor:
    """Both ends of every coordinate axis, equally often, so that each coordinate has mean 0 and variance 1 / D."""
    return torch.cat([torch.eye(D), -torch.eye(D)]).double().repeat(num_each, 1)


def test_one_point_has_a_spread_of_0_and_a_rank_of_1():
    point = torch.tensor([[3.0, -4.0] + [0.0] * (D - 2)]).repeat(40, 1)
    assert diagnostics.spread(point).item() == pytest.approx(0, abs=1e-7)
    assert diagnostics.rank_me(point) == pytest.approx(1, abs=1e-3)
    opposite = torch.cat([point, -point])  # two points in one direction: the rank is 1, but the spread is not 0
    assert diagnostics.rank_me(opposite) == pytest.approx(1, abs=1e-3)
    assert diagnostics.spread(opposite).item() == pytest.approx((0.6 + 0.8) / D * math.sqrt(D))


def test_even_embeddings_have_a_standard_deviation_of_1_over_sqrt_d_and_a_rank_of_d():
    even = axes(5) * torch.arange(1, 81).double()[:, None]  # with different norms
    assert F.normalize(even, dim=1).std(0, correction=0) == pytest.approx(torch.full((D,), 1 / math.sqrt(D)).double())
    assert diagnostics.spread(even).item() == pytest.approx(1)
    assert diagnostics.rank_me(even) == pytest.approx(D, rel=1e-4)
    drawn = torch.randn(4000, D, generator=torch.Generator().manual_seed(0))
    assert diagnostics.spread(drawn).item() == pytest.approx(1, abs=0.02)
    assert D - 0.02 < diagnostics.rank_me(drawn) <= D


def test_the_rank_by_hand_of_two_singular_values():
    """Three unit vectors along one axis and one along another have the singular values sqrt(3) and 1."""
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0], [0.0, 5.0]])
    share = math.sqrt(3) / (math.sqrt(3) + 1)
    assert diagnostics.rank_me(z) == pytest.approx(
        math.exp(-share * math.log(share) - (1 - share) * math.log(1 - share)), rel=1e-5
    )


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7)])
def test_the_rank_is_that_of_the_published_equation(shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    assert diagnostics.rank_me(z) == pytest.approx(equations.rank_me(F.normalize(z, dim=1)).item(), rel=1e-9)


def test_what_a_step_and_an_epoch_say():
    signs = diagnostics.Signs()
    assert signs.of_step(None) == {} and signs.of_epoch() == {}, "a method without embeddings reports nothing"
    even = axes(5).float().requires_grad_()
    values = signs.of_step(even)
    assert set(values) == {"embedding_spread"} and values["embedding_spread"].item() == pytest.approx(1)
    assert not values["embedding_spread"].requires_grad and signs.of_epoch() == {
        "embedding_rank_me": pytest.approx(D, rel=1e-4)
    }
    signs.of_step(torch.full((4, D), torch.nan))
    assert signs.of_epoch() == {}, "missing values must not end a run"
    signs.of_step(torch.cat([torch.ones(diagnostics.MOST_ROWS, D), axes(9).float()]))
    assert signs.of_epoch()["embedding_rank_me"] == pytest.approx(1, abs=1e-3), "the rank uses only the first 512 rows"


@pytest.mark.long
def test_after_an_epoch_two_ranks_say_what_one_says():
    whole = diagnostics.rank_me(rank_worker.embeddings_of_all_ranks())
    codes, outputs = ranks(2, rank_worker.print_rank_me)
    assert codes == [0, 0] and all(f"rank_me {whole:.9f}" in out for out, _ in outputs), outputs


def test_a_collapse_is_said_with_what_helps_against_it():
    assert Method().warning({"embedding_spread": 0.06}) is None and Method().warning({}) is None
    assert (
        Method()
        .warning({"embedding_spread": 0.01})
        .endswith("What helps: a lower optimizer.lr, a longer warm-up (schedule.warmup_epochs).")
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_hands_out_the_embeddings_of_its_first_view(name):
    """The embeddings depend only on the first view, and the collapse warning uses their values over the epoch."""
    case = CASES[f"method={name}"]
    cfg = compose(*case, bank=has_bank(case))
    method = build_method(cfg).eval()  # in evaluation mode, because BatchNorm in training mode mixes all images
    views, patches = batch(cfg, 0).views, batch(cfg, 0).patches
    z_BD = method(batch_of(views, patches=patches), now()).embedding.detach()
    assert z_BD.shape == (8, cfg.projector.dim) and z_BD.dtype == torch.float32
    first, *others = views or [patches]  # CPC v2 has no views; its embedding of an image is the mean over the patches
    others, others_patches = [view.flip(0) for view in others], None if patches is None else patches.flip(0)
    again = batch_of([first, *others], patches=others_patches) if views else batch_of([], patches=patches)
    assert torch.equal(z_BD, method(again, now()).embedding.detach())
    other = batch_of([first.flip(0), *views[1:]], patches=patches) if views else batch_of([], patches=others_patches)
    assert not torch.allclose(z_BD, method(other, now()).embedding.detach())
    assert method.warning({**WELL, "embedding_spread": 0.01}).startswith(
        "The embedding has collapsed: embedding_spread 0.010"
    )
    assert method.warning({**WELL, "embedding_spread": 0.5}) is None


@pytest.mark.parametrize("name", ["caco", "dino"])  # one with a warm start, one with prototypes
def test_the_trainer_logs_them_at_every_step_and_after_every_epoch(tmp_path, name):
    case = CASES[f"method={name}"]
    train(tmp_path, *case, "batch=256", "epochs=2", "max_steps=null", "eval=[]", bank=has_bank(case))
    rows = record(tmp_path)
    steps, epochs = ([row for row in rows if row["kind"] in kinds] for kinds in (("train", "warm_start"), ("epoch",)))
    assert all(0 < row["embedding_spread"] < 1.2 for row in steps + epochs) and len(epochs) == 2
    assert all(1 < row["embedding_rank_me"] <= 8 for row in epochs)
    assert ("prototypes/use_entropy" in epochs[0]) == (name == "dino")
