"""`python -m experiments.run`: which runs it starts, skips, resumes and retries, and what it refuses."""

import json
import shlex
import sys

import pytest

from caco import checking, train
from caco.runs.files import write_json
from experiments import record, run
from experiments.tables import experiments, load_scale, load_table


@pytest.fixture
def here(monkeypatch, tmp_path):
    """main() in an empty directory with no committed records: `here("table7", "scale=smoke")` returns the exit code."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["run", *arguments])
        with pytest.raises(SystemExit) as end:
            run.main()
        return end.value.code

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "RECORDS", tmp_path / "records")
    return main


class Trainings:
    """Replaces caco.train: records the command lines, and writes the files of a run that finished or failed."""

    def __init__(self, root):
        self.root, self.commands, self.failing = root, [], set()

    def __call__(self):
        overrides = sys.argv[1:]
        self.commands.append(overrides)
        folder = self.root / next(o.partition("=")[2] for o in overrides if o.startswith("hydra.run.dir="))
        (folder / "failure.txt").unlink(missing_ok=True)
        if self.failing & set(overrides):
            (folder / "failure.txt").write_text("boom\n")
            raise RuntimeError("boom")
        seed = next(o.partition("=")[2] for o in overrides if o.startswith("seed="))
        (folder / "config.yaml").write_text(f"seed: {seed}\nrow: {folder.name}\n")
        write_json(folder / "environment.json", {"command": shlex.join(overrides)})
        write_json(folder / "summary.json", {"knn20_top1": 90.0})

    @property
    def rows(self):
        """(pn, seed) of all trainings so far, in order."""
        return [
            tuple(next(o.partition("=")[2] for o in overrides if o.startswith(key)) for key in ("pn=", "seed="))
            for overrides in self.commands
        ]


@pytest.fixture
def trainings(monkeypatch, here, tmp_path):
    stands_in = Trainings(tmp_path)
    monkeypatch.setattr(train, "main", stands_in)
    return stands_in


def test_a_table_is_trained_seed_by_seed_and_recorded(here, trainings, tmp_path):
    assert here("table7", "scale=smoke", "rows=none,both") == 0
    assert trainings.rows == [("none", "0"), ("both", "0"), ("none", "1"), ("both", "1")]
    made = json.loads((tmp_path / "runs/smoke/record.json").read_text())
    labels = [entry["experiment"] for entry in made["runs"]]
    assert {"table": "table7", "row": "both", "scale": "smoke"} in labels and len(labels) == 4


def test_what_is_done_is_not_done_again(here, trainings):
    here("table7", "scale=smoke", "rows=none", "seed=0")
    here("table7", "scale=smoke", "rows=none", "seed=0,1")
    assert trainings.rows == [("none", "0"), ("none", "1")]


def test_what_another_table_has_trained_is_not_trained_again(here, trainings):
    """At this scale Positive+Negative of Table VII and CaCo of Table I are the same run."""
    here("table7", "scale=smoke", "rows=both", "seed=0")
    assert here("table1", "scale=smoke", "rows=caco_256,caco_1024", "seed=0") == 0
    assert len(trainings.commands) == 1


def test_what_somebody_else_has_recorded_is_not_trained_again(here, trainings, tmp_path, monkeypatch, capsys):
    both = next(experiments(load_table("7"), load_scale("smoke"), rows=["both"]))
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "smoke.json").touch()
    monkeypatch.setattr(record, "read", lambda path: [{"config_hash": both.hash(0), "name": "theirs"}])
    assert here("table7", "scale=smoke", "rows=both", "seed=0,1") == 0
    assert trainings.rows == [("both", "1")]
    assert "2 runs, 0 done already, 1 to do, 1 in the records of experiments/records" in capsys.readouterr().err
    assert here("table7", "scale=smoke", "rows=both", "seed=0,1", "--here") == 0
    assert trainings.rows == [("both", "1"), ("both", "0")], "--here trains it again"


def test_one_that_fails_does_not_stop_the_others_and_is_tried_again_on_request_alone(here, trainings, capsys):
    trainings.failing.add("pn=none")
    assert here("table7", "scale=smoke", "rows=none,both", "seed=0") == 1
    assert "table7/none seed 0 has failed: boom" in capsys.readouterr().err
    assert here("table7", "scale=smoke", "rows=none,both", "seed=0") == 1
    assert trainings.rows == [("none", "0"), ("both", "0")]
    trainings.failing.clear()
    assert here("table7", "scale=smoke", "rows=none,both", "seed=0", "--retry") == 0
    assert trainings.rows[2:] == [("none", "0")]


def test_an_interruption_ends_it_all(here, monkeypatch):
    calls = []

    def interrupted():
        calls.append(1)
        sys.exit(130)

    monkeypatch.setattr(train, "main", interrupted)
    assert here("table7", "scale=smoke") == 130
    assert len(calls) == 1


def test_a_dry_run_lists_commands_that_caco_train_accepts_and_starts_nothing(here, trainings, capsys, tmp_path):
    assert here("table7", "scale=mini", "--dry-run", "rows=both", "seed=0", "data.root=/images") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# table7/both seed 0: to do" and lines[1].startswith(("# no estimate", "# estimate: "))
    words = shlex.split(lines[2])
    assert words[:3] == ["python", "-m", "caco.train"] and "data.root=/images" in words
    checking.check_command(words[3:], multirun=False)
    assert trainings.commands == [] and list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_a_run_took_if_it_is_known(here, capsys, tmp_path):
    both = next(experiments(load_table("7"), load_scale("smoke"), rows=["both"]))
    (done := tmp_path / "runs/smoke" / f"both-{both.hash(0)}").mkdir(parents=True)
    for rate, told in ((0.0, "estimate"), (100.0, "took 0.0089 h here with seed 0")):
        write_json(done / "summary.json", {"steps": 50, "images_per_second": rate})
        assert here("table7", "scale=smoke", "rows=both", "seed=0,1", "--dry-run") == 0
        lines = capsys.readouterr().out.splitlines()
        assert (
            lines[0] == "# table7/both seed 0: done" and lines[1] == "# table7/both seed 1: to do" and told in lines[2]
        )


def test_a_dry_run_says_why_a_row_is_not_run(here, capsys):
    here("table2", "scale=digits", "rows=cmc,mocov2", "--dry-run")
    assert "# table2/cmc: not run: the digits are grey" in capsys.readouterr().out


def test_a_begun_run_goes_on_where_it_is(here, trainings, tmp_path, capsys):
    both = next(experiments(load_table("7"), load_scale("smoke"), rows=["both"]))
    begun = tmp_path / "runs/smoke" / f"another-name-{both.hash(0)}"
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "checkpoints/step_000000005.pt").touch()
    here("table7", "scale=smoke", "rows=both", "seed=0", "--dry-run")
    assert "seed 0: begun" in capsys.readouterr().out
    here("table7", "scale=smoke", "rows=both", "seed=0")
    assert f"hydra.run.dir=runs/smoke/another-name-{both.hash(0)}" in trainings.commands[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["table7"], "scale=NAME must be given. There are: cifar10"),
        (["table77", "scale=smoke"], "table77: no such table; did you mean table7"),
        (["table7", "scale=smok"], "smok: no such scale; did you mean smoke?"),
        (["table7", "scale=smoke", "rows=bth"], "bth: no such row; did you mean both?"),
        (["table7", "scale=smoke", "seed=a"], "seed=a: expected whole numbers"),
        (["table7", "scale=smoke", "epochs=1"], "epochs=1: could change a number"),
        (["table7", "scale=smoke", "bank_learning.push=1"], "bank_learning.push=1: cannot be given here"),
        (["table7", "scale=smoke", "weights=x.pt"], "weights=x.pt: cannot be given here"),
        (["table7", "scale=smoke", "rowss"], "rowss: expected key=value; did you mean rows?"),
        (["table7", "scale=mini", "rows=none"], "data.root=PATH must be given"),
        (["table7", "scale=mini", "rows=none", "data.root=/nowhere"], "data.root=/nowhere: does not exist"),
        (["table5", "scale=mini"], "scale mini measures nothing of it"),
        (["table3", "scale=mini"], "table3 has no row that can be run at scale mini"),
        (["table7", "scale=smoke", "rows=none", "trackin.uri=x"], "trackin.uri=x: no such key; did you mean tracking?"),
    ],
)
def test_a_mistake_is_refused_before_anything_starts(here, trainings, capsys, tmp_path, arguments, words):
    assert here(*arguments) == 2
    assert words in capsys.readouterr().err
    assert trainings.commands == [] and list(tmp_path.iterdir()) == []


def test_jobs_of_a_launcher_are_the_runs_that_are_left(here, monkeypatch, tmp_path):
    from caco.launch import sweep

    seen = []

    def follow(launcher, jobs, folder):
        seen.append((launcher.parallel, folder, [job.run_dir for job in jobs], jobs[0].overrides))

    pytest.importorskip("submitit")
    monkeypatch.setattr(sweep, "follow", follow)
    assert (
        here("table7", "scale=smoke", "rows=none", "launcher=local", "launcher.parallel=2") == 1
    )  # neither run finished
    ((parallel, folder, run_dirs, overrides),) = seen
    assert parallel == 2 and folder == tmp_path / "runs/smoke" and len(run_dirs) == 2
    assert not any(o.startswith("launcher") for o in overrides) and "seed=0" in overrides
    assert json.loads((run_dirs[0] / record.LABEL).read_text())["row"] == "none"


def test_trained_for_real_a_row_has_caco_trains_own_command_in_its_record(here, monkeypatch, tmp_path):
    """This is the only test in this file that trains, at a tenth of the smoke scale."""
    original = load_scale("smoke")
    original.overrides += ["max_steps=2", "eval=[knn_all]"]
    monkeypatch.setattr(run, "load_scale", lambda name: original)
    assert here("table7", "scale=smoke", "rows=none", "seed=0") == 0
    (entry,) = record.read(tmp_path / "runs/smoke/record.json")
    assert entry["command"].startswith("python -m caco.train name=smoke method=caco pn=none ")
    assert entry["summary"]["steps"] == 2 and entry["summary"]["processes"] == 1 and entry["summary"]["knn20_top1"] > 10
