"""`python -m analysis.table`: statistics are checked by hand, missing results are named, and nothing else is shown as a
result.
"""

import csv
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from analysis import table
from analysis.results import Gain, Spread, device_hours_per_epoch, find, from_mlflow, from_records, train_hours
from caco.errors import UserError
from experiments.tables import load_scale, load_table

ROOT = Path(__file__).parents[2]
SMOKE = load_scale("smoke")


@pytest.fixture
def here(command):
    """main() in an empty directory: `here("7", "--scale", "smoke")` returns (exit code, output, errors)."""
    return command(table)


def cells(sheet, label):
    """{(group, header): text} of a row."""
    groups = [name for name, size in sheet.groups for _ in range(size)]
    row = next(row for row in sheet.rows if row[0] == label)
    named = {}
    for group, header, text in zip(groups, sheet.headers, row, strict=True):
        named.setdefault((group, header), text)
    return named


def made(results):
    about = load_table("7")
    return table.sheet(about, SMOKE, find(about, SMOKE, results))


# The statistics.


def test_mean_and_sample_standard_deviation():
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(2.0, 1.0, 3)
    assert Spread.of([5.0]) == Spread(5.0, None, 1)
    assert Spread.of([]) is None


def test_a_gain_is_taken_seed_by_seed():
    """The differences 1, 2, 3 give t = 2 / (1 / sqrt(3)) with two degrees of freedom."""
    ours, reference = {0: 11.0, 1: 22.0, 2: 33.0, 5: 99.0}, {2: 30.0, 1: 20.0, 0: 10.0, 7: 0.0}
    gain = Gain.of(ours, reference)
    assert gain.spread == Spread(2.0, 1.0, 3)
    assert gain.p == pytest.approx(2 * stats.t.sf(2 * 3**0.5, 2), rel=1e-12)
    assert gain.p == pytest.approx(stats.ttest_rel([11, 22, 33], [10, 20, 30]).pvalue, rel=1e-12)


