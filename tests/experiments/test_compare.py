"""`python -m experiments.compare`: when the runs of two commits count as equal, how differences are reported, and what
a renaming may change.
"""

import json
import math
import re
import shutil
import struct
import subprocess
import threading

import pytest
import torch

from caco.config import composition, validation
from experiments.compare import __main__ as command
from experiments.compare import differences, running
from experiments.compare.cases import Case, cases_of, cut_settings, translated
from experiments.compare.refusal import Refused
from experiments.compare.trees import Side, build_native, check_out

ROWS = [
    {"kind": "eval", "step": 0, "time": 1.0, "epochs": 0, "knn_top1": 50.0},
    {"kind": "warm_start", "step": 1, "time": 2.0, "loss": 4.5, "images_per_second": 100.0},
    {"kind": "train", "step": 2, "time": 3.0, "loss": 4.25, "bank/rows_used": 12.5, "images_per_second": 100.0},
    {"kind": "train", "step": 3, "time": 4.0, "loss": 4.125, "bank/rows_used": 25.0, "images_per_second": 100.0},
]
STATE = {
    "config_hash": "0123456789",
    "method": {"encoder.weight": torch.arange(4.0), "bank.rows.weight": torch.ones(2, 2),
    "bank.rows.velocity": torch.zeros(2)},
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}, 1: {"momentum_buffer": torch.zeros(3)}},
    "param_groups": [{"lr": 0.1}]},
    "random": [{"cpu": torch.arange(3, dtype=torch.uint8)}],
}  # fmt: skip
SUMMARY = {"knn_top1": 60.0, "steps": 3, "images_per_second": 100.0, "config_hash": "0123456789"}


def copied(state):
    return {key: copied(value) if isinstance(value, dict) else value for key, value in state.items()}


def change(kind, name, value):
    """Change a value in every row of a kind."""
    return [{**row, name: value} if row["kind"] == kind else row for row in ROWS]


@pytest.fixture
def result(tmp_path):
    """result(rows=, state=, summary=, ...) compares the run above with a copy in which these parts are replaced."""

    def left(name, rows, state, summary, names):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        torch.save(state, folder / "checkpoints" / "step_000000003.pt")
        (folder / "summary.json").write_text(json.dumps(summary))
        return differences.read_run(folder, names)

    def compared(*, rows=ROWS, state=STATE, summary=SUMMARY, renamed=(), ignored=()):
        base = left("base", ROWS, STATE, SUMMARY, differences.Names(command.renaming(list(renamed)), list(ignored)))
        head = left("head", rows, state, summary, differences.Names(ignored=list(ignored)))
        return differences.compare("case", base, head)

    return compared


def next_float32(x):
    return struct.unpack("<f", struct.pack("<i", struct.unpack("<i", struct.pack("<f", x))[0] + 1))[0]


def test_runs_that_differ_in_times_rates_and_hashes_alone_are_equal(result):
    rows = [row | {"time": 9.0} | ({"images_per_second": 7.0} if "loss" in row else {}) for row in ROWS]
    state = copied(STATE) | {"config_hash": "abcdef0123"}
    found = result(rows=rows, state=state, summary=SUMMARY | {"images_per_second": 1.0, "config_hash": "abcdef0123"})
    assert (found.verdict, found.rows, found.tensors, found.metrics) == ("equal", 4, 6, 2)


def test_one_unit_in_the_last_place_of_one_value_is_found_and_said(result):
    """The difference at the earliest step is reported first, in whatever order the rows are."""
    rows = change("train", "loss", 4.5)
    rows[1] = ROWS[1] | {"loss": next_float32(4.5)}
    found = result(rows=[rows[3], rows[1], rows[2], rows[0]])
    assert found.verdict == "differs"
    assert found.differences[0] == "step 1, warm_start: loss 4.5 | 4.50000048 (1 ulp of float32)"
    assert found.differing == {"rows": 3, "tensors": 0, "metrics": 0}
    assert "differs: first step 1" in differences.table([found])


def test_one_element_of_one_tensor_is_found_and_said(result):
    state = copied(STATE)
    state["method"]["encoder.weight"] = torch.tensor([0.0, 1.0, 2.0, next_float32(3.0)])
    found = result(state=state)
    assert found.differences == [
        "checkpoint: method.encoder.weight element 3 3 | 3.00000024 (1 ulp of float32), 1 of 4 elements"
    ]


