"""caco.results shows runs as a table in the terminal: it selects, sorts and groups them over seeds, reads runs of every
version and state, and is fast and works without torch.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time

import pytest
from tiny import TINY

from caco import results
from caco.runs.directory import record_stop
from caco.tracking import comparison, recorded

SCORES = {(64, 0): 50.0, (64, 1): 54.0, (128, 0): 60.0, (128, 1): 70.0}


def write(folder, *, size=64, seed=0, score=None, summary=None, failure=None, status="FINISHED", method="caco"):
    """Write a run's directory with the files that the table reads, as training would."""
    folder.mkdir(parents=True)
    params = {"method": method, "bank": "tiny", "pn": "both", "eval": "['knn']",
    "eval.knn._target_": "caco.evals.knn.KNN", "bank.size": str(size), "seed": str(seed), "epochs": "2",
              "method._target_": "caco.methods.contrastive.Contrastive", "batch": "64", "data.root": f"/data/{seed}",
              "bank.seed": str(seed), "data.seed": "0",
              "weights": "null"}  # fmt: skip
    about = {
        "params": params,
        "tags": {},
        "status": status,
        "host": "elsewhere",
        "pid": 1,
        "process_start": "1",
        "run_name": "x",
    }
    (folder / "tracking.json").write_text(json.dumps(about))
    (folder / "config.yaml").write_text("seed: 0\n")
    if score is not None:
        summary = {"knn20_top1": score, "loss": 1.0, "steps": 12, "epochs": 2.0, **(summary or {})}
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    if failure:
        (folder / "failure.txt").write_text(failure)
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for (size, seed), score in SCORES.items():
        write(tmp_path / "runs" / f"{size}-{seed}", size=size, seed=seed, score=score)
    return tmp_path / "runs"


def shown(capsys, *arguments):
    results.main(["runs", *arguments])
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_it_shows_what_differs_and_the_results_and_nothing_that_all_share(runs, capsys):
    _, heads, _, *rows = shown(capsys)
    assert heads == ["bank.size", "seed", "k-NN", "(20)", "run"]
    assert rows[0] == ["128", "0", "60.00", "runs/128-0"] and len(rows) == 4


def test_over_seeds_a_row_is_mean_standard_deviation_and_number(runs, capsys):
    _, heads, _, *rows, note = shown(capsys, "--seeds", "--sort", "knn20_top1", "--reverse")
    assert heads == ["bank.size", "k-NN", "(20)", "n", "run"]
    assert rows[0][:5] == ["128", "65.00", "±", f"{statistics.stdev([60, 70]):.2f}", "2"]
    assert rows[1][:5] == ["64", "52.00", "±", f"{statistics.stdev([50, 54]):.2f}", "2"] and "standard" in note


def test_runs_are_chosen_and_sorted_by_settings_and_metrics(runs, capsys):
    assert [row[-1] for row in shown(capsys, "--where", "size=64", "--sort", "knn20_top1", "--reverse")[3:]] == [
        "runs/64-1",
        "runs/64-0",
    ]
    assert [row[-1] for row in shown(capsys, "--where", "knn20_top1>=60", "seed!=0")[3:]] == ["runs/128-1"]
    assert [row[0] for row in shown(capsys, "--columns", "knn20_top1", "--sort", "knn20_top1")[3:]] == [
        "50.00",
        "54.00",
        "60.00",
        "70.00",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--where", "sed=1"], "sed: no run here has such a setting or metric; did you mean seed"),
        (["--where", "seed"], "--where seed: expected KEY=VALUE"),
        (["--where", "seed<many"], "expected a number after <, got many"),
        (["--where", "seed=7"], "none of these 4 runs meets the conditions seed=7"),
        (["--columns", "k"], "k: no run here has"),
        (["--columns", ","], "--columns: expected names of settings and metrics, got ','"),
    ],
)
def test_what_cannot_be_is_refused(runs, capsys, arguments, expected):
    with pytest.raises(SystemExit) as error:
        results.main(["runs", *arguments])
    assert error.value.code == 2 and expected in capsys.readouterr().err


def test_links_that_lead_back_give_no_run_twice(runs, capsys):
    for name in ("up", "again", "once_more"):
        (runs / name).symlink_to("..")
    (runs / "latest").symlink_to("64-0")
    began = time.process_time()
    assert sum("64" in line for line in shown(capsys)) == 2
    assert time.process_time() - began < 5


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        results.main([str(tmp_path)])
    assert "expected a run's directory, or a folder of some" in capsys.readouterr().err


