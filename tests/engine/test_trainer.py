"""A run learns, is recorded, and after an interruption at any point resumes to the same bits."""

import json
import signal

import pytest
import torch
from interrupted import Cut, cut_after, train_killed
from processes import Process, caco_train
from recorded import CLOCK, assert_same, final, record
from tiny import BANK, EVERY, TINY, batch_of, compose, now, train

from caco.banks.kernels import fused
from caco.config.composition import instantiate
from caco.engine import assembly, recording, trainer, training
from caco.engine.losses import NonFiniteLossError
from caco.methods import diagnostics
from caco.runs.checkpoint import load


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is not interrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    train(run_dir, *EVERY)
    return run_dir


# Steps 0 and 1 are the warm start, every third step saves a checkpoint, and an epoch has 21 steps.
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9, 11])
def test_a_run_cut_anywhere_goes_on_to_the_same_bits(tmp_path, monkeypatch, whole, steps):
    with monkeypatch.context() as patch:
        cut_after(patch, steps)
        with pytest.raises(Cut):
            train(tmp_path / "cut", *EVERY)
    train(tmp_path / "cut", *EVERY)
    assert_same(final(whole), final(tmp_path / "cut"))
    assert record(whole) == record(tmp_path / "cut")


# Seconds after the start of a checkpoint at which the process is killed: while it saves, just after, a few steps later.
# Nine are longer than the run, which is then killed at its end.
@pytest.mark.parametrize(
    ("precision", "kills"),
    [("fp32", [0.02]), pytest.param("bf16", [0.001, 0.004, 0.016, 0.032, 0.064, 9.0], marks=pytest.mark.long)],
)
def test_so_does_a_process_killed_at_whatever_instant(tmp_path, precision, kills):
    """The process and its workers are killed from outside, several times, at moments that the run cannot choose."""
    command = [*TINY, *BANK, "max_steps=24", "checkpoint.every_steps=2", f"precision={precision}",
    "loader.num_workers=1",
               "eval_every_epochs=3"]  # fmt: skip
    code, _, errors = Process(caco_train, *command, f"hydra.run.dir={tmp_path}/whole").end()
    assert code == 0, errors
    command.append(f"hydra.run.dir={tmp_path}/killed")
    for seconds in kills:
        code, _, errors = Process(train_killed, seconds, *command).end()
        assert code == -signal.SIGPROF, errors
        assert not (tmp_path / "killed" / "summary.json").exists(), "a run that has ended cannot be killed"
    code, _, errors = Process(caco_train, *command).end()
    assert code == 0, errors
    assert_same(final(tmp_path / "whole"), final(tmp_path / "killed"))
    assert record(tmp_path / "whole") == record(tmp_path / "killed")


def test_a_finished_run_started_again_stays_as_it_is(tmp_path):
    first = train(tmp_path)
    rows = record(tmp_path)
    second = train(tmp_path)
    assert record(tmp_path) == rows
    assert {k: v for k, v in first.items() if k not in CLOCK} == {k: v for k, v in second.items() if k not in CLOCK}
    assert json.loads((tmp_path / "summary.json").read_text())["images_per_second"] == first["images_per_second"]


def test_a_run_killed_between_its_last_save_and_its_summary_keeps_its_rate(tmp_path):
    first = train(tmp_path, "max_steps=4")
    (tmp_path / "summary.json").unlink()
    second = train(tmp_path, "max_steps=4")
    assert second["images_per_second"] == first["images_per_second"] > 0


def test_the_rate_is_the_mean_over_all_processes_that_made_the_run(tmp_path, monkeypatch):
    """The run is killed in step 8 after a save at step 6, and finished by a second process: 12 steps of 64 images in 1
    and 9 seconds.
    """
    monkeypatch.setattr(trainer.Progress, "seconds_of_training", lambda self: 1.0 if self.first == 0 else 9.0)
    with monkeypatch.context() as patch:
        cut_after(patch, 7)
        with pytest.raises(Cut):
            train(tmp_path, *EVERY)
    assert train(tmp_path, *EVERY)["images_per_second"] == 12 * 64 / 10


