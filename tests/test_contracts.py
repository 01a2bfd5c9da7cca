"""What every method and every setting of pn in conf/ must do. The tests find the options in conf/, so they test new
ones automatically.
"""

import pytest
import torch
from test_trainer import assert_same, final, record
from tiny import FEW_PROTOTYPES, MIXED, OF_PATCHES, batch_of, compose, noise, now, train

from caco.config.composition import CONF
from caco.engine.assembly import build_method

WITH_OTHER_NUMBERS = ("caco_small", "dino_vit", "mocov3_vit")  # variants of CaCo, DINO and MoCo v3
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if path.stem not in WITH_OTHER_NUMBERS)
SETTINGS = sorted(path.stem for path in (CONF / "pn").glob("*.yaml"))
# Each method chooses its projector, optimiser and views; tests need small ones.
SMALL = ["augmentation=digits", "projector=small", "projector.hidden_dim=16", "projector.dim=8", "optimizer=sgd"]
MULTICROP = ["+augmentation.views.small._target_=caco.data.views.augmentation.View",
"+augmentation.views.small.count=2",
             "+augmentation.views.small.size=8"]  # fmt: skip
CASES = {
    f"method={name}": [f"method={name}", *SMALL, *FEW_PROTOTYPES.get(name, []), *OF_PATCHES.get(name, [])]
    for name in METHODS
}
# CPC v2 has no views, only patches.
CASES |= {
    f"{name} multi-crop": [*overrides, *MULTICROP] for name, overrides in list(CASES.items()) if name != "method=cpcv2"
}
CASES |= {f"pn={name}": [f"pn={name}"] for name in SETTINGS}
QUEUE = ["method.queue_size=128", "method.queue_start_epoch=0"]
CASES["method=swav with a queue"] = [*CASES["method=swav"], *QUEUE]
CASES["method=adco with shuffled keys"] = [*CASES["method=adco"], "norm_groups=4", "shuffle_keys=true"]
CASES["rows renewed and in balance"] = ["bank_learning.renewed_after_steps=2", "bank_learning.balance=0.5"]
# Each treatment of negatives, with rows of a bank that has positives, with rows of one that has none, and with a batch.
TREATED = {
    name: [f"negatives={name}", *(MIXED if name == "mixed" else [])] for name in ("debiased", "hard", "margin", "mixed")
}
CASES |= {
    f"pn={pn} negatives={name}": [f"pn={pn}", *treated]
    for pn in ("both", "negative")
    for name, treated in TREATED.items()
}
CASES |= {
    f"method={m} negatives={name}": [*CASES[f"method={m}"], *TREATED[name]]
    for m, name in (("adco", "hard"), ("adco", "mixed"), ("nnclr", "margin"))
}
# With small views, the fast tier tests only CaCo and SwAV; the long tier tests all methods.
LONG = {f"method={name} multi-crop" for name in METHODS if name not in ("caco", "swav")}
LONG |= {case for case in CASES if " negatives=" in case and case != "pn=both negatives=hard"} | {
    "method=ifm",
    "method=debiased",
}
LONG |= {"pn=both_blended"}
LONG |= {f"method={name}" for name in ("cpcv2", "cmc", "pirl", "sela", "hcl")}
PARAMETERS = [pytest.param(case, marks=pytest.mark.long if case in LONG else ()) for case in CASES]


def bank_of(overrides):
    return compose(*overrides, bank=False).bank


def has_bank(overrides):
    """Whether there is a bank whose size can be chosen, and does not follow from the number of images."""
    return bank_of(overrides) is not None and bank_of(overrides).size is not None


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
