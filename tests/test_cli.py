"""`python -m caco.train` on the command line."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from caco import checking, evaluate, train
from caco.config import components, composition, validation
from caco.engine import fitting
from caco.errors import UserError
from caco.installed import command_to_install, version


def caco(*arguments: str, cwd, **environment: str) -> subprocess.CompletedProcess:
    # so that a checkout can be tested without installing it
    environment |= {"PYTHONPATH": str(Path(train.__file__).parents[1])}
    command = [sys.executable, "-m", "caco.train", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **environment}
    )


def test_a_mistake_costs_seconds_one_line_and_exit_code_2(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = caco("preset=demo", "bach=3", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 5, "expected about one second of processor time; importing torch alone takes two to five"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "caco: bach: no such key; did you mean batch?\n"


def test_one_refusal_names_everything_and_leaves_nothing_behind(tmp_path):
    """The command has two typos, a wrong type, a wrong value and a folder that does not exist; all are reported
    together, before torch is imported.
    """
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    wrong = ["data=folder", "data.root=nowhere", "bach=3", "bank=13M", "epochs=five", "method.temperature=-1"]
    done = caco(*wrong, cwd=tmp_path)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime - begun.ru_utime < 8, "this limits processor time; 1.3 to 2.2 s by the clock were measured"
    starts = ["caco: bank=13M: no such option", "bach: no such key; did you mean batch?",
    "epochs: expected int, got 'five'",
              "method.temperature: expected float above 0",
              "data=folder needs images: expected data.root=PATH"]  # fmt: skip
    assert [any(line.startswith(start) for line in done.stderr.splitlines()) for start in starts] == [True] * 5, (
        done.stderr
    )
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []


def test_of_a_folder_whose_name_could_not_be_read_it_is_not_said_that_none_was_given():
    with pytest.raises(UserError) as refused:
        checking.check_command(["data=folder", "data.root=/größe (1)", "tracking=ledger"], multirun=False, look=True)
    assert "the shell needs its own around those: " in str(refused.value) and "got none" not in str(refused.value)


def test_a_refusal_leaves_nothing_behind(tmp_path):
    caco("batch=1", cwd=tmp_path)
    caco("-m", "batch=64,1", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_help_fits_a_screen_names_every_option_and_points_further_without_torch(tmp_path, repo_root):
    done = caco("--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert "  pn: both, both_blended, both_by_class, both_weighted, negative, none, positive\n" in done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    options = {path.stem for path in (repo_root / "conf").glob("*/*.yaml")}
    assert options <= set(done.stdout.replace(",", " ").split())
    pages = re.findall(r"docs/\w+\.md", done.stdout)
    assert "docs/glossary.md" in pages and all((repo_root / page).is_file() for page in pages)
    assert "| torch\n" not in done.stderr and "| hydra\n" in done.stderr


def test_cfg_job_prints_the_configuration_and_starts_nothing(tmp_path):
    done = caco("--cfg", "job", "bank=12M", "batch=4096", cwd=tmp_path)
    assert done.returncode == 0
    assert "batch: 4096\n" in done.stdout and "size: 98304\n" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert caco("--cfg", "job", "bach=3", cwd=tmp_path).stderr == "caco: bach: no such key; did you mean batch?\n"


SWEEPS = [
    ["seed=1,2", "bank=4M", "batch=64,128"],
    ["seed=range(1,4)", "+name='a b','c,d'", "method.temperature=0.1,1e-3"],
    ["~warm_start", "seed=1,2"],
    ["eval=[knn],[knn,probe]", "seed=1", "seed=2,3"],
    ["data.root=choice(/a,/b)", "compile=true"],
]


@pytest.mark.parametrize("overrides", SWEEPS)
def test_the_jobs_that_are_checked_are_those_that_hydra_then_runs(overrides):
    """Hydra's sweeper splits a sweep in a private function; no other test would notice a job more or less."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    expected = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), max_batch_size=None)[0]
    assert checking.jobs(overrides, multirun=True) == expected and len(expected) > 1


IMAGES_OF = fitting.images_of