@pytest.mark.parametrize("changed", [torch.zeros(2, dtype=torch.float64), torch.zeros(3), -torch.zeros(2)])
def test_another_type_shape_or_sign_of_zero_is_a_difference(result, changed):
    state = copied(STATE)
    state["method"]["bank.rows.velocity"] = changed
    (difference,) = result(state=state).differences
    assert difference.startswith("checkpoint: method.bank.rows.velocity ")


def test_a_metric_of_the_summary_is_compared(result):
    assert result(summary=SUMMARY | {"knn_top1": 61.0}).differences == ["summary: knn_top1 60 | 61 (relative 1.6e-02)"]


def test_not_a_number_is_itself_and_zero_is_not_minus_zero():
    assert differences.same(math.nan, math.nan) and differences.same(1, 1.0)
    assert not differences.same(0.0, -0.0)
    assert differences.distance(0.0, -0.0) == "the sign of zero"
    assert differences.distance(0.1, math.nextafter(0.1, 1)) == "1 ulp of float64"
    assert differences.distance(1.0, 2.0) == "relative 5.0e-01"
    assert differences.distance(1.0, math.nan) == "not finite"


def test_a_renaming_in_ledger_checkpoint_and_summary_is_shown_to_be_equal(result, tmp_path):
    kinds, metrics = {"warm_start": "warm up"}, {"knn_top1": "knn20_top1", "bank/rows_used": "rows_used"}
    rows = [{metrics.get(k, k): kinds.get(v, v) if k == "kind" else v for k, v in row.items()} for row in ROWS]
    state = copied(STATE)
    state["method"] = {name.replace("bank.rows.", "rows."): value for name, value in STATE["method"].items()}
    summary = {metrics.get(k, k): v for k, v in SUMMARY.items()}
    rules = ["knn_top1=knn20_top1", r"bank/(.*)=\1", r"bank\.(rows\..*)=\1"]
    (tmp_path / "renamed").write_text("# kinds of rows\n\nwarm_start = warm up\n")
    changed = {"rows": rows, "state": state, "summary": summary}
    assert result(**changed, renamed=[*rules, str(tmp_path / "renamed")]).verdict == "equal"
    shutil.rmtree(tmp_path / "base"), shutil.rmtree(tmp_path / "head")
    found = result(**changed)
    assert found.verdict == "equal in what both have"
    assert found.only_base == [
        "row warm_start of step 1", "eval: knn_top1", "train: bank/rows_used", "tensor method.bank.rows.weight",
        "tensor method.bank.rows.velocity", "summary: knn_top1",
    ]  # fmt: skip
    assert "tensor method.rows.weight" in found.only_head
    assert "only in head:" in differences.table([found])


def test_what_is_ignored_is_not_compared_and_nothing_else_is_left_out(result):
    found = result(rows=change("train", "loss", 9.0)[1:], ignored=["loss", "eval"])
    assert (found.verdict, found.rows) == ("equal", 3)


def test_the_order_of_the_optimiser_s_parameters_is_no_difference_but_their_values_are(result, tmp_path):
    state = copied(STATE)
    state["optimizer"]["state"] = {0: STATE["optimizer"]["state"][1], 1: STATE["optimizer"]["state"][0]}
    assert result(state=state).verdict == "equal"
    shutil.rmtree(tmp_path / "base"), shutil.rmtree(tmp_path / "head")
    state["optimizer"]["state"] = {0: STATE["optimizer"]["state"][0], 1: STATE["optimizer"]["state"][0]}
    assert (
        result(state=state).differences[0].startswith("checkpoint: optimizer.state.1.momentum_buffer element 0 0 | 1")
    )


@pytest.mark.parametrize("rule", ["loss=", "=loss"])
def test_a_rule_that_renames_nothing_is_refused(rule):
    with pytest.raises(Refused, match="--renamed: expected OLD=NEW"):
        command.renaming([rule])


def test_the_cases_are_every_file_of_methods_and_settings(repo_root):
    cases = cases_of(repo_root, 50)
    for group in ("method", "pn", "negatives", "optimizer", "projector"):
        for path in (repo_root / "conf" / group).glob("*.yaml"):
            assert f"{group}={path.stem}" in cases
    assert {case.ranks for case in cases.values()} == {1, 2}
    assert [case.name for case in cases.values() if case.cut] == ["pn=both, cut and resumed"]
    assert "epochs=3" in cases["pn=both"].overrides, "two epochs have only 42 steps, fewer than the 50 to compare"


