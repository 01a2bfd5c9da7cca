"""The Trainer runs every method that follows the contract, and an interrupted run of it resumes to the same bits."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from cases import MULTICROP
from recorded import assert_same, final, record
from tiny import compose

import caco.train
from caco.banks.fifo import FifoBank
from caco.config import folders
from caco.engine.training import run_training

STEPS = 30  # an epoch has 21
SETTINGS = {
    toys.PatchesAndSizes: MULTICROP,
    toys.LastLayerFrozenAtFirst: ["schedule.final_weight_decay=0.4", "schedule.clip_gradient_norm=0.5"],
}


def configured(toy, *overrides):
    cfg = compose(
        "pn=none",
        *SETTINGS.get(toy, ()),
        f"max_steps={STEPS}",
        "checkpoint.every_steps=11",
        "eval=[]",
        *overrides,
        bank=False,
    )
    cfg.method = {"_target_": f"toys.{toy.__name__}"}
    return cfg


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{toy method: directory of its uninterrupted run}; a run is made when a test asks for it first."""

    class Folders(dict):
        def __missing__(self, toy):
            self[toy] = tmp_path_factory.mktemp(toy.__name__)
            run_training(configured(toy), self[toy])
            return self[toy]

    return Folders()


def trained(runs, toy, step):
    from caco.runs.checkpoint import load

    return load(next((runs[toy] / "checkpoints").glob(f"step_*{step:03d}.pt")))["method"]


def rows_of(runs, toy, kind="train"):
    return [row for row in record(runs[toy]) if row["kind"] == kind]


FAST = (toys.Toy, toys.MemoryByImage)  # together they use the whole contract, memory included


@pytest.mark.parametrize("toy", [pytest.param(toy, marks=() if toy in FAST else pytest.mark.long) for toy in toys.ALL])
def test_it_goes_on_to_the_same_bits_from_the_middle_of_an_epoch_and_from_a_phase_s_end(runs, tmp_path, toy):
    run_training(configured(toy, "max_steps=15"), tmp_path)  # ends within epoch 0; longer runs save at steps 11 and 22
    for path in (tmp_path / "checkpoints").glob("*015.pt"):
        path.unlink()
    (tmp_path / "summary.json").unlink()
    whole = final(runs[toy])
    from caco.runs.checkpoint import load

    (at_11,) = (tmp_path / "checkpoints").glob("*011.pt")
    state = load(at_11) | {"config_hash": whole["config_hash"]}  # the two runs differ only in max_steps
    torch.save(state, at_11)
    run_training(configured(toy), tmp_path)
    assert_same(whole, final(tmp_path))
    assert record(runs[toy]) == record(tmp_path)


def test_a_head_with_a_schedule_of_its_own_keeps_its_rate_while_the_others_fall(runs):
    rows = rows_of(runs, toys.PredictorAtItsOwnRate)
    assert {row["predictor_rate"] for row in rows} == {1.0}
    assert rows[-1]["lr"] < rows[0]["lr"] / 1.5
    groups = final(runs[toys.PredictorAtItsOwnRate])["optimizer"]["param_groups"]
    assert groups[1]["lr"] == pytest.approx(0.0075) and groups[0]["lr"] == rows[-1]["lr"]


def test_labels_are_made_before_each_epoch_and_in_its_middle_and_never_again_on_going_on(runs):
    assert (
        int(final(runs[toys.LabelsMadeAnew])["method"]["times_made"]) == 4
    )  # two epochs were begun, and both reached their fifth step


def test_images_come_in_the_order_that_the_method_gives(runs):
    seen = final(runs[toys.OrderOfItsOwn])["method"]["seen"]
    order = [(np.arange(1400) * 3 + epoch) % 1400 for epoch in (0, 1)]
    expected = np.zeros(1400, dtype=np.int64)
    np.add.at(expected, order[0][: 21 * 64], 1)
    np.add.at(expected, order[1][: (STEPS - 21) * 64], 1)
    assert torch.equal(seen, torch.from_numpy(expected))