@pytest.fixture
def here(monkeypatch, tmp_path):
    """main() in this process, in an empty directory: `here("seed=1")` returns the exit code."""

    def main(*arguments: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["caco-train", *arguments])
        try:
            train.main()
        except SystemExit as end:
            return end.code
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitting, "images_of", lambda data: None)  # there are no images, and training is not started
    for name, value in {"HYDRA_FULL_ERROR": "0", "CACO_SWEEP": "null"}.items():
        monkeypatch.setenv(name, value)  # main() sets it; monkeypatch restores it afterwards
    return main


def test_bare_command_without_imagenet_says_in_two_lines_what_to_do(here, capsys, monkeypatch):
    monkeypatch.setattr(fitting, "images_of", IMAGES_OF)
    assert here("tracking=ledger") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "data.root=" in lines[0] and "preset=demo" in lines[1]


@pytest.fixture
def no_mlflow(monkeypatch):
    """Make MLflow look as if it was not installed, and training do nothing."""
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(train, "run", lambda cfg, run_dir: None)
    checking.say_once.cache_clear()


def trackers(folder: Path) -> set[str]:
    """The tracker classes that the runs below a folder have recorded."""
    return {OmegaConf.load(file).tracking._target_ for file in folder.rglob("config.yaml")}


@pytest.mark.parametrize(
    "command, told",
    [
        (["preset=demo", "tracking.system_seconds=0"], "runs/caco"),
        (["-m", "preset=demo", "seed=0,1", "name=mine"], "runs/mine"),
        (["preset=demo", "hydra.run.dir=my folder"], "'my folder'"),
    ],
)
def test_without_mlflow_a_run_says_once_that_the_ledger_keeps_everything(
    here, no_mlflow, command, told, capsys, tmp_path
):
    assert here(*command) == 0
    assert (
        capsys.readouterr().err
        == f"caco: MLflow is not installed: the ledger keeps everything, and `python -m caco.tracking.sync {told}` "
        f"sends it later, once MLflow is installed ({command_to_install('mlflow')})\n"
    )
    assert trackers(tmp_path) == {"caco.tracking.ledger.LedgerTracker"}, "the run must record the tracker that it used"


