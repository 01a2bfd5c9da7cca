"""Everything that reads runs can read those made by commit a06a4e7 (tests/old_runs); only resuming them is refused.

That version used the name `knn_top1` for k-NN with any protocol, and a later evaluation overwrote the value from
training.
"""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from caco import evaluate, export
from caco import train as caco_train
from caco.config.composition import compose, job_config
from caco.runs.directory import open_run
from caco.runs.files import read_json
from caco.runs.identity import run_hash
from caco.tracking import recorded
from caco.tracking.ledger import read_rows

OLD = Path(__file__).parent / "old_runs"
TINY, BOTH = Path("runs/old/tiny"), Path("runs/smoke/table7-both-seed0-e6e4f8f369")
# k-NN over 20 % of each class; over all images, evaluated later
TRAINED, EVALUATED = 30.22670025188917, 40.302267002518896


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """A module's main() in a folder with a copy of the old runs in runs/; returns (exit code, output, errors)."""
    shutil.copytree(OLD, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("caco.runs.directory._locks", {})

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        try:
            code = module.main() or 0
        except SystemExit as end:
            code = end.code
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def test_they_are_what_that_version_wrote():
    assert {"knn_top1": EVALUATED, "untrained/knn_top1": 18.89168765743073}.items() <= read_json(
        OLD / "old/tiny/summary.json"
    ).items()
    assert {row["kind"] for row in read_rows(OLD / "old/tiny/ledger.jsonl")[0]} == {"filling", "train", "epoch", "eval"}
    assert (OLD / "old/tiny/config.yaml").read_text().count("caco.optimizers.sgd") == 1
    assert sum(file.stat().st_size for file in OLD.rglob("*") if file.is_file()) < 200_000


def test_their_numbers_have_todays_names_and_training_s_is_there_again():
    run = recorded.read(OLD / "old" / "tiny")
    assert (run.summary["knn20_20pct_top1"], run.summary["knn20_top1"]) == (TRAINED, EVALUATED)
    assert not [
        name for row in [*run.rows, run.summary] for name in row if name.endswith("knn_top1") or name == "momentum"
    ]
    assert [row["knn20_20pct_top1"] for row in run.rows if row["kind"] == "eval" and "epochs" in row][-1] == TRAINED
    assert {row["kind"] for row in run.rows} == {"warm_start", "train", "epoch", "eval"}
    assert run.config["method"]["warm_start_passes"] == 8 and "filling_passes" not in run.config["bank"]


def test_tables_and_figures_count_them(command):
    from analysis import figure, table

    code, out, _ = command(table, "7", "--scale", "smoke")
    none, both = (
        next(line.split() for line in out.splitlines() if line.startswith(name))
        for name in ("None", "Positive+Negative")
    )
    assert code == 0 and none[-7:] == ["87.91", "ref.", "-", "92.44", "ref.", "-", "1"]
    assert both[-7:] == ["81.86", "-6.05", "-", "89.92", "-2.52", "-", "1"]
    assert command(figure, "4", "--scale", "smoke")[0] == 0
    rows = Path("figures/smoke-table7-figure-4.csv").read_text().splitlines()
    assert len([row for row in rows if row.startswith("both,knn20_top1,")]) == 3, (
        "expected values before the first epoch and after each of two"
    )


def test_experiments_do_not_train_them_again(command):
    from experiments import run

    code, out, _ = command(run, "table7", "scale=smoke", "rows=both", "seed=0", "--dry-run")
    assert (code, out) == (0, "# table7/both seed 0: recorded\n")
    shutil.rmtree(BOTH)
    assert command(run, "table7", "scale=smoke", "rows=both", "seed=0", "--dry-run")[1].startswith(
        "# table7/both seed 0: to do\n"
    )


def test_a_page_and_a_record_hold_them(command):
    from analysis import report
    from experiments import record

    assert command(report, "--scale", "smoke", "--tables", "7")[:2] == (0, "smoke.html\n")
    assert "<th>k-NN (20)</th>" in Path("smoke.html").read_text()
    assert command(report, "--sweep", "runs/old", "--out", "sweep.html")[0] == 0
    page = Path("sweep.html").read_text()
    assert "k-NN (20 of 20 %)" in page and "30.23" in page and "40.30" in page
    assert command(record, str(TINY), "--into", "record.json")[0] == 0
    (run,) = record.read(Path("record.json"))
    assert (
        run["summary"]["knn20_20pct_top1"] == TRAINED
        and run["summary"]["config_hash"] == run["config_hash"] != "cad3a8ba00"
    )
    told = record.merge([record.read(Path("record.json")), record.read(Path("record.json"))])
    assert told == ([run], [])


def test_a_picture_and_the_figures_of_a_run_are_drawn(command):
    from analysis import picture

    assert command(picture, str(TINY)) == (0, f"{TINY / 'picture.png'}\n", "")
    assert (TINY / "picture.png").stat().st_size > 50_000


@pytest.mark.long
def test_so_are_the_figures_of_a_run(command):
    from analysis import figure

    for name in ("3", "5"):
        assert command(figure, name, "--run", str(TINY), "--images", "200")[0] == 0


def test_an_evaluation_gives_training_s_number_by_training_s_name_and_another_protocol_s_beside_it(command):
    before = recorded.read(TINY)
    code, out, err = command(evaluate, f"run={TINY}", "eval=[knn]")
    assert (code, out.split(), err) == (0, ["knn20_20pct_top1", "30.2267"], "")
    assert recorded.read(TINY) == before, "the evaluation must measure nothing again"
    code, out, _ = command(evaluate, f"run={TINY}", "eval=[knn]", "eval.knn.k=5")
    after = recorded.read(TINY).summary
    assert code == 0 and out.split()[0] == "knn5_20pct_top1"
    assert after == {**before.summary, "knn5_20pct_top1": after["knn5_20pct_top1"]}


def test_its_weights_are_exported_with_what_they_gave(command):
    assert command(export, f"run={TINY}", "to=exported")[:2] == (0, "exported/model.safetensors\nexported/README.md\n")
    card = Path("exported/README.md").read_text()
    assert "| knn20_20pct_top1 | 30.23 |\n| knn20_top1 | 40.30 |" in card and "run `tiny`, step 50" in card


def test_mlflow_and_the_dashboard_get_todays_names(command):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from analysis import table
    from caco.tracking import dashboard, sync
    from caco.tracking.store import import_mlflow

    import_mlflow()
    from mlflow import MlflowClient

    uri = f"sqlite:///{Path.cwd()}/mlflow.db"
    code, out, _ = command(sync, "runs", "--uri", uri)
    assert code == 0 and out.count("(FINISHED, run ") == 2
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("old").experiment_id])
    (last,) = (
        point for point in client.get_metric_history(run.info.run_id, "eval/knn20_20pct_top1") if point.step == 50
    )
    assert (last.value, run.data.metrics["final/knn20_20pct_top1"], run.data.metrics["final/knn20_top1"]) == (
        TRAINED,
        TRAINED,
        EVALUATED,
    )
    assert not [name for name in run.data.metrics if name.endswith("/knn_top1") or name.startswith("filling/")]
    assert run.data.params["method.warm_start_passes"] == "8" and run.data.params["bank"] == "tiny"
    assert "metrics.`eval/knn20_20pct_top1`" in dashboard.columns([run])
    assert "complete" in command(sync, str(TINY))[1], "the run must not be sent again"
    code, out, _ = command(table, "7", "--scale", "smoke", "--mlflow", uri)
    assert code == 0 and "81.86" in out