def test_a_rate_that_nobody_measured_is_left_out(tmp_path):
    train(tmp_path, "max_steps=4")
    (tmp_path / "summary.json").unlink()
    newest = max((tmp_path / "checkpoints").glob("*.pt"))
    state = load(newest)
    del state["time"]  # as in checkpoints of an older version
    torch.save(state, newest)
    assert "images_per_second" not in train(tmp_path, "max_steps=4")


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, f"seed={seed}", "max_steps=4")
    assert record(tmp_path / "a") == record(tmp_path / "b")
    assert record(tmp_path / "a") != record(tmp_path / "c")


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    train(tmp_path, "max_steps=4")
    with pytest.raises(ValueError, match="expected a checkpoint of configuration .*; got one of"):
        train(tmp_path, "max_steps=4", "bank.lr=1.0")


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch):
    train(tmp_path / "good", "max_steps=6")
    monkeypatch.setattr(
        training,
        "Evaluation",
        type(
            "Quiet",
            (),
            {"__init__": lambda *a, **k: None, "run": lambda *a: {}, "require": lambda *a: None, "evaluators": {}},
        ),
    )
    original = trainer.Trainer._forward_and_backward

    def poisoned(self, batch, now):
        outputs = original(self, batch, now)
        return outputs._replace(loss=outputs.loss * float("nan")) if self.step == 6 else outputs

    monkeypatch.setattr(trainer.Trainer, "_forward_and_backward", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 7 \(epoch 1 of 2, step 5 of 21\)"):
        train(tmp_path / "bad", "checkpoint.every_steps=6")
    state = final(tmp_path / "bad")
    assert state["step"] == 6
    assert_same(state["method"], final(tmp_path / "good")["method"])
    assert len(record(tmp_path / "bad")) == 6, "the ledger must not contain the failed step"


def test_the_record_has_what_the_run_did(tmp_path):
    summary = train(tmp_path, "max_steps=44", "epochs=2", "log_every_steps=5")
    rows = record(tmp_path)
    kinds = [row["kind"] for row in rows]
    assert kinds[0] == "eval" and kinds[-1] == "eval", "k-NN must run before and after the training"
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["epoch"] for row in epochs] == [0, 1]
    for name in ("loss", "max_probability", "positive_probability", "bank/rows_used", "bank/use_entropy",
                 "bank/row_norm_mean", "bank/row_norm_std", "bank/near_duplicates"):  # fmt: skip
        assert name in epochs[0]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [5, 10, 15, 20, 25, 30, 35, 40, 44]
    assert summary["steps"] == 44 and summary["epochs"] == 2.0
    assert 0 <= summary["knn20_20pct_top1"] <= 100
    assert summary["loss"] == epochs[-1]["loss"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_an_epoch_s_loss_is_the_mean_over_its_steps(tmp_path):
    train(tmp_path, "max_steps=23")
    rows = record(tmp_path)
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    (epoch,) = [row for row in rows if row["kind"] == "epoch"]
    assert len(losses) == 21
    assert epoch["loss"] == pytest.approx(sum(losses) / 21, abs=1e-12)


def test_the_rates_are_those_of_the_schedule(tmp_path):
    """SGD's rate at batch 64 is 0.03 / 4; the bank's rate 3.0 warms up over one epoch of 21 steps; the momentum starts
    at 0.99; the warm start uses the full rate.
    """
    train(tmp_path, "max_steps=4", "schedule.warmup_epochs=1", "epochs=2")
    rows = [row for row in record(tmp_path) if row["kind"] in ("warm_start", "train")]
    assert [row["kind"] for row in rows] == ["warm_start", "warm_start", "train", "train"]
    assert [row.get("epoch") for row in rows] == [None, None, 0, 0]
    assert [row["lr"] for row in rows] == pytest.approx([0.0075, 0.0075, 0.0075 / 21, 0.0075 * 2 / 21])
    assert [row["bank_lr"] for row in rows] == pytest.approx([0, 0, 3 / 21, 6 / 21])
    assert [row["twin_momentum"] for row in rows][:3] == pytest.approx([0.999, 0.999, 0.99])


def test_a_step_is_the_equations_and_the_published_order(tmp_path, monkeypatch):
    """One step after the warm start, repeated by hand in the order of the recipe: twin, keys, loss, then encoder and
    bank together.
    """
    monkeypatch.setattr(fused, "supports", lambda *_: False)  # so that all is float32; kernels: tests/banks
    train(tmp_path / "before", "max_steps=2")
    train(tmp_path / "after", "max_steps=3")
    before, after = final(tmp_path / "before"), final(tmp_path / "after")

    cfg = compose("max_steps=3")
    method = assembly.build_method(cfg).train()
    method.load_state_dict(before["method"])
    loader = instantiate(cfg.loader).bind(
        instantiate(cfg.data).pretrain, instantiate(cfg.augmentation), batch=64, seed=0, device="cpu"
    )
    views = [v.contiguous(memory_format=torch.channels_last) for v in next(iter(loader.epoch(0))).views]
    method.twin.update(method.encoder, 0.99)
    method.loss(views).loss.backward()
    rows = method.bank.rows
    expected_rows = (
        rows.weight.detach() - 3.0 * method.bank.gradient()
    )  # in the first step the velocity is the gradient; there is no warm-up
    assert torch.allclose(after["method"]["bank.rows.weight"], expected_rows, atol=1e-6)
    for name, p in method.encoder.named_parameters():
        momentum = before["optimizer"]["state"][[n for n, _ in method.encoder.named_parameters()].index(name)]
        velocity = 0.9 * momentum["momentum_buffer"] + p.grad + 1e-4 * p
        assert torch.allclose(after["method"][f"encoder.{name}"], p - 0.0075 * velocity, atol=1e-6), name
    assert torch.equal(after["method"]["twin.encoder.projector.0.weight"], method.twin.encoder.projector[0].weight)


def test_fewer_images_than_a_batch_are_refused_before_a_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "build_method", lambda cfg: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match="batch: expected at most the 1400 images of .*, got 2048"):
        train(tmp_path, "batch=2048")


