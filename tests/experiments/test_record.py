"""Records: what they contain, how they merge, and that a changed record is noticed."""

import copy
import json
import shlex
import shutil
import statistics
import sys

import pytest
from tiny import train

from caco import evaluate
from caco.config.composition import compose, job_config
from caco.errors import UserError
from caco.runs.directory import open_run
from experiments import record
from experiments.record import gather, merge, pack, read, unpack
from experiments.toy_sets import __main__ as toy_sets


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory):
    """The directories of two finished runs of caco.train, with seeds 0 and 1."""
    from tiny import BANK, TINY

    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        further = [f"seed={seed}", "epochs=1", "max_steps=4"]
        open_run(folder / f"run{seed}", job_config(compose([*TINY, *BANK, *further])))
        train(folder / f"run{seed}", *further)
    (folder / "run0" / record.LABEL).write_text(json.dumps({"table": "table7", "row": "both", "scale": "smoke"}))
    return [folder / "run0", folder / "run1"]


@pytest.fixture
def runs(run_dirs):
    return unpack(gather(run_dirs), "here")


def test_a_record_holds_what_was_run_on_what_and_what_came_out(run_dirs, runs):
    assert [run["seed"] for run in runs] == [0, 1]
    first = runs[0]
    assert first["summary"] == json.loads((run_dirs[0] / "summary.json").read_text())
    assert first["config"]["bank.size"] == 128 and "data.root" not in first["config"]
    assert first["environment"].keys() >= {"git_sha", "torch", "cpu", "gpus"}
    assert [row["kind"] for row in first["curve"]][:1] == ["eval"] and first["curve"][-1]["knn20_20pct_top1"] > 0
    assert first["experiment"] == {"table": "table7", "row": "both", "scale": "smoke"} and "experiment" not in runs[1]
    assert first["command"]


def test_what_runs_share_is_said_once(run_dirs):
    packed = gather(run_dirs)
    assert packed["config"]["batch"] == 64
    assert {key for run in packed["runs"] for key in run["config"]} == {"seed", "bank.seed"}


def test_packing_loses_nothing(runs):
    assert unpack(json.loads(json.dumps(pack(copy.deepcopy(runs)))), "again") == runs


def test_one_is_not_true_in_what_runs_share():
    """1 and True are equal in Python, but they give different configuration hashes."""
    common = {"environment": {}}
    packed = pack([{"config": {"bias": 1}, **common}, {"config": {"bias": True}, **common}])
    assert packed["config"] == {} and packed["runs"][1]["config"] == {"bias": True}


def test_merging_keeps_each_run_once_in_any_order(runs):
    together, told = merge([[runs[0]], [runs[1], runs[0]]])
    assert together == runs and told == []


def test_a_run_that_came_out_otherwise_elsewhere_is_told_and_the_first_is_kept(runs):
    other = copy.deepcopy(runs[0])
    other["summary"]["knn20_20pct_top1"] -= 1
    together, told = merge([runs, [other]])
    assert together == runs
    assert len(told) == 1 and "knn20_20pct_top1" in told[0]


def test_another_rate_is_no_other_result_and_a_later_evaluation_is_added(runs):
    other = copy.deepcopy(runs[0])
    other["summary"] |= {"images_per_second": 1.0, "linear_top1": 50.0}
    other["curve"].append({"kind": "eval", "step": 4, "epochs": 1.0, "linear_top1": 50.0})
    (merged,), told = merge([[runs[0]], [other]])
    assert told == [] and merged["summary"]["linear_top1"] == 50.0 and merged["curve"][-1]["linear_top1"] == 50.0
    assert merged["summary"]["images_per_second"] == runs[0]["summary"]["images_per_second"]


def test_a_record_whose_configuration_was_changed_is_refused(run_dirs):
    packed = gather(run_dirs)
    packed["config"]["batch"] = 128
    with pytest.raises(UserError, match="changed by hand"):
        unpack(packed, "theirs.json")


def test_the_committed_records_are_whole():
    paths = sorted((record.Path(record.__file__).parent / "records").glob("*.json"))
    assert paths
    for path in paths:
        assert read(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"runs": [{}], "config": {}, "environment": {}}'])
def test_something_else_is_no_record(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(UserError, match="record.json: expected a record"):
        read(path)


def test_an_unfinished_run_has_no_record(tmp_path):
    with pytest.raises(UserError, match="start its command again to finish it"):
        gather([tmp_path])


@pytest.mark.long
def test_the_commands_of_the_drawn_pacs_give_all_three_lines_of_its_table(repo_root, run_dirs, tmp_path, monkeypatch):
    """The commands are those of experiments/records/README.md, run on a tiny run."""
    page = (repo_root / "experiments/records/README.md").read_text().partition("## toy_pacs")[2].partition("\n## ")[0]
    draw, evaluation = (shlex.split(line)[3:] for line in page.splitlines() if line.startswith("    python -m"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("caco.runs.directory._locks", {})
    shutil.copytree(run_dirs[0], tmp_path / "run")
    for module, words in ((toy_sets, draw), (evaluate, [word.replace("RUN", "run") for word in evaluation])):
        monkeypatch.setattr(sys, "argv", ["it", *words])
        module.main()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert all(0 <= summary[f"{prefix}pacs_size-32/mean_top1"] <= 100 for prefix in ("", "untrained/", "pixels/"))
    recorded = record.read(repo_root / "experiments/records/toy_pacs.json")
    assert [run["seed"] for run in recorded] == [0, 1, 2]
    means = [run["summary"]["pacs_size-32/mean_top1"] for run in recorded]
    assert f"| {statistics.mean(means):.1f} ± {statistics.stdev(means):.1f} |\n" in page