def test_without_common_seeds_there_is_no_gain_and_without_spread_no_test():
    assert Gain.of({0: 1.0}, {1: 1.0}) is None
    assert Gain.of({0: 2.0}, {0: 1.0}) == Gain(Spread(1.0, None, 1), None)
    assert Gain.of({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).p is None
    assert Gain.of({0: 6.0, 1: 9.0}, {0: 2.0, 1: 3.0}, ratio=True) == Gain(Spread(3.0, 0.0, 2), None)


def test_hours_are_images_over_the_rate_and_the_warm_start_is_no_part_of_an_epoch(result):
    """50 steps of 64 images at 3,600 images per second; 8 of them fill 512 rows, and two processes train together."""
    one = result("both", 0, knn=50.0)
    assert one.config["bank.size"] == 512 and one.summary["steps"] == 50
    assert train_hours(one) == pytest.approx(50 * 64 / 3600 / 3600, rel=1e-12)
    assert device_hours_per_epoch(one) == pytest.approx(42 * 64 / 3600 / 3600 * 2 / 2, rel=1e-12)
    old = dataclasses.replace(one, summary={k: v for k, v in one.summary.items() if k != "processes"})
    assert old.value("device_hours_per_epoch") is None


@pytest.mark.parametrize("rate", [0.0, None])
def test_of_a_run_whose_rate_is_unknown_so_are_the_hours(result, rate):
    """An older version recorded a rate of 0 for a run that was killed between its last save and its summary."""
    one = result("both", 0, knn=50.0, rate=rate)
    if rate is None:
        del one.summary["images_per_second"]
    assert [one.value(metric) for metric in ("images_per_second", "train_hours", "device_hours_per_epoch")] == [
        None
    ] * 3
    assert one.value("knn20_top1") == 50.0


# The table.


def test_the_papers_numbers_and_ours_stand_side_by_side(result):
    sheet = made(
        [result(row, seed, knn=knn + seed) for row, knn in (("none", 40.0), ("both", 42.5)) for seed in (0, 1)]
    )
    none, both = cells(sheet, "None"), cells(sheet, "Positive+Negative")
    assert (none["paper's results", "Top-1"], both["paper's results", "Top-1"], both["paper's results", "gain"]) == (
        "70.2",
        "71.3",
        "+1.1",
    )
    assert (
        none["our results, scale smoke", "k-NN (20)"] == "40.50 ± 0.71"
        and none["our results, scale smoke", "gain"] == "ref."
    )
    assert (
        both["our results, scale smoke", "k-NN (20)"] == "43.00 ± 0.71"
        and both["our results, scale smoke", "gain"] == "+2.50 ± 0.00"
    )
    assert both["our results, scale smoke", "n"] == "2"
    assert not any("paper's" in header for header in sheet.headers)
    assert any("not the paper's" in note for note in sheet.notes)


def test_what_is_missing_is_called_so_and_comes_with_its_command(result):
    sheet = made([result("none", 0, knn=40.0)])
    assert cells(sheet, "Positive+Negative")["our results, scale smoke", "k-NN (20)"] == "missing"
    assert "both, seeds 0, 1: python -m experiments.run table7 scale=smoke rows=both seed=0,1" in sheet.missing
    assert "none, seed 1: python -m experiments.run table7 scale=smoke rows=none seed=1" in sheet.missing


def test_no_cell_of_ours_is_ever_empty(result):
    for results in ([], [result("positive", 0, knn=40.0)], [result("none", 1, knn=40.0), result("both", 0, knn=41.0)]):
        assert all(cell for row in made(results).rows for cell in row)


def test_a_gain_without_the_reference_is_none(result):
    assert (
        cells(made([result("both", 0, knn=41.0)]), "Positive+Negative")["our results, scale smoke", "gain"]
        == "no reference"
    )


def test_seeds_beyond_those_asked_for_count(result):
    sheet = made([result("both", seed, knn=40.0 + seed) for seed in (0, 1, 7)])
    assert cells(sheet, "Positive+Negative")["our results, scale smoke", "n"] == "3"


def test_a_run_that_was_made_for_another_table_counts_by_its_hash(result):
    other = result("both", 0, knn=40.0, label={"table": "table1", "row": "caco_1024", "scale": "smoke"})
    assert cells(made([other]), "Positive+Negative")["our results, scale smoke", "k-NN (20)"] == "40.00"


def test_a_run_of_another_configuration_is_refused_with_what_differs(result):
    one = result("both", 0, knn=99.0)
    old = dataclasses.replace(one, hash="0000000000", config={**one.config, "batch": 32})
    sheet = made([old])
    assert cells(sheet, "Positive+Negative")["our results, scale smoke", "k-NN (20)"] == "missing"
    (line,) = [line for line in sheet.missing if "another configuration" in line]
    assert "ours.json" in line and "0000000000" in line and "batch: there 32, here 64" in line


def test_rows_on_different_images_are_shouted_about(result):
    sheet = made([result("none", 0, knn=40.0), result("both", 0, knn=41.0, digest="d2")])
    assert any(note.startswith("These runs used different images") for note in sheet.notes)


def test_what_was_not_measured_is_no_zero(result):
    one = result("both", 0, knn=41.0)
    sheet = made([dataclasses.replace(one, summary={k: v for k, v in one.summary.items() if k != "probe_top1"})])
    assert cells(sheet, "Positive+Negative")["our results, scale smoke", "probe"] == "not measured"
    assert f"both, seed 0, probe_top1: python -m caco.evaluate run=runs/smoke/{one.name} eval=[probe]" in sheet.missing


def test_only_at_the_papers_own_scale_is_ours_subtracted_from_the_papers(table7, result):
    paper = dataclasses.replace(SMOKE, same_as_paper=True)
    about = load_table("7")
    sheet = table.sheet(about, paper, find(about, SMOKE, [result("none", 0, knn=70.0)]))
    assert cells(sheet, "None")["our results, scale smoke", "ours - paper's"] == "-0.20"
    assert [load_scale(name).same_as_paper for name in ("paper", "mini", "cifar10", "imagenet100")] == [
        True,
        False,
        False,
        False,
    ]


def test_methods_that_caco_lacks_are_cited():
    mini, about = load_scale("mini"), load_table("1")
    about.rows["instdisc"].run = None
    sheet = table.sheet(about, mini, find(about, mini, [], rows=["instdisc", "mocov2"]))
    assert cells(sheet, "InstDisc")["our results, scale mini", "k-NN (20)"] == "cited"
    sheet = table.sheet(load_table("3"), mini, find(load_table("3"), mini, []))
    assert {cells(sheet, label)["our results, scale mini", "k-NN (20)"] for label in ("DINO", "CaCo")} == {
        "not at this scale"
    }
    assert any("no multi-crop" in note for note in sheet.notes)


def test_what_others_published_at_a_scale_stands_in_a_column_of_theirs():
    lightly, about = load_scale("cifar10_lightly"), load_table("1")
    found = find(about, lightly, [], rows=["simclr", "byol", "caco_256"])
    sheet = table.sheet(about, lightly, found)
    assert [
        cells(sheet, label)["published by others", "lightly's k-NN, best epoch"] for label in ("SimCLR", "BYOL", "CaCo")
    ] == [
        "84.7",
        "86.9",
        "-",
    ]
    assert "Published by others: lightly's k-NN, best epoch, for the same recipe as this scale's." in sheet.notes
    assert "84.7" in table.as_text(sheet) and "published by others: lightly's k-NN, best epoch" in table.as_markdown(
        sheet
    )
    rows = csv.DictReader(io.StringIO(table.as_csv(about, lightly, found)))
    assert {(row["row"], row["theirs"]) for row in rows} == {("simclr", "84.7"), ("byol", "86.9"), ("caco_256", "")}
    times = table.sheet(load_table("4"), lightly, find(load_table("4"), lightly, [], rows=["mocov2"]))
    assert not any("published by others" in group for group, size in times.groups if size), (
        "others published accuracies, not hours"
    )


def test_a_table_of_which_the_paper_has_no_number_has_no_column_of_the_papers():
    about = load_table("rivals")
    for scale in (SMOKE, dataclasses.replace(SMOKE, same_as_paper=True)):
        sheet = table.sheet(about, scale, find(about, scale, [], rows=["caco", "barlow"]))
        assert all(len(row) == len(sheet.headers) for row in sheet.rows)
        assert not any(
            "paper's" in words
            for words in (*sheet.headers, *(group for group, size in sheet.groups if size), *sheet.notes)
        )
    assert cells(sheet, "Barlow Twins")["our results, scale smoke", "k-NN (20)"] == "missing"
    assert any(note.startswith("Barlow Twins: its authors report") for note in sheet.notes)


def test_times_are_compared_as_ratios():
    about = load_table("4")
    sheet = table.sheet(about, load_scale("mini"), find(about, load_scale("mini"), [], rows=["mocov2", "swav"]))
    assert cells(sheet, "SwAV")["paper's results", "ratio"] == "0.94"  # 50 / 53


# The formats.


@pytest.fixture
def record_file(tmp_path, result, record_of):
    path = tmp_path / "theirs.json"
    runs = [result(row, seed, knn=40.0 + seed) for row in ("none", "both") for seed in (0, 1)]
    path.write_text(json.dumps(record_of(runs)))
    return str(path)


def test_every_format_holds_the_numbers(here, record_file):
    shown = {
        name: here("7", "--scale", "smoke", "--records", record_file, "--format", name)[1] for name in table.FORMATS
    }
    assert "40.50 ± 0.71" in shown["text"] and "40.50 ± 0.71" in shown["markdown"]
    assert r"40.50 $\pm$ 0.71" in shown["latex"] and r"\begin{tabular}" in shown["latex"]
    pipes = [line.count("|") for line in shown["markdown"].splitlines() if line.startswith("|")]
    assert len(pipes) == 2 + 4 and len(set(pipes)) == 1
    rows = list(csv.DictReader(io.StringIO(shown["csv"])))
    (both,) = [row for row in rows if row["row"] == "both" and row["metric"] == "knn20_top1"]
    assert (float(both["mean"]), both["n"], both["published"], float(both["gain"])) == (40.5, "2", "71.3", 0.0)
    (negative,) = [row for row in rows if row["row"] == "negative" and row["metric"] == "knn20_top1"]
    assert (negative["mean"], negative["state"], negative["missing_seeds"]) == ("", "missing", "0 1")


def test_latex_is_escaped():
    assert table._tex("a_b 5% & c#1 ± {x}") == r"a\_b 5\% \& c\#1 $\pm$ \{x\}"


def test_a_table_from_records_needs_no_torch(record_file, tmp_path):
    program = (
        "import sys; from analysis import table; sys.argv = ['table', '7', '--scale', 'smoke', '--records',"
        " sys.argv[1]]\ntable.main(); print([name for name in ('torch', 'matplotlib', 'mlflow') if name in"
        " sys.modules])"
    )
    command = [sys.executable, "-c", program, record_file]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "40.50 ± 0.71" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_without_any_result_the_papers_numbers_are_shown_and_ours_are_missing(here, monkeypatch):
    monkeypatch.setattr("analysis.results.RECORDS", Path("nowhere"))
    code, shown, _ = here("7")
    assert code == 0 and "71.3" in shown and shown.count("missing") >= 4
    assert "python -m experiments.run table7 scale=paper rows=both seed=0 data.root=PATH" in shown


# Sources.


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["9"], "table9: no such table"),
        (["7", "--scale", "huge"], "huge: no such scale"),
        (["7", "--scale", "smoke", "--rows", "bth"], "bth: no such row; did you mean both?"),
        (["7", "--scale", "smoke", "--records", "nowhere.json"], "nowhere.json: there is no such record"),
        (["7", "--scale", "smoke", "--mlflow", "sqlite:///nowhere.db"], "nowhere.db: there is no such file"),
    ],
)
def test_a_mistake_is_refused(here, arguments, words):
    code, shown, errors = here(*arguments)
    assert (code, shown) == (2, "") and words in errors


