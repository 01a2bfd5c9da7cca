"""The table of renamed settings and metrics: its new names exist, and with it old configurations and results are read
under today's names.
"""

import copy
import functools
import json
from dataclasses import replace

import pytest

from caco.config import components, refusals, signatures
from caco.config.composition import compose
from caco.runs import renamed
from caco.runs.identity import AS_BEFORE, flat, plain, run_hash
from experiments.run import RECORDS
from experiments.tables import experiments, load_scale, load_table, tables

# Names in conf/ at commit a06a4e7 that have changed since.
THEN = [
    *(
        f"caco.data.datasets.{name}"
        for name in ("cifar10_jpeg75", "digits", "folder", "imagenet", "imagenet100", "tiny_imagenet")
    ),
    *(f"caco.data.downloaded.{name}" for name in ("cifar10", "cifar100", "stl10")),
    "caco.data.beton.beton",
    *(f"caco.data.loader.{name}" for name in ("AutoLoader", "FFCVLoader", "TorchLoader")),
    "caco.data.views.Views",
    "caco.launchers.Local",
    "caco.launchers.Slurm",
    *(f"caco.optimizers.{name}" for name in ("adamw", "lars", "sgd")),
]
KNN = {"_target_": "caco.evals.knn.KNN", "k": 20, "temperature": 0.2, "fraction": 0.2, "block": 2048, "when": "epoch"}


@pytest.mark.parametrize("target", THEN)
def test_every_target_of_then_is_a_target_of_today(target):
    assert signatures.find(renamed.target(target)) is not None
    assert components._component({"_target_": target}, "x") == [
        f"x._target_: {target} is now called {renamed.target(target)}; use that name"
    ]


def test_a_setting_that_came_later_is_no_part_of_a_run_that_does_not_use_it():
    today = plain(compose(["optimizer=adamw"]))
    then = copy.deepcopy(today)
    for key in AS_BEFORE:
        *parts, name = key.split(".")
        node = functools.reduce(lambda node, part: node.get(part, {}), parts, then)
        node.pop(name, None)
    assert run_hash(then) == run_hash(today)
    assert run_hash({**today, "projector": {**today["projector"], "activation": "gelu"}}) != run_hash(today)


def test_every_new_name_in_the_table_is_there_and_no_old_one_is():
    for old, new in renamed.TARGETS.items():
        module, _, name = new.rpartition(".")
        assert signatures.load(new) or signatures.lookup(signatures.load(module), name), new
        module, _, name = old.rpartition(".")
        # A package with the first name still has a module augmentation; the second is the name of a command, and no
        # `_target_` uses it.
        assert old in ("caco.data.views", "caco.results") or not signatures.load(old), old


@pytest.mark.parametrize("old, new", renamed.KEYS.items())
def test_a_former_key_is_refused_by_its_new_name(old, new):
    with pytest.raises(refusals.COMPOSITION_ERRORS) as error:
        refusals.compose([f"{old}=3"])
    assert refusals.explain(error.value, [f"{old}=3"]) == f"{old}: is now called {new}; use that name"


def test_names_of_today_stay_as_they_are():
    config = {
        "method": {"_target_": "caco.methods.nnclr.NNCLR", "warm_start_passes": 1},
        "bank": {"initialisation": "random"},
        "eval": {"knn": KNN},
    }
    names = renamed.Names(config)
    assert names.config == config and not names.is_old
    row = {"kind": "train", "step": 1, "momentum": 0.9}  # a scalar that a method logs itself
    assert names.row(row) == row
    summary = {"knn20_20pct_top1": 1.0, "linear_top1": 2.0, "config_hash": "x"}
    assert names.summary(summary, []) == summary


@pytest.mark.parametrize(
    ("initialisation", "passes", "expected"),
    [("keys", 16, {"warm_start_passes": 16}), ("keys", 1, {}), ("random", 16, {})],
)
def test_the_passes_that_filled_a_bank_are_those_of_its_warm_start(initialisation, passes, expected):
    then = {"method": {"filling_momentum": 0.9}, "bank": {"initialisation": initialisation, "filling_passes": passes}}
    now = renamed.config(then)
    assert now == {"method": {"warm_start_momentum": 0.9, **expected}, "bank": {"initialisation": initialisation}}
    assert then["bank"]["filling_passes"] == passes, "the given configuration must not be changed"


def test_leaves_make_the_configuration_that_they_are_of():
    config = {"a": {"b": [1, {"c": None}], "d": []}, "e": {}, "f": [0.5, "x"]}
    assert renamed.nested(flat(config)) == config


def test_the_parameters_in_text_keep_the_options_that_were_chosen():
    then = {
        "bank": "null",
        "method": "caco",
        "method._target_": "m.M",
        "method.filling_momentum": "0.9",
        "optimizer._target_": "caco.optimizers.sgd",
    }
    assert renamed.Names.params(then) == {
        "bank": "null", "method": "caco", "method._target_": "m.M", "method.warm_start_momentum": "0.9",
        "optimizer._target_": "caco.engine.optimizers.sgd",
    }  # fmt: skip


def training(**values):
    return {"kind": "eval", "step": 44, "epochs": 2.0, **values}