def test_a_commit_s_own_words_are_put_into_a_case_s_overrides():
    told = translated(
        ["pn=both", "warm_start.passes=3"], ["warm_start.passes -> bank_learning.filling_passes", "seed=1"]
    )
    assert told == ["pn=both", "bank_learning.filling_passes=3", "seed=1"]


@pytest.mark.long
def test_every_case_is_one_that_caco_accepts(repo_root):
    """Each passes the checks that caco.train makes before it trains."""
    for case in cases_of(repo_root, 50).values():
        cfg = composition.compose([*case.overrides, *cut_settings(case, 50)])
        validation.check(cfg, overrides=list(cfg.hydra.overrides.task), choices=dict(cfg.hydra.runtime.choices))


CRASHES = """
import json, os, pathlib, sys
job, rank = json.loads(pathlib.Path(sys.argv[1]).read_text()), os.environ.get("RANK", "0")
for case in job["cases"]:
    if case["name"] == "second" and int(rank) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        os._exit(9)
    folder = pathlib.Path(case["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"outcome-{rank}.json").write_text(json.dumps({"error": None, "cpu_seconds": 1.0}))
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_process_that_dies_costs_the_case_that_it_was_at_and_no_other(tmp_path, monkeypatch, ranks):
    monkeypatch.setattr(running, "WORKER", tmp_path / "worker.py")
    running.WORKER.write_text(CRASHES)
    cases = [Case(name, [], ranks=ranks) for name in ("first", "second", "third")]
    side = Side("base", "base", tmp_path, [])
    outcomes = running.run_side(side, cases, tmp_path / "runs", 4, threading.Event())
    assert {name: outcome["error"] is None for name, outcome in outcomes.items()} == {
        "first": True,
        "second": False,
        "third": True,
    }
    assert "9" in outcomes["second"]["error"]


def test_native_parts_are_compiled_once_for_the_same_sources(tmp_path):
    """The compiler in this test is a script that counts its calls."""
    trees = {}
    for name, source in (("one", "1"), ("two", "1"), ("three", "2")):
        trees[name] = tmp_path / name
        (trees[name] / "part").mkdir(parents=True)
        (trees[name] / "part" / "kernel.cpp").write_text(source)
        (trees[name] / "setup.py").write_text(
            f"open({str(tmp_path / 'calls')!r}, 'a').write('x')\nopen('part/_kernel.so',"
            " 'w').write(open('part/kernel.cpp').read())\n"
        )
        assert build_native(trees[name], tmp_path / "cache") == ["_kernel"]
    assert (tmp_path / "calls").read_text() == "xx"
    assert [(tree / "part" / "_kernel.so").read_text() for tree in trees.values()] == ["1", "1", "2"]


def test_native_parts_that_do_not_compile_are_said_with_the_compiler_s_words(tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "setup.py").write_text("raise SystemExit('no compiler')")
    with pytest.raises(Refused, match="--no-native compares without them\\):\nno compiler"):
        build_native(tmp_path / "tree", tmp_path / "cache")


@pytest.fixture
def clone(tmp_path, repo_root):
    """A new repository whose only commit is the code of this checkout."""
    if shutil.which("git") is None:
        pytest.skip("needs git, which is not installed")
    clone = tmp_path / "clone"
    for name in ("caco", "conf", "hydra_plugins"):
        shutil.copytree(repo_root / name, clone / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (clone / ".gitignore").write_text("ignored\n")
    author = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", clone, *arguments], check=True)
    return clone


def test_the_working_tree_is_its_files_as_they_are_without_those_that_git_ignores(clone, tmp_path):
    (clone / "ignored").write_text("")
    (clone / "new").write_text("untracked")
    (clone / "conf" / "config.yaml").write_text("changed")
    (clone / "conf" / "evaluate.yaml").unlink()
    assert check_out(clone, None, tmp_path / "tree").endswith(", 3 files changed)")
    assert not (tmp_path / "tree" / "ignored").exists() and not (tmp_path / "tree" / "conf" / "evaluate.yaml").exists()
    assert (tmp_path / "tree" / "new").read_text() == "untracked"
    assert (tmp_path / "tree" / "conf" / "config.yaml").read_text() == "changed"
    check_out(clone, "HEAD", tmp_path / "committed")
    assert (tmp_path / "committed" / "conf" / "evaluate.yaml").is_file() and not (
        tmp_path / "committed" / "new"
    ).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-commit"], "git rev-parse .* failed"),
        (["HEAD", "--cases", "no-such-case"], "expected at least one case .*, got none; there are: .*pn=both"),
        (["HEAD", "--steps", "1"], "--steps: expected at least 2, got 1"),
        (["HEAD", "--renamed", "loss="], "--renamed: expected OLD=NEW"),
        (["HEAD", "--renamed", "no-such-file"], "--renamed: expected OLD=NEW or a file .*'no-such-file'"),
        (["HEAD", "--renamed", r"loss=\1"], "--renamed: expected in NEW the groups of OLD"),
        (["HEAD", "--cases", "("], "--cases: expected a regular expression, got '\\('"),
        (["HEAD", "--ignore", "*"], "--ignore: expected a regular expression"),
        (["HEAD", "--keep", "."], "--keep: expected an empty folder or none"),
        (["HEAD", "--json", "no/such/folder.json"], "--json: expected a file in a folder that exists"),
    ],
)
def test_a_question_without_sense_is_refused_before_anything_runs(clone, capsys, arguments, message):
    assert command.main([*arguments, "--repository", str(clone), "--no-native"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_bug_is_no_refusal_and_keeps_its_traceback(clone, monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(command, "check_out", broken)
    with pytest.raises(ValueError, match="a bug"):
        command.main(["HEAD", "--repository", str(clone)])


def test_nothing_of_caco_is_imported(repo_root):
    """An imported module would be that of this commit, while another commit is to be compared."""
    for path in (repo_root / "experiments" / "compare").glob("*.py"):
        assert not re.search(r"^\s*(from|import) caco\b", path.read_text(), re.MULTILINE), path


SMALL = ["--steps", "3", "--no-native", "--set", "batch=64", "eval=[]"]


@pytest.mark.long
def test_one_changed_number_is_found_where_it_matters_and_nowhere_else(clone, tmp_path, capfd):
    """In the second commit CaCo's temperature differs, SimCLR is unchanged, and one setting is broken, which fails
    alone.
    """
    changed = clone / "conf" / "method" / "caco.yaml"
    changed.write_text(changed.read_text().replace("\n  temperature: 0.08", "\n  temperature: 0.09"))
    broken = clone / "conf" / "pn" / "negative.yaml"
    broken.write_text(broken.read_text().replace("sources.OtherView", "sources.NoSuchSource"))
    (clone / "conf" / "pn" / "positive.yaml").rename(clone / "conf" / "pn" / "queue.yaml")
    found = tmp_path / "found.json"
    chosen = ["--cases", r"^(pn=\w+|method=mocov2)$", "--without", "both"]
    assert command.main(["HEAD", "--repository", str(clone), *SMALL, *chosen, "--json", str(found)]) == 1
    told = json.loads(found.read_text())
    cases = {case["case"]: case for case in told["cases"]}
    assert {name: case["verdict"] for name, case in cases.items()} == {
        "method=mocov2": "equal", "pn=negative": "failed", "pn=none": "differs"
    }  # fmt: skip
    assert cases["method=mocov2"]["rows"] == 3 and cases["method=mocov2"]["tensors"] > 50
    assert cases["pn=none"]["differences"][0].startswith("step 1, train: loss ")
    assert list(cases["pn=negative"]["failed"]) == ["head"] and "NoSuchSource" in cases["pn=negative"]["failed"]["head"]
    assert told["only"] == {"base": ["pn=positive"], "head": ["pn=queue"]}
    out = capfd.readouterr().out
    assert "pn=none" in out and "differs: first step 1, train: loss " in out
    assert "cases that only base has, not run: pn=positive" in out


@pytest.mark.long
def test_a_commit_is_equal_to_itself_on_one_rank_and_two_and_when_it_is_cut(clone, capfd):
    chosen = ["--cases", "pn=both, (two ranks|cut)"]
    assert command.main(["HEAD", "HEAD", "--repository", str(clone), *SMALL, *chosen]) == 0
    out = capfd.readouterr().out
    assert out.count("  equal\n") == 2 and "3 steps a case" in out and out.rstrip().endswith("2 equal")