def test_a_record_without_the_runs_asked_for_is_refused_with_what_makes_them(here, record_file):
    code, _, errors = here("6", "--scale", "smoke", "--records", record_file, "--rows", "simclr")
    assert code == 2
    assert (
        "no run of table6 at scale smoke among its 4" in errors
        and "python -m experiments.run table6 scale=smoke" in errors
    )


def test_an_mlflow_store_gives_the_same_result_as_the_record(trained, tmp_path):
    from experiments.record import gather

    run_dir, uri = trained
    (tmp_path / "record.json").write_text(json.dumps(gather([run_dir])))
    (kept,), _ = from_records([tmp_path / "record.json"])
    (stored,) = from_mlflow(uri, "tiny", curves=True)
    assert (stored.hash, stored.seed) == (kept.hash, kept.seed)
    assert {key: stored.config[key] for key in kept.config if key in stored.config} == kept.config
    assert stored.environment == kept.environment
    assert {key: stored.summary[key] for key in kept.summary if key != "config_hash"} == pytest.approx(
        {key: value for key, value in kept.summary.items() if key != "config_hash"}
    )
    assert len(stored.curve) == len(kept.curve)
    for theirs, ours in zip(stored.curve, sorted(kept.curve, key=lambda row: (row["step"], row["kind"])), strict=True):
        assert {key: theirs[key] for key in ours if key != "phase"} == {
            key: ours[key] for key in ours if key != "phase"
        }


def test_a_store_without_the_runs_asked_for_says_what_it_has_and_what_makes_them(trained):
    _, uri = trained
    with pytest.raises(UserError, match="no experiment mini; there are: Default, tiny"):
        from_mlflow(uri, "mini")


def test_a_store_with_other_runs_says_what_makes_those_asked_for(trained, here):
    _, uri = trained
    code, _, errors = here("7", "--scale", "smoke", "--mlflow", uri, "--experiment", "tiny")
    assert code == 2
    assert f"python -m experiments.run table7 scale=smoke tracking=mlflow tracking.uri={uri}" in errors
