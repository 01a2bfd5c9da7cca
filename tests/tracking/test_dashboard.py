"""The dashboard shows all runs, and opens with the columns in which they differ. tests/tracking/test_mlflow_server.py
tests its server.
"""

import itertools
import json
import socket
from types import SimpleNamespace

import pytest

from caco.errors import UserError
from caco.tracking import dashboard
from caco.tracking.ledger import LedgerTracker
from caco.tracking.names import colours, short, short_sweep


def run(name, params, metrics=(), **tags):
    data = SimpleNamespace(params=params, metrics=dict.fromkeys(metrics, 1.0), tags=tags)
    return SimpleNamespace(info=SimpleNamespace(run_name=name), data=data)


def test_the_table_shows_in_what_runs_differ_then_results_beside_the_papers():
    same = {"method": "caco", "seed": "0", "batch": "64"}
    runs = [
        run("pn=both bank.lr=1", {**same, "pn": "both", "bank": "8M", "bank.lr": "1", "bank.push": "1.0"},
        ["train/loss"]),
        run("pn=none bank.lr=3", {**same, "pn": "none", "bank": "8M", "bank.lr": "3", "bank.push": "0.0"},
            ["eval/knn20_top1", "eval/epochs", "eval/linear_top1", "paper/linear_top1", "final/steps"],
            slurm_job_id="1_0"),
        run("the sweep", {}),
    ]  # fmt: skip
    assert dashboard.columns(runs) == [
        "params.`pn`", "params.`bank.lr`",
        "metrics.`eval/knn20_top1`", "metrics.`eval/linear_top1`", "metrics.`paper/linear_top1`",
        "metrics.`train/loss`",
        "tags.`slurm_job_id`",
    ]  # fmt: skip


def test_where_runs_ran_and_what_of_is_shown_only_where_it_differs():
    alike = [
        run("seed=0", {"seed": "0", "data": "digits"}, host="h", gpus="none"),
        run("seed=1", {"seed": "1", "data": "digits"}, host="h", gpus="none"),
    ]
    assert dashboard.columns(alike) == ["params.`seed`"]
    apart = [run("data=digits", {"data": "digits"}, host="h"), run("data=stl10", {"data": "stl10"}, host="i")]
    assert dashboard.columns(apart) == ["params.`data`", "tags.`host`", "attributes.`Dataset`"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("pn=both bank=1M", "pn=both bank=1M"),
        ("pn=negative bank=1M seed=1", "negative 1M seed=1"),
        ("bank.lr=3.0 schedule.warmup_epochs=2", "lr=3.0 warmup_epochs=2"),
        ("compile=true eval=[knn] precision=bf16", "compile=true eval=[knn] bf16"),
    ],
)
def test_names_are_as_short_as_the_table_shows_whole_where_they_can_be(name, shown):
    assert short(name) == shown


def test_a_sweep_is_called_by_what_it_varies():
    assert short_sweep("preset=demo seed=0,1,2", ["seed"]) == "seed=0,1,2"
    assert (
        short_sweep("preset=demo pn=none,both bank.lr=1,2,3,4 seed=0,1,2", ["bank.lr", "pn", "seed"])
        == "pn x lr x seed"
    )
    assert short_sweep("data=digits augmentation=digits seed=0,1", ["pn", "seed"]) == "pn x seed", (
        "a title is cut at 200 characters"
    )
    assert short_sweep("preset=demo", ["pn", "seed", "batch"]) == "preset=demo"


def test_no_two_runs_have_one_colour_and_those_that_have_one_keep_it():
    def coloured(number, colour):
        made = run("n", {}, **({"mlflow.runColor": colour} if colour else {}))
        made.info.run_id = str(number)
        return made

    first, second, *_ = itertools.islice(colours(), 1000)
    runs = [
        coloured(0, "#000000"),
        coloured(1, second),
        coloured(2, None),
        coloured(3, second),
        coloured(4, "#000000"),
        coloured(5, "#123456"),
    ]
    given = dashboard.recoloured(runs)
    assert given.keys() == {"2", "3"} and given["2"] == first and len({*given.values(), second, "#123456"}) == 4
    assert len(set(itertools.islice(colours(), 1000))) == 1000


def test_the_best_run_comes_first_and_counters_have_no_charts():
    view = dashboard.view([run("a", {"seed": "0"}, ["eval/knn20_top1", "eval/epochs", "train/loss"])])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`eval/knn20_top1`", False)
    assert [(chart["metricKey"], chart["deleted"]) for chart in view["compareRunCharts"]] == [("eval/epochs", True)]
    assert dashboard.view([])["orderByKey"] == "attributes.start_time"


def test_opening_it_sends_what_mlflow_lacks_and_saves_the_view_in_each_experiment(new_store, tmp_path):
    uri = new_store(tmp_path)
    for seed in (0, 1):
        tracker = LedgerTracker(system_seconds=0)
        tracker.start(
            tmp_path / "runs" / f"{seed}",
            params={"name": "study", "seed": seed},
            tags={},
            run_name=f"seed={seed}",
            state=None,
        )
        tracker.log(1, {"knn20_top1": 50.0 + seed}, kind="eval")
        tracker.finish("FINISHED", {})
    first = dashboard.update(tmp_path / "runs", uri, named=True)
    assert len(first) == 2 and all("sent 1 row of 1" in line for line in first)
    assert dashboard.update(tmp_path / "runs", uri, named=True) == []
    from mlflow import MlflowClient

    experiment = MlflowClient(uri).get_experiment_by_name("study")
    assert json.loads(experiment.tags["mlflow.sharedViewState.caco"])["selectedColumns"][0] == "params.`seed`"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    (line,) = dashboard.addresses(uri, "http://h:1")
    assert line.startswith(f"study: http://h:1/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey=caco")


def test_a_port_that_is_taken_gives_way_to_a_free_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert dashboard.free_port("127.0.0.1", port) not in (0, port)
    with pytest.raises(UserError, match="expected an address of this machine"):
        dashboard.free_port("203.0.113.1", 0)


def test_a_server_that_does_not_start_is_told_with_its_last_words(tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\necho no such database; exit 3\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(dashboard.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="mlflow server does not start; its last output: no such database"):
        with dashboard.server(f"sqlite:///{tmp_path}/mlflow.db", host="127.0.0.1", port=1):
            pass


def test_what_is_no_store_is_refused(capsys, store):
    with pytest.raises(SystemExit) as end:
        dashboard.main(["--uri", "file:///x"])
    assert end.value.code == 2 and "expected a server" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--port", "99999"], ["--port", "-1"], ["--every", "0"], ["--every", "nan"]])
def test_a_port_or_a_pause_that_cannot_be_is_refused(capsys, words):
    with pytest.raises(SystemExit) as end:
        dashboard.main(words)
    assert end.value.code == 2 and f"{words[0]}: expected" in capsys.readouterr().err