def test_a_store_that_the_old_version_filled_is_read_and_gets_todays_names_besides():
    """The MLflow run has nothing but what the old version logged."""
    from types import SimpleNamespace

    from analysis import results
    from caco.tracking.watermark import Watermark

    about, summary = (read_json(OLD / BOTH.relative_to("runs") / name) for name in ("tracking.json", "summary.json"))
    metrics = {f"final/{name}": value for name, value in summary.items() if isinstance(value, int | float)}
    data = SimpleNamespace(params=about["params"], tags=about["tags"], metrics=metrics)
    one = results._of_mlflow(
        None, SimpleNamespace(data=data, info=SimpleNamespace(run_name="x", run_id="1")), "sqlite:///x", False
    )
    assert one.summary["knn20_top1"] == summary["knn_top1"] and one.config["method.warm_start_momentum"] == 0.999
    record = read_json(OLD / "smoke" / "record.json")["runs"]
    assert one.hash == recorded.Names.of(OLD / BOTH.relative_to("runs")).with_hash(summary)["config_hash"]
    assert one.hash not in [run["config_hash"] for run in record], "the record must have today's hashes"

    mark = Watermark(run_id="1", sent=10, attempted=10)
    mark.todays_names(OLD / BOTH.relative_to("runs"))
    assert (mark.sent, mark.has_todays_names) == (0, True), "every row must be sent once more"
    mark.sent = 10
    mark.todays_names(OLD / BOTH.relative_to("runs"))
    assert mark.sent == 10


def commanded(run_dir):
    """The overrides that make the same run with today's version."""
    words = shlex.split(read_json(run_dir / "environment.json")["command"])[3:]
    return [word.replace("bank_learning.filling_passes", "warm_start.passes") for word in words]


def test_going_on_with_one_is_refused_in_a_sentence_that_says_whose_it_is_and_what_to_do(command, tmp_path):
    (TINY / "summary.json").unlink()  # as if the run had been killed after its last save
    code, _, err = command(caco_train, *commanded(TINY))
    assert (
        code == 2
        and err
        == f"caco: {tmp_path / TINY} holds a run of an earlier version of caco (commit a06a4e77ef); this version"
        " can show, evaluate and export it but not continue it: finish it with that version, or choose another"
        " hydra.run.dir to train anew\n"
    )


def test_the_same_command_says_which_run_it_does_not_go_on_with(command, tmp_path, capsys):
    old = TINY.rename(TINY.with_name("words-cad3a8ba00")).absolute()
    cfg = job_config(compose(commanded(old)))
    new = old.with_name(f"words-{run_hash(cfg)}")
    open_run(new, cfg)
    told = (
        f"caco: {old} is the same run made by an earlier version of caco (commit a06a4e77ef), which cannot be"
        f" continued: it starts anew in {new}\n"
    )
    assert capsys.readouterr().err == told
    open_run(new, cfg)
    cfg.seed = 1
    open_run(old.with_name("words-another"), cfg)
    assert capsys.readouterr().err == "", "there must be no message when the run resumes, nor for another run"
