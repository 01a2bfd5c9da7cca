"""A finished run that is trained for more epochs (continue_from): what is carried over, with which schedules, under
which name, and which settings must not differ.
"""

import math

import pytest
import tiny
from processes import Process, caco_train, ranks
from recorded import assert_same, final, record
from tiny import BANK, TINY

from caco.config import composition, continued, validation
from caco.engine.training import run_training
from caco.errors import UserError
from caco.runs.files import read_json
from caco.runs.identity import read_yaml, run_hash

STATE = ("step", "method", "optimizer", "random", "epoch_sums", "place")
QUIET = ["eval=[]" if item == "eval=[knn]" else item for item in TINY if not item.startswith(("max_steps", "epochs"))]
QUIET += ["data.limit=256"]  # four steps per epoch, after two of the warm start
CONSTANT = ["schedule.final_fraction=1", "method.final_momentum=0.99"]


def train(run_dir, *overrides):
    tiny.train(run_dir, *QUIET, "max_steps=null", *overrides)
    return run_dir


def compose(parent, *overrides):
    words = [f"continue_from={parent}", *overrides]
    cfg = composition.job_config(composition.compose(words, continued.root(words)))
    validation.check(cfg, overrides=words, choices=continued.choices())
    return cfg


def go_on(run_dir, parent, *overrides):
    run_training(compose(parent, *overrides), run_dir)
    return run_dir


def assert_same_state(a, b, parts=STATE):
    assert_same({part: final(a)[part] for part in parts}, {part: final(b)[part] for part in parts})