MOCOV2 = ["method=mocov2", "augmentation=digits", "projector=small", "projector.dim=8", "optimizer=sgd"]


# pn=positive needs the whole batch after its warm start, so it is refused, as pn=none is below.
@pytest.mark.parametrize(
    ("overrides", "warm_start"), [([], True), ([], False), (["pn=positive"], True), (MOCOV2, True), (MOCOV2, False)]
)
def test_a_batch_cut_into_parts_gives_what_it_gives_whole(monkeypatch, overrides, warm_start):
    """Compares loss, metrics, gradients, keys and the motion of the rows in float64, without BatchNorm, whose results
    depend on the parts.
    """
    monkeypatch.setattr(torch.nn.modules.batchnorm._BatchNorm, "forward", lambda self, x: x)
    found = []
    for parts in (1, 4):
        cfg = compose(*overrides)
        method = assembly.build_method(cfg).double().train()
        if method.needs.whole_batch and not warm_start:
            assert overrides == ["pn=positive"]  # it is refused, as tested below
            return
        run = trainer.Trainer.__new__(trainer.Trainer)
        run.method, run.accumulate, run.device, run.precision = method, parts, torch.device("cpu"), "fp32"
        run.signs = diagnostics.Signs()
        generator = torch.Generator().manual_seed(0)
        views = [torch.randn(16, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
        at = now("warm start" if warm_start else "training", bank_lr=0.5)
        outputs = run._forward_and_backward(batch_of(views), at)
        gradients = [
            p.grad.clone() for group in method.parameter_groups() for p in group.parameters if p.grad is not None
        ]
        keys = method._step_keys()
        method.after_step(at)
        found.append([outputs.loss, *outputs.metrics.values(), keys, method.bank.rows.weight.detach(), *gradients])
    for whole, parts in zip(*found, strict=True):
        assert torch.allclose(whole, parts, atol=1e-10)
    assert max(gradient.abs().max() for gradient in found[0][-2:]) > 0


def test_accumulated_runs_learn_and_go_on_to_the_same_bits(tmp_path, monkeypatch):
    train(tmp_path / "whole", *EVERY, "accumulate=4")
    with monkeypatch.context() as patch:
        cut_after(patch, 7)
        with pytest.raises(Cut):
            train(tmp_path / "cut", *EVERY, "accumulate=4")
    train(tmp_path / "cut", *EVERY, "accumulate=4")
    assert_same(final(tmp_path / "whole"), final(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["accumulate=3"], "expected a divisor of the 64 images of a process .*; got 3"),
        (["accumulate=64"], "leaves at least 2 in each part; got 64"),
        (
            ["accumulate=2", "pn=none"],
            "this method's loss compares the images of a batch with one another.* expected null, got 2",
        ),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, *overrides, bank="pn=none" not in overrides)


def test_rows_without_a_direction_end_the_run_with_their_number(tmp_path, monkeypatch):
    original = recording.Recording.log_step

    def log(self, now, *rest, **named):
        if now.step == 4:
            self.method.bank.rows.weight.detach()[17] = 0.0
        original(self, now, *rest, **named)

    monkeypatch.setattr(recording.Recording, "log_step", log)
    with pytest.raises(NonFiniteLossError, match=r"the first is row 17, whose norm is 0.0.*at step 6 \(epoch 1 of 2"):
        train(tmp_path, *EVERY)
    assert final(tmp_path)["step"] == 3


@pytest.mark.parametrize("setting", ["pn=none", "pn=positive", "pn=negative", "pn=both"])
def test_every_setting_takes_a_warm_start_of_the_same_steps_as_a_phase_of_its_own(tmp_path, setting, capfd):
    """The warm start has three steps and its own evaluation, and is not recorded as an epoch; epoch 0 follows."""
    train(tmp_path, setting, "warm_start.steps=3", "max_steps=5", bank=setting != "pn=none")
    rows = record(tmp_path)
    assert [row["kind"] for row in rows] == ["eval", *["warm_start"] * 3, "eval", "train", "train", "eval"]
    assert [row.get("epoch") for row in rows if "loss" in row] == [None, None, None, 0, 0]
    assert [(row["step"], row.get("phase"), row["epochs"]) for row in rows if row["kind"] == "eval"][:2] == [
        (0, None, 0), (3, "warm start", 0)
    ]  # fmt: skip
    told = capfd.readouterr().err
    assert "Warm start finished: 3 steps. Training starts with epoch 1." in told
    assert "after the warm start (" in told


def test_a_run_cut_in_a_long_warm_start_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """The warm start has 25 steps, more than the 21 of a pass over the images; the run is interrupted in the second
    pass.
    """
    long = ["warm_start.steps=25", "max_steps=28", "checkpoint.every_steps=11"]
    train(tmp_path / "whole", *long)
    with monkeypatch.context() as patch:
        cut_after(patch, 24)
        with pytest.raises(Cut):
            train(tmp_path / "cut", *long)
    assert final(tmp_path / "cut")["step"] == 22
    train(tmp_path / "cut", *long)
    assert_same(final(tmp_path / "whole"), final(tmp_path / "cut"))
    assert record(tmp_path / "whole") == record(tmp_path / "cut")


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_run_that_dies_in_an_evaluation_has_lost_no_step_and_makes_it_when_it_goes_on(
    tmp_path, monkeypatch, evaluation
):
    """The run dies in the evaluation after the warm start and in the last one; a checkpoint is saved before each."""
    train(tmp_path / "whole", "max_steps=5")
    original, made = training.Evaluation.run, []

    def run(self, *arguments):
        made.append(None)
        if len(made) == evaluation + 1:
            raise MemoryError("no memory for the features")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training.Evaluation, "run", run)
        with pytest.raises(MemoryError):
            train(tmp_path / "died", "max_steps=5")
    assert final(tmp_path / "died")["step"] == [0, 2, 5][evaluation]
    train(tmp_path / "died", "max_steps=5")
    assert record(tmp_path / "whole") == record(tmp_path / "died")


def test_a_bank_that_collapses_is_said_once_and_one_that_does_not_is_not(tmp_path, capfd):
    """Rows that are pulled far at every step run into one another; rows that do not move stay apart."""
    train(
        tmp_path / "wild", "max_steps=null", "bank.reading=paper", "bank.lr=3.0"
    )  # moves rows by 0.6 radian per step at batch 64
    told = capfd.readouterr().err
    assert told.count("The bank has collapsed: ") == 1 and "What helps: a longer warm start (warm_start.steps)" in told
    (row,) = [row for row in record(tmp_path / "wild") if row["kind"] == "warning"]
    assert row["message"].startswith("The bank has collapsed: ") and row["message"] in told
    train(tmp_path / "still", "max_steps=null", "bank.reading=paper", "bank.lr=0.0")
    assert "collapsed" not in capfd.readouterr().err
    assert all(row["kind"] != "warning" for row in record(tmp_path / "still"))