def test_a_frozen_layer_does_not_move_before_its_time_and_does_after_it(tmp_path):
    frozen = configured(toys.LastLayerFrozenAtFirst, "checkpoint.every_steps=1", "max_steps=5", "checkpoint.keep=9")
    run_training(frozen, tmp_path)
    weights = [
        trained({toys.LastLayerFrozenAtFirst: tmp_path}, toys.LastLayerFrozenAtFirst, step)["last.weight"]
        for step in range(1, 6)
    ]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3]) and not torch.equal(weights[3], weights[4])


def test_weight_decay_goes_to_its_final_value_by_a_cosine(runs):
    groups = final(runs[toys.LastLayerFrozenAtFirst])["optimizer"]["param_groups"]
    at = 1e-4 + (0.4 - 1e-4) * 0.5 * (1 - np.cos(np.pi * (STEPS - 1) / 42))
    assert groups[0]["weight_decay"] == pytest.approx(at)


def test_a_warm_start_of_the_method_s_own_is_a_phase_at_whose_end_the_twin_is_a_copy(runs, tmp_path):
    kinds = [row["kind"] for row in record(runs[toys.TwinThatMovesAfter])]
    assert kinds[:4] == ["warm_start"] * 3 + ["train"]
    run_training(configured(toys.TwinThatMovesAfter, "max_steps=3"), tmp_path)
    state = final(tmp_path)["method"]
    for name, value in state.items():
        if name.startswith("encoder.") and "running" not in name and "num_batches" not in name:
            assert torch.equal(value, state[f"twin.{name}"]), name


def test_a_memory_by_image_has_the_rows_of_the_images_that_were_seen(runs):
    memory = final(runs[toys.MemoryByImage])["method"]["memory"]
    start = torch.nn.functional.normalize(torch.randn(1400, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    moved = (memory != start).any(1)
    assert moved.sum() > 21 * 64 - 1, "an epoch has seen all images but those of the last, smaller batch"


@pytest.mark.parametrize("toy", toys.ALL)
def test_its_values_and_scalars_are_logged_under_its_own_names(runs, toy):
    rows = rows_of(runs, toy)
    assert all("loss" in row and "lr" in row for row in rows)
    assert ("twin_momentum" in rows[0]) == (toy is toys.TwinThatMovesAfter)
    assert "bank_lr" not in rows[0] and "momentum" not in rows[0]


def test_a_method_whose_batch_must_stay_whole_is_not_cut(tmp_path):
    with pytest.raises(
        ValueError, match="accumulate: this method's loss compares the images of a batch with one another"
    ):
        run_training(configured(toys.Toy, "accumulate=2"), tmp_path)


@pytest.fixture
def printed(repo_root, tmp_path, monkeypatch):
    """Write the files that docs/own.md prints for mine/, and return the page's commands that use them."""
    section = (repo_root / "docs/own.md").read_text(encoding="utf-8")
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", section, re.DOTALL):
        file = tmp_path / re.search(r"^# (mine/.*)$", block, re.MULTILINE)[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    yield [shlex.split(line) for line in re.findall(r"^\$ python -m caco.train (.*)$", section, re.MULTILINE)]
    folders.use()


def typed(monkeypatch, *words):
    """Train with these words of a command line and without trackers; returns the ledger's rows of training steps."""
    monkeypatch.setattr(sys, "argv", ["caco-train", *words, "tracking=ledger", "eval=[]", "hydra.run.dir=run"])
    caco.train.main()
    return [row for row in record(Path("run")) if row["kind"] == "train"]


def test_the_page_s_method_trains_as_printed(printed, monkeypatch):
    rows = typed(monkeypatch, *printed[0])
    assert printed[0][-1] == "method=predicting"
    assert len({row["loss"] for row in rows}) == len(rows) >= 4 and rows[0]["twin_momentum"] == 0.99


def test_the_page_s_source_trains_and_chooses_as_printed(printed, monkeypatch):
    assert printed[1][-1] == "pn=halfway" and len(typed(monkeypatch, *printed[1])) >= 4
    from halfway import Halfway  # found through the folder

    bank = FifoBank(size=16, dim=8, seed=0)
    k = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    nearest = bank.rows.weight[(k @ bank.rows.weight.T).argmax(1)].detach()
    expected = torch.nn.functional.normalize(k + nearest, dim=1)
    assert torch.allclose(Halfway()(k, bank).vector_BD, expected, atol=1e-6)
