"""What a run prints: a message whenever something takes long, and at the end commands that work as printed."""

import contextlib
import io
import re
import shlex
import sys
import time
import types
from pathlib import Path

import pytest
from processes import Process, caco_train
from tiny import TINY, compose

from caco import results, saying
from caco.config import composition, continued, pretrained, validation
from caco.engine.next_command import set_otherwise
from caco.engine.progress import Progress, beginning, ended_before, ending
from caco.runs.files import read_json


def test_what_takes_long_says_what_it_is_and_what_does_not_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(saying, "_SECONDS", 0.1)
    with saying.doing("reading the images"):
        time.sleep(0.35)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and set(lines) == {"caco: reading the images: 0:00:00 so far"}
    with saying.doing("saving"):
        pass
    monkeypatch.setenv("RANK", "1")
    with saying.doing("saving"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "", "short work prints nothing, and only the first process prints"


def test_of_two_that_take_long_the_inner_one_speaks(monkeypatch, capsys):
    monkeypatch.setattr(saying, "_SECONDS", 0.1)
    with saying.doing("reading the images"), saying.doing("opening the set"):
        time.sleep(0.35)
    assert set(capsys.readouterr().err.splitlines()) == {"caco: opening the set: 0:00:00 so far"}
    assert not saying.is_under_way()


def test_a_line_is_said_too_while_the_bars_are_still_being_imported(monkeypatch, capsys):
    monkeypatch.setattr(saying, "_SECONDS", 0.1)
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
    with saying.doing("loading PyTorch"):
        time.sleep(0.25)
    assert "caco: loading PyTorch: 0:00:00 so far" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_is_counted_is_a_bar_with_the_time_left_on_a_terminal_alone(monkeypatch):
    monkeypatch.setattr(saying, "_BAR_AFTER_SECONDS", 0)
    for stream, bars, is_drawn in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with saying.counted(saying.Sometimes(True, bars=bars), "features of images", 100, 20) as count:
            time.sleep(0.15)
            count(40)
        drawn = re.findall(r"caco: features of images: +60%.*60/100 \[00:00<00:00", stream.getvalue())
        assert bool(drawn) == is_drawn and (is_drawn or stream.getvalue() == "")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_step_that_takes_long_says_what_it_is_about(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", stream := Terminal() if terminal else io.StringIO())
    monkeypatch.setattr(Progress, "_tick_s", 0.02)
    monkeypatch.setattr(Progress, "_pause_s", lambda self: 0.1)
    with contextlib.closing(Progress(total=9, done=3, batch=4, enabled=True)) as progress:
        time.sleep(0.2)
        assert "step" not in stream.getvalue() or terminal, "another line announces the first step"
        progress.step(4, "epoch 1 of 2", 0.5)
        time.sleep(0.3)
        progress.computing()
        time.sleep(0.3)
    lines = [line for line in stream.getvalue().splitlines() if "so far" in line]
    expected = [f"step 5/9: {what}, 0:00:00 so far" for what in ("waiting for its images", "computing")]
    assert sorted(set(lines)) == ([] if terminal else sorted(expected)), "on a terminal only the clock of the bar moves"


def test_numbers_have_their_nouns_in_the_singular_or_the_plural():
    numbers = [
        saying.amount(number, noun) for number, noun in ((1, "epoch"), (0, "image"), (2.0, "process"), (0.5, "epoch"))
    ]
    assert (
        numbers == ["1 epoch", "0 images", "2 processes", "0.5 epochs"]
        and saying.amount(12_000, "row") == "12,000 rows"
    )


def test_slow_steps_are_said_with_decimals_and_fast_ones_without(monkeypatch):
    assert [saying.per_second(rate) for rate in (0.834, 1, 9.996, 14.24, 99.96, 1234.4)] == [
        "0.83", "1.00", "10.0", "14.2", "100", "1,234",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with contextlib.closing(Progress(total=9, done=3, batch=4, enabled=True)) as progress:
        progress.next_line = 0.0
        monkeypatch.setattr(progress, "images_per_second", lambda step: 1.26)
        progress.step(4, "epoch 1 of 2", 0.5)
    assert "loss 0.5000, 1.26 images/s, " in stream.getvalue()


BEGINNING = {
    "data": "digits/train", "num_train": 1, "num_test": 0, "choices": {"method": "byol"}, "bank_rows": 0, "batch": 64,
    "warm_start_steps": 16, "epochs": 1, "processes": 1, "device": "cpu", "run_dir": Path("runs/x"),
}  # fmt: skip


def test_a_run_that_max_steps_cuts_within_its_first_epoch_says_that_it_only_shows_that_all_runs(tmp_path):
    """As preset=smoke does."""
    told = beginning(**BEGINNING, steps_per_epoch=21, total_steps=20)
    assert "length:  16 steps of warm start, then 1 epoch of 21 steps, 64 images a step, on cpu\n" in told
    assert "data:    digits/train, 1 image to learn" in told
    assert "\ncaco: stops:   after 20 of these 37 steps, because of max_steps. Less than an epoch only shows" in told
    told = beginning(**{**BEGINNING, "epochs": 2}, steps_per_epoch=2, total_steps=18)
    assert "after 18 of these 20 steps, because of max_steps\n" in told, "here an epoch is trained"
    assert "stops" not in beginning(**BEGINNING, steps_per_epoch=21, total_steps=37)
    ended = {"summary": {"steps": 20, "epochs": 4 / 21}, "seconds": 1, "run_dir": tmp_path, "evaluators": []}
    assert "\ncaco: stopped after 20 steps, because of max_steps. Less than an epoch only shows" in ending(
        **ended, epochs=1
    )
    assert "stopped" not in ending(**{**ended, "summary": {"steps": 37, "epochs": 1.0}}, epochs=1)


def test_a_failure_inside_is_that_failure():
    with pytest.raises(ZeroDivisionError), saying.doing("dividing"):
        1 / 0


def commands(text):
    return [
        shlex.split(line.removeprefix("caco:   ")) for line in text.splitlines() if line.startswith("caco:   python")
    ]


def test_a_run_ends_with_commands_that_can_be_typed_and_begun_again_says_when_it_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "my runs" / "it's"
    quoted = str(run_dir).replace("'", "\\'")
    command = [*TINY, "data.limit=128", "bank.size=128", "max_steps=3", "epochs=2", f"hydra.run.dir='{quoted}'"]
    code, _, err = Process(caco_train, *command).end()
    assert code == 0, err
    evaluate, table, longer = commands(err)
    assert evaluate[:3] == ["python", "-m", "caco.evaluate"] and table[:3] == ["python", "-m", "caco.results"]
    cfg = pretrained.compose("evaluate", evaluate[3:])
    assert list(cfg.eval) == ["knn"] and cfg.baselines and pretrained.locate(cfg.run).run_dir.resolve() == run_dir
    results.main(table[3:])
    assert "it's" in capsys.readouterr().out
    assert longer[-2:] == ["epochs=2", "continued_schedule=planned"], (
        "a run that max_steps ended within an epoch is continued as planned"
    )
    cfg = composition.job_config(composition.compose(longer[3:], continued.root(longer[3:])))
    validation.check(cfg, overrides=longer[3:])
    code, _, err = Process(caco_train, *command).end()
    assert code == 0 and re.search(
        r"^caco: finished already on \d{4}-\d\d-\d\d at \d\d:\d\d: .*it's \(knn20_20pct_top1 ", err, re.MULTILINE
    ), err
    assert len(commands(err)) == 3 and f"{read_json(run_dir / 'summary.json')['knn20_20pct_top1']:.2f}" in err


def test_settings_that_are_not_those_of_the_option_stand_in_the_command(tmp_path):
    assert set_otherwise(compose(), ["knn"]) == []
    settings = set_otherwise(compose("eval.knn.fraction=1", "eval.knn.k=5"), ["knn"])
    assert settings == ["eval.knn.k=5", "eval.knn.fraction=1"]
    told = ending({"loss": 1.0}, seconds=1, run_dir=tmp_path, evaluators=["knn"], epochs=2, settings=settings)
    assert commands(told)[0][4:] == ["eval=[knn]", *settings, "baselines=true"]


def test_what_a_run_without_evaluators_says_and_what_a_job_of_a_sweep_does(tmp_path):
    summary = {"loss": 1.0, "steps": 3}
    assert [
        words[2] for words in commands(ending(summary, seconds=121, run_dir=tmp_path, evaluators=[], epochs=2))
    ] == ["caco.results", "caco.train"]
    whole = commands(ending({**summary, "epochs": 2.0}, seconds=121, run_dir=tmp_path, evaluators=[], epochs=2))[-1]
    assert whole[-2:] == ["epochs=4", "continued_schedule=restart"]
    assert (
        ending(summary, seconds=121, run_dir=tmp_path, evaluators=["knn"], epochs=2, commands=False)
        == f"caco: finished in 0:02:01: {tmp_path}"
    )
    assert ended_before(summary, when=0, run_dir=tmp_path, evaluators=[], epochs=2).startswith(
        "caco: finished already on 19"
    )