def test_csv_has_every_number_in_full_and_markdown_is_a_table(runs, capsys):
    results.main(["runs", "--format", "csv", "--seeds"])
    heads, *rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert heads == ["bank.size", "knn20_top1", "knn20_top1_sd", "n", "state", "run"]
    assert float(rows[0][1]) == 65.0 and float(rows[0][2]) == pytest.approx(
        statistics.stdev([60, 70]), abs=0, rel=1e-15
    )
    assert rows[0][-1] == "runs/128-0 runs/128-1"
    results.main(["runs", "--format", "markdown"])
    assert "| 128 | 1 | 70.00 | runs/128-1 |" in capsys.readouterr().out.splitlines()


def test_runs_that_have_not_finished_stand_with_their_state_and_its_reason(runs, capsys):
    write(runs / "a", status="FAILED", failure="the loss is nan at step 3", seed=5)
    write(runs / "b", status="KILLED", seed=6)
    lacking = [{"step": 12, "evaluator": "knn", "message": "eval.knn failed: no room"}]
    write(runs / "c", score=1.0, summary={"failed_evaluations": lacking}, seed=7)
    (runs / "d").mkdir()
    for name in ("config.yaml", "environment.json"):
        (runs / "d" / name).write_text("{}")
    write(runs / "e", seed=8)
    (runs / "e" / "summary.json").write_text("{")
    write(runs / "f", status="KILLED", seed=9)
    record_stop(runs / "f", "stopped by SIGTERM after step 3 of 12, which is saved")
    rows = {row[-1]: row[-2] for row in shown(capsys, "--columns", "seed") if row[-1].startswith("runs/")}
    assert {name: rows[f"runs/{name}"] for name in "abcdef"} == {
        "a": "failed", "b": "killed", "c": "incomplete", "d": "begun", "e": "damaged",
        "f": "stopped",
    }  # fmt: skip
    assert rows["runs/64-0"] == "finished"
    results.main(["runs"])
    out = capsys.readouterr().out
    assert "runs/a: the loss is nan at step 3" in out and "runs/c: eval.knn failed: no room" in out
    told = "stopped by SIGTERM after step 3 of 12, which is saved; the same command goes on from there"
    assert f"runs/f: {told}" in out


def test_a_setting_that_follows_from_one_that_is_shown_is_left_out_and_paths_always_are(tmp_path):
    for seed, method in enumerate(("byol", "caco", "byol", "caco")):
        write(tmp_path / str(seed), seed=seed // 2, method=method, size={"byol": 1, "caco": 2}[method], score=1.0)
    assert comparison.differing([recorded.outline(folder) for folder in recorded.directories([tmp_path])]) == [
        "method",
        "seed",
    ]


def test_runs_of_earlier_versions_show_by_today_s_names(repo_root, capsys):
    results.main(
        [
            str(repo_root / "tests" / "old_runs"),
            "--format",
            "csv",
            "--columns",
            "method.warm_start_passes,knn20_20pct_top1,knn20_top1",
        ]
    )
    heads, *rows = capsys.readouterr().out.splitlines()
    by_run = {row.rpartition("/")[2]: row.split(",") for row in rows}
    whole = recorded.read(repo_root / "tests/old_runs/old/tiny")
    assert by_run["tiny"][:3] == ["8", repr(whole.summary["knn20_20pct_top1"]), repr(whole.summary["knn20_top1"])]
    assert len(by_run) == 2 and heads.startswith("method.warm_start_passes,knn20_20pct_top1")


def test_the_configuration_that_a_run_was_told_is_the_one_that_it_recorded(tmp_path):
    """The settings in tracking.json, which the table reads, equal those in config.yaml."""
    import tiny

    tiny.train(tmp_path, "max_steps=1", "eval=[]")
    told = recorded.outline(tmp_path)
    (tmp_path / "tracking.json").unlink()
    read = recorded.outline(tmp_path)
    assert told.settings == read.settings and told.summary == read.summary and told.state == read.state == "finished"


def test_a_thousand_runs_take_seconds_and_no_torch(tmp_path):
    one = write(tmp_path / "runs" / "one", score=50.0)
    for number in range(999):
        shutil.copytree(one, tmp_path / "runs" / str(number))
    program = (
        "import sys; from caco import results; results.main(['runs']); assert 'torch' not in sys.modules and 'mlflow'"
        " not in sys.modules"
    )
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    assert time.monotonic() - begun < 15, "1.8 s were measured; a busy machine may take longer"


@pytest.mark.long
def test_a_sweep_ends_with_its_table(tmp_path):
    from processes import Process, caco_train

    command = [
        "-m",
        *TINY,
        "max_steps=1",
        "eval=[]",
        "bank.size=64,128",
        "seed=0,1",
        f"hydra.sweep.dir={tmp_path}/sweep",
        "hydra.sweep.subdir=${bank.size}-${seed}",
    ]
    code, out, err = Process(caco_train, *command).end()
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert ["bank.size", "seed", "run"] in lines and ["128", "1", f"{tmp_path}/sweep/128-1"] in lines, out
    assert f"python -m caco.results {tmp_path}/sweep" in out