def test_without_mlflow_nothing_is_said_where_tracking_was_chosen(here, no_mlflow, capsys):
    assert here("preset=demo", "tracking=ledger") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "command", [["tracking=mlflow"], ["-m", "tracking=ledger,mlflow"], ["tracking.uri=http://host:5000"]]
)
def test_mlflow_named_and_missing_is_refused_before_anything_is_made(here, no_mlflow, command, capsys, tmp_path):
    assert here(*command, "preset=demo") == 2
    said = capsys.readouterr().err
    assert f"MLflow is not installed; to install it: {command_to_install('mlflow')}" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_preset_that_names_mlflow_insists_on_it(no_mlflow, tmp_path):
    (tmp_path / "preset").mkdir()
    (tmp_path / "preset" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /tracking: mlflow\n")
    cfg = composition.compose(["preset=mine", f"hydra.searchpath=[file://{tmp_path}]", "data=digits"])
    with pytest.raises(UserError, match="^tracking=mlflow: MLflow is not installed"):
        validation.check(composition.job_config(cfg))


def test_with_mlflow_runs_go_there_by_default(here, monkeypatch, tmp_path):
    for module in (train, composition, components):
        monkeypatch.setattr(module, "is_installed", lambda name: True)
    monkeypatch.setattr(train, "run", lambda cfg, run_dir: None)
    assert here("preset=demo") == 0
    assert trackers(tmp_path) == {"caco.tracking.mlflow.MLflowTracker"}


def test_a_run_gets_its_directory_before_it_starts(here, monkeypatch, tmp_path):
    seen = []

    def run(cfg, run_dir):
        seen.append((cfg.seed, run_dir, (run_dir / "config.yaml").exists()))

    monkeypatch.setattr(train, "run", run)
    assert here("seed=5") == 0
    assert here("seed=5", "data.root=/images", "hydra.run.dir=mine") == 0
    (_, first, _), (_, second, _) = seen
    assert first.parent == tmp_path / "runs" / "caco" and first.name.startswith("seed-5-")
    assert second == tmp_path / "mine"
    assert all(seed == 5 and recorded for seed, _, recorded in seen)


def test_another_run_in_the_same_directory_is_refused_with_the_difference(here, monkeypatch, capsys):
    monkeypatch.setattr(train, "run", lambda cfg, run_dir: None)
    assert here("hydra.run.dir=mine", "bank=8M") == 0
    assert here("hydra.run.dir=mine", "bank=12M") == 2
    assert "bank.size: there 65536, here 98304" in capsys.readouterr().err


def test_only_the_first_of_several_ranks_opens_the_run(here, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "run", lambda cfg, run_dir: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert here("hydra.run.dir=mine") == 0
    assert list((tmp_path / "mine").iterdir()) == []


def test_the_jobs_of_a_sweep_resume_the_runs_that_were_started_alone(here, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "run", lambda cfg, run_dir: seen.append(run_dir))
    assert here("seed=1", "bank=4M") == 0
    assert here("-m", "seed=1,2", "bank=4M") == 0
    assert len(seen) == 3 and len(set(seen)) == 2 and seen[0] == seen[1]


def test_a_sweep_goes_on_after_a_refused_job_and_ends_with_exit_code_2(here, monkeypatch, capsys):
    from caco.data.sets.folders import existing_root

    done = []

    def run(cfg, run_dir):
        if cfg.seed == 0:
            existing_root(None, example="this")
        done.append(cfg.seed)

    monkeypatch.setattr(train, "run", run)
    assert here("-m", "seed=0,1") == 2
    assert done == [1]
    assert "data.root=PATH" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(here, monkeypatch, capsys):
    def run(cfg, run_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", run)
    assert here("seed=0") == 130
    assert capsys.readouterr().err == "caco: interrupted; the same command goes on from the last checkpoint\n"


def test_a_bug_keeps_its_traceback(here, monkeypatch):
    monkeypatch.setattr(train, "run", lambda cfg, run_dir: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here("seed=0")


def test_a_refusal_of_a_component_is_told_once_and_a_traceback_comes_for_the_asking(here, monkeypatch, capsys):
    def run(cfg, run_dir):
        raise UserError("no such images")

    monkeypatch.setattr(train, "run", run)
    assert here("seed=0") == 2
    assert capsys.readouterr().err == "caco: no such images\n"
    assert here("-m", "seed=0,1") == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("caco: ")] == [
        "caco: no such images"
    ] * 2
    monkeypatch.setenv("CACO_TRACEBACK", "1")
    with pytest.raises(UserError):
        here("seed=0")


def test_what_is_wrong_with_one_run_is_kept_in_its_directory(here, monkeypatch, tmp_path):
    def run(cfg, run_dir):
        raise UserError("no such images") if cfg.seed == 0 else ValueError("a bug")

    monkeypatch.setattr(train, "run", run)
    assert here("seed=0", "hydra.run.dir=refused") == 2
    with pytest.raises(ValueError, match="a bug"):
        here("seed=1", "hydra.run.dir=bug")
    assert not (tmp_path / "refused").exists(), (
        "a run that was refused before it wrote anything must leave no directory"
    )
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text("{}")
    here("seed=0", "hydra.run.dir=job")
    assert (tmp_path / "job" / "failure.txt").read_text() == "no such images\n", (
        "a sweep reads the reason of a failed job in failure.txt"
    )
    assert "Traceback" in (tmp_path / "bug" / "failure.txt").read_text()


def test_the_version_is_cacos_and_not_hydras(here, capsys, monkeypatch):
    assert here("--version") == 0
    monkeypatch.setattr(sys, "argv", ["caco-evaluate", "--version"])
    evaluate.main()
    assert capsys.readouterr().out == 2 * f"caco {version()}\n"


def test_jobs_are_pickled_by_name():
    """A job must not refer to __main__, which is another module in a launcher's process."""
    assert train.job.__module__ == "caco.train"