def test_a_number_is_called_by_the_protocol_that_gave_it():
    linear = {"_target_": "caco.evals.linear.Linear", "name": "linear", "batch": 256}
    semi = {"_target_": "caco.evals.finetune.FineTune", "name": "semi", "fractions": [0.1], "epochs": [30]}
    names = renamed.Names({"eval": {"knn": KNN, "linear": linear, "semi": semi}})
    row = names.row(training(knn_top1=1.0, linear_top1=2.0, linear_top5=3.0, semi_top1=4.0, loss=5.0))
    assert row == training(**{
        "knn20_20pct_top1": 1.0, "linear_batch-256_drop_last-yes_top1": 2.0, "linear_batch-256_drop_last-yes_top5": 3.0,
        "semi_10_top1": 4.0,
        "loss": 5.0,
    })  # fmt: skip


def test_a_linear_evaluation_that_left_the_last_batch_out_without_saying_so_says_so():
    linear = {"_target_": "caco.evals.linear.Linear", "name": "linear", "batch": 256}
    then, now = (renamed.Names({"eval": {"linear": one}}) for one in (linear, linear | {"drop_last": False}))
    row = training(**{"linear_batch-256_top1": 2.0})
    assert then.row(row) == training(**{"linear_batch-256_drop_last-yes_top1": 2.0}) and now.row(row) == row
    lightly = plain(compose(["eval=[linear_lightly]"]))["eval"]["linear_lightly"]
    assert lightly.pop("drop_last") is True
    row = training(linear_lightly_top1=2.0)
    assert renamed.Names({"eval": {"linear_lightly": lightly}}).row(row) == row, (
        "lightly's protocol leaves the last batch out, so its name stays"
    )


def test_what_an_evaluation_overwrote_in_the_summary_is_training_s_again():
    rows = [
        training(knn_top1=30.0) | {"step": 20},
        training(knn_top1=40.0),
        {"kind": "eval", "step": 44, "knn_top1": 50.0},
    ]
    summary = {"knn_top1": 50.0, "steps": 44}
    one = {
        "results": {"knn_top1": 50.0},
        "step": 44,
        "baseline": None,
        "made_from": {"evaluator": KNN | {"fraction": 1.0}},
    }
    names = renamed.Names({"eval": {"knn": KNN}}, [one])
    assert names.summary(summary, rows) == {"knn20_20pct_top1": 40.0, "knn20_top1": 50.0, "steps": 44}
    assert names.row(rows[-1]) == {"kind": "eval", "step": 44, "knn20_top1": 50.0}
    # Without its file the protocol is unknown, so the name contains none.
    names = renamed.Names({"eval": {"knn": KNN}})
    assert names.summary(summary, rows) == {"knn20_20pct_top1": 40.0, "knn_top1": 50.0, "steps": 44}
    assert names.row(rows[-1]) == rows[-1]
    # With the same protocol and another seed, the number from training stays.
    names = renamed.Names({"eval": {"knn": KNN}}, [one | {"made_from": {"evaluator": KNN}}])
    assert names.summary(summary, rows) == {"knn20_20pct_top1": 40.0, "steps": 44}


def test_baselines_and_other_data_keep_their_prefix():
    knn_all = {"evaluator": KNN | {"fraction": 1.0}}
    files = [
        {"results": {"knn_top1": v}, "step": 44, "baseline": of, "made_from": knn_all}
        for v, of in ((1.0, "pixels"), (2.0, None))
    ]
    names = renamed.Names({}, files)
    assert names.row({"kind": "eval", "step": 44, "pixels/knn_top1": 1.0})["pixels/knn20_top1"] == 1.0
    assert names.row({"kind": "eval", "step": 44, "digits/knn_top1": 2.0})["digits/knn20_top1"] == 2.0
    other_step = {"kind": "eval", "step": 20, "digits/knn_top1": 2.0}
    assert names.row(other_step) == other_step


# Settings that scale=mini had until December 2026 for the rows whose bank has a warm start.
UNTIL_DECEMBER = ("epochs=10", "warm_start.steps=null", "warm_start.passes=16")


def shown_by(table, scale="mini", further=()):
    """{hash: row} for the configurations that the rows of a table have today, with three seeds each.

    `further` are settings of rows that have a warm start.
    """
    rows = [row for row in experiments(load_table(table), load_scale(scale)) if row.why_not is None]
    rows = [replace(row, further=further) if row.cfg.warm_start.steps else row for row in rows]
    return {row.hash(seed): row.row_id for row in rows for seed in (0, 1, 2)}


def recorded(name="mini_november"):
    """The runs of a committed record, exactly as in its file."""
    content = json.loads((RECORDS / f"{name}.json").read_text())
    return [run | {"config": {**content["config"], **run["config"]}} for run in content["runs"]]


def test_the_committed_runs_of_table_7_are_those_that_it_asks_for_today_but_for_the_length_of_the_warm_start():
    today = shown_by("7", further=UNTIL_DECEMBER)
    runs = [run for run in recorded() if run["experiment"]["table"] == "table7"]
    names = [renamed.Names(renamed.nested(run["config"])) for run in runs]
    assert len(runs) == 12 and all(one.is_old for one in names)
    assert [today[run_hash(one.config)] for one in names] == [run["experiment"]["row"] for run in runs]


@pytest.mark.long
def test_so_are_those_of_every_table():
    today = {table: shown_by(table) for table in tables()}
    labelled = [run for run in recorded("mini") if "experiment" in run]
    assert len(labelled) >= 30
    for run in labelled:
        config = renamed.Names(renamed.nested(run["config"])).config
        assert today[run["experiment"]["table"]][run_hash(config)] == run["experiment"]["row"]