def losses(run_dir, first):
    return [row["loss"] for row in record(run_dir) if row["kind"] == "train" and row["step"] > first]


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return train(tmp_path_factory.mktemp("long"), "epochs=3", "checkpoint.every_epochs=1", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The same run, but it ends in the middle of its second epoch."""
    return train(tmp_path_factory.mktemp("cut"), "epochs=3", "max_steps=8")


def test_planned_from_a_run_that_was_cut_is_the_run_that_was_not_to_the_bit(tmp_path, long, cut):
    go_on(tmp_path, cut, "epochs=3", "continued_schedule=planned")
    assert_same_state(long, tmp_path)
    assert losses(tmp_path, 8) == losses(long, 8)


@pytest.mark.long
def test_twice_continued_is_that_run_too(tmp_path, long, cut):
    half = go_on(tmp_path / "half", cut, "epochs=3", "continued_schedule=planned", "max_steps=11")
    go_on(tmp_path / "whole", half, "epochs=3", "continued_schedule=planned")
    assert_same_state(long, tmp_path / "whole")


def test_it_is_killed_and_goes_on_to_the_same_bits(tmp_path, long, cut):
    words = ["epochs=3", "continued_schedule=planned", "checkpoint.every_steps=2", "checkpoint.keep=9"]
    go_on(tmp_path, cut, *words)
    rows = record(tmp_path)
    for path in sorted((tmp_path / "checkpoints").glob("*.pt"))[2:]:
        path.unlink()
    (tmp_path / "summary.json").unlink()
    go_on(tmp_path, cut, *words)
    assert_same_state(long, tmp_path)
    assert record(tmp_path) == rows


@pytest.mark.long
def test_restart_carries_everything_over(tmp_path):
    """With constant rates, a restart equals the uninterrupted run, so weights, twin, bank, velocities, optimiser and
    random state were carried over.
    """
    whole = train(tmp_path / "whole", "epochs=3", *CONSTANT)
    short = train(tmp_path / "short", "epochs=2", *CONSTANT)
    go_on(tmp_path / "on", short, "epochs=3", "continued_schedule=restart")
    assert_same_state(whole, tmp_path / "on")


def test_restart_is_a_new_cosine_over_the_added_epochs_and_planned_the_rest_of_the_long_one(tmp_path):
    short = train(tmp_path / "short", "epochs=1", "schedule.final_fraction=0")
    steps, peak, first = 4, 0.03 * 64 / 256, 2 + 4

    def rates(schedule, *more):
        go_on(tmp_path / schedule, short, "epochs=3", f"continued_schedule={schedule}", *more)
        rows = [row for row in record(tmp_path / schedule) if row["kind"] == "train"]
        assert [row["step"] for row in rows] == list(range(first + 1, first + 1 + 2 * steps))
        return [(row["lr"], row["twin_momentum"]) for row in rows]

    def half_cosine(start, end, t, total):
        return end - (end - start) * 0.5 * (1 + math.cos(math.pi * t / total))

    expected = [(half_cosine(peak, 0, t, 8), half_cosine(0.99, 1, t, 8)) for t in range(8)]
    assert [value for pair in rates("restart") for value in pair] == pytest.approx(
        [value for pair in expected for value in pair]
    )
    expected = [(half_cosine(peak, 0, t, 12), half_cosine(0.99, 1, t, 12)) for t in range(4, 12)]
    assert [value for pair in rates("planned") for value in pair] == pytest.approx(
        [value for pair in expected for value in pair]
    )
    assert final(tmp_path / "restart")["config_hash"] != final(tmp_path / "planned")["config_hash"]


def test_its_files_name_the_run_it_continues(tmp_path, cut):
    go_on(tmp_path, cut, "epochs=3", "continued_schedule=planned", "max_steps=9", "eval=[knn]")
    parent = run_hash(read_yaml(cut / "config.yaml")) if (cut / "config.yaml").exists() else None
    config = read_yaml(tmp_path / "config.yaml")
    assert (config.continue_from, config.continued_run, config.continued_schedule) == (str(cut), parent, "planned")
    assert (
        config.continued_epochs == pytest.approx(6 / 4)
        and config.method._target_ == "caco.methods.contrastive.Contrastive"
    )
    tags, summary = read_json(tmp_path / "tracking.json")["tags"], read_json(tmp_path / "summary.json")
    assert (tags["continued_from"], tags["continued_run"]) == (str(cut), parent)
    assert (summary["continued_from"], summary["continued_run"]) == (str(cut), parent)
    rows = [row for row in record(tmp_path) if row["kind"] == "eval"]
    assert [row["step"] for row in rows] == [8, 9], "the curve must start where that of the first run ends"


def test_where_it_lies_is_no_part_of_it_and_which_run_it_is_and_how_it_goes_on_are(cut, long):
    planned = compose(cut, "epochs=4", "continued_schedule=planned")
    moved = planned.copy()
    moved.continue_from = "elsewhere"
    assert run_hash(moved) == run_hash(planned)
    others = [compose(cut, "epochs=5", "continued_schedule=planned"), compose(long, "epochs=4",
    "continued_schedule=planned"),
              compose(long, "epochs=4", "continued_schedule=restart")]  # fmt: skip
    assert len({run_hash(cfg) for cfg in (planned, *others)}) == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["epochs=4"], "continued_schedule: expected restart .* or planned .* got None"),
        (["epochs=4", "continued_schedule=new"], "continued_schedule: expected restart .*, got 'new'"),
        (["epochs=1", "continued_schedule=planned"], "epochs: expected more than the 1.5 .*, got 1"),
        (["epochs=4", "continued_schedule=restart"], "ended within an epoch, after 1.5 epochs, .*; expected planned"),
        (["epochs=4", "continued_schedule=planned", "batch=32", "method=byol", "seed=1"],
         "continue_from: batch=32, method=byol, seed=1 cannot differ .*format=caco$"),
        (["epochs=4", "continued_schedule=planned", "continued_epochs=1"], "continued_epochs=1 cannot differ"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(cut, words, expected):
    with pytest.raises(UserError, match=expected):
        compose(cut, *words)


def test_a_run_that_is_not_there_or_not_finished_is_refused(tmp_path, repo_root, cut):
    with pytest.raises(UserError, match="^continue_from: expected a run's directory"):
        compose(tmp_path / "none", "epochs=4")
    with pytest.raises(UserError, match="^continue_from: .* by an earlier version of caco"):
        compose(repo_root / "tests/old_runs/old/tiny", "epochs=4")
    with pytest.raises(UserError, match="^continue_from: a run is continued from its end; expected its directory"):
        compose(sorted((cut / "checkpoints").glob("*.pt"))[-1], "epochs=4")
    copied = tmp_path / "unfinished"
    (copied / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "environment.json", "checkpoints/step_000000008.pt"):
        (copied / name).write_bytes((cut / name).read_bytes())
    with pytest.raises(UserError, match="unfinished is not finished; to finish it, give its own command again: "):
        compose(copied, "epochs=4")


def test_another_command_refuses_it():
    with pytest.raises(
        UserError, match="^continue_from: expected null: only caco.train can continue a run, got 'runs/x'"
    ):
        validation.check(composition.job_config(composition.compose(["continue_from=runs/x"])))


def test_without_a_run_it_says_nothing_of_one():
    with pytest.raises(
        UserError, match="continued_schedule: expected null, because no continue_from=RUN is given, got 'planned'"
    ):
        validation.check(composition.job_config(composition.compose(["continued_schedule=planned"])))


def test_the_command_line_trains_on_and_a_sweep_over_both_schedules_makes_two_runs(tmp_path, cut, long):
    words = [f"continue_from={long}", "epochs=4", "max_steps=15", "name=on", f"hydra.sweep.dir={tmp_path}"]
    code, _, err = Process(caco_train, "-m", *words, "continued_schedule=restart,planned").end()
    assert code == 0, err
    runs = sorted(path.name for path in tmp_path.glob("continued*"))
    assert [name.rpartition("-")[0] for name in runs] == [
        f"continued-schedule-{s}_epochs-4_max-steps-15" for s in ("planned", "restart")
    ]
    assert f"caco: continues {long}/checkpoints/step_000000014.pt (planned), step 14 of 15" in err


@pytest.mark.long
def test_two_ranks_go_on_as_two_ranks_would_have(tmp_path):
    words = [*QUIET, *BANK, "epochs=2", "accumulate=1"]
    for name, more in (("whole", []), ("cut", ["max_steps=8"])):
        codes, outputs = ranks(2, caco_train, *words, *more, f"hydra.run.dir={tmp_path / name}")
        assert codes == [0, 0], outputs
    on = [
        f"continue_from={tmp_path / 'cut'}",
        "epochs=2",
        "continued_schedule=planned",
        f"hydra.run.dir={tmp_path / 'on'}",
    ]
    codes, outputs = ranks(2, caco_train, *on)
    assert codes == [0, 0], outputs
    assert_same_state(tmp_path / "whole", tmp_path / "on")


@pytest.mark.long
@pytest.mark.parametrize("method", ["mocov2", "swav", "dino", "byol", "instdisc", "sela", "pcl"])
def test_every_kind_of_memory_goes_on(tmp_path, method):
    small = ["augmentation=digits", "projector=small", "projector.hidden_dim=16", "projector.dim=8", "optimizer=adam"]
    words = [f"method={method}", *small, *tiny.FEW_PROTOTYPES.get(method, []), *QUIET, "epochs=3"]
    for name, more in (("whole", ["max_steps=null"]), ("cut", ["max_steps=6"])):
        tiny.train(tmp_path / name, *words, *more, bank=method == "mocov2")
    go_on(tmp_path / "on", tmp_path / "cut", "epochs=3", "continued_schedule=planned")
    assert_same_state(tmp_path / "whole", tmp_path / "on")
