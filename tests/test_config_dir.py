"""A user's own methods, sources of positives, evaluators, images and backbones (those in tests/own), which caco finds
through --config-dir.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from processes import caco_train, ranks
from recorded import assert_same, final
from safetensors.torch import load_file

import caco
from analysis import table
from caco import evaluate, export, plan, train
from caco.config import folders
from caco.launch.snapshot import snapshot
from caco.runs.directory import write_config
from caco.runs.files import read_json
from experiments import run

OWN = Path(__file__).parent / "own"
FILES = [
    "backbone/flat.yaml",
    "data/stripes.yaml",
    "eval/spread.yaml",
    "method/agree.yaml",
    "mine.py",
    "pn/halfway.yaml",
]
RUN = [
    "preset=smoke", "data=stripes", "backbone=flat", "eval=[spread]", "tracking=ledger", "projector.dim=8",
    "checkpoint.every_steps=2",
    "checkpoint.keep=9",
]  # fmt: skip


def typed(monkeypatch, command, *arguments: str) -> int | str | None:
    """Run a command with these arguments in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [command.__file__, *arguments])
    try:
        command.main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch, tmp_path):
    """Work in an empty folder with a copy of tests/own, named own; restores what main() changes in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("CACO_SWEEP", "null")
    shutil.copytree(OWN, tmp_path / "own", ignore=shutil.ignore_patterns("__pycache__"))
    yield
    folders.use()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which `caco-train --config-dir own method=agree ...` has run: it has own/ and runs/."""
    home = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("HYDRA_FULL_ERROR", "0")
        shutil.copytree(OWN, home / "own", ignore=shutil.ignore_patterns("__pycache__"))
        assert typed(patch, train, "--config-dir", "own", "method=agree", *RUN, "hydra.run.dir=run") == 0
        folders.use()
    return home


@pytest.fixture
def run_dir(finished, tmp_path):
    """The directory of the finished run, after it and own/ were moved to this folder."""
    shutil.copytree(finished / "run", tmp_path / "run")
    cfg = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert cfg.config_dir == str(finished / "own")
    cfg.config_dir = str(tmp_path / "own")
    OmegaConf.save(cfg, tmp_path / "run" / "config.yaml")
    return tmp_path / "run"


def test_a_run_is_made_of_own_parts_and_records_their_folder_and_files(finished):
    cfg = OmegaConf.load(finished / "run" / "config.yaml")
    assert [part._target_ for part in (cfg.method, cfg.backbone, cfg.data, cfg.eval.spread)] == [
        "mine.Agree", "mine.Flat", "mine.stripes", "mine.Spread",
    ]  # fmt: skip
    assert read_json(finished / "run" / "summary.json")["spread"] > 0
    recorded = read_json(finished / "run" / "environment.json")["config_dir_files"]
    assert [file.partition(" ")[0] for file in recorded.split(", ")] == FILES
    (finished / "own" / "notes.txt").write_text("no part of it")
    folders.use(finished / "own")
    assert folders.record()["config_dir_files"] == recorded
    (finished / "own" / "backbone" / "other.yaml").write_text("_target_: mine.Flat\n")
    assert folders.record()["config_dir_files"] != recorded
    (finished / "own" / "backbone" / "other.yaml").unlink()


def test_where_the_folder_lies_does_not_make_another_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        train, "run", lambda cfg, run_dir: write_config(run_dir, cfg)
    )  # as training does when it resumes
    assert typed(monkeypatch, train, "--config-dir", "own", "method=agree", *RUN) == 0
    (tmp_path / "own").rename("moved")
    assert typed(monkeypatch, train, f"--config-dir={tmp_path / 'moved'}", "method=agree", *RUN) == 0
    (config,) = tmp_path.glob("runs/caco/*/config.yaml")
    assert OmegaConf.load(config).config_dir == str(tmp_path / "moved")


def test_a_run_of_own_parts_goes_on_to_the_same_bits(monkeypatch, run_dir):
    whole = final(run_dir)
    for path in (*(run_dir / "checkpoints").glob("*4.pt"), run_dir / "summary.json"):
        path.unlink()
    assert typed(monkeypatch, train, "-cd", "own", "method=agree", *RUN, "hydra.run.dir=run") == 0
    assert_same(whole, final(run_dir))


def test_a_source_of_one_s_own_trains_with_a_bank(monkeypatch, tmp_path):
    assert (
        typed(monkeypatch, train, "--config-dir", "own", "pn=halfway", *RUN, "max_steps=18", "hydra.run.dir=run") == 0
    )
    assert read_json(tmp_path / "run" / "summary.json")["steps"] == 18
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").method.positives._target_ == "mine.Halfway"


def test_a_method_of_one_s_own_may_leave_its_sources_to_pn(monkeypatch, tmp_path):
    (tmp_path / "own" / "method" / "longer.yaml").write_text(
        "# @package _global_\ndefaults:\n  - caco\nmethod:\n  temperature: 0.3\n"
    )
    monkeypatch.setattr(train, "run", lambda cfg, run_dir: None)
    assert typed(monkeypatch, train, "--config-dir", "own", "method=longer", "pn=halfway", *RUN) == 0


def test_evaluate_finds_a_run_s_own_parts_where_the_run_had_them(monkeypatch, run_dir, capsys):
    trained = read_json(run_dir / "summary.json")["spread"]
    assert typed(monkeypatch, evaluate, "run=run", "eval=[spread]") == 0
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(trained, rel=1e-4)


def test_evaluate_says_what_is_missing_and_takes_it_from_elsewhere(monkeypatch, run_dir, capsys, tmp_path):
    (tmp_path / "own").rename("moved")
    assert typed(monkeypatch, evaluate, "run=run", "eval=[knn]") == 2
    said = (
        f"backbone._target_: mine.Flat is not installed here; the run had it from {tmp_path / 'own'}, which no longer"
        " exists: say --config-dir DIR with its present place"
    )
    assert said in capsys.readouterr().err
    assert typed(monkeypatch, evaluate, "run=run", "eval=[spread]") == 2
    assert f"Perhaps it was in {tmp_path / 'own'}, which no longer exists" in capsys.readouterr().err
    assert typed(monkeypatch, evaluate, "run=run", "--config-dir", "moved", "eval=[spread]") == 0


def test_a_second_folder_adds_to_the_run_s_own(monkeypatch, run_dir, capsys, tmp_path):
    (tmp_path / "later" / "eval").mkdir(parents=True)
    (tmp_path / "later" / "eval" / "width.yaml").write_text("# @package eval.width\n_target_: width.Width\n")
    (tmp_path / "later" / "width.py").write_text(
        "from caco.evals.base import Evaluator\nclass Width(Evaluator):\n    when = 'end'\n    def build(self, store,"
        " *, seed): pass\n    def run(self, backbone): yield 'width', float(backbone.num_features)\n"
    )
    assert typed(monkeypatch, evaluate, "run=run", "--config-dir", "later", "eval=[width,spread]") == 0
    assert "width" in capsys.readouterr().out


def test_an_edited_evaluator_or_backbone_is_not_answered_from_before(monkeypatch, run_dir, capsys, tmp_path):
    def result():
        assert typed(monkeypatch, evaluate, "run=run", "eval=[spread]") == 0
        return float(capsys.readouterr().out.split()[1])

    before, file = result(), tmp_path / "own" / "mine.py"
    file.write_text(file.read_text().replace(".std(0).mean()", ".std(0).mean().neg()"))
    assert result() == -before
    file.write_text(file.read_text().replace("return self.layers(images)", "return 2 * self.layers(images)"))
    assert result() == pytest.approx(-2 * before, rel=1e-5)


def test_export_writes_an_own_backbone_s_tensors_and_no_layout_of_other_models(monkeypatch, run_dir, capsys, tmp_path):
    assert typed(monkeypatch, export, "run=run", "to=exported") == 0
    state = load_file(tmp_path / "exported" / "model.safetensors")
    assert torch.equal(state["layers.2.weight"], final(run_dir)["method"]["encoder.backbone.layers.2.weight"])
    assert typed(monkeypatch, export, "run=run", "to=exported", "layouts=[timm]") == 2


def test_plan_counts_own_parts_and_own_images(monkeypatch, capsys):
    assert typed(monkeypatch, plan, "--config-dir", "own", "method=agree", *RUN) == 0
    assert capsys.readouterr().out.startswith("4 steps of 64 images on 1 device")
    assert typed(monkeypatch, plan, "--config-dir", "own", "pn=halfway", *RUN) == 0
    assert capsys.readouterr().out.startswith("20 steps of 64 images on 1 device")


def test_a_table_of_one_s_own_runs_and_is_shown(monkeypatch, capsys, tmp_path):
    (tmp_path / "own" / "experiments" / "scale").mkdir(parents=True)
    (tmp_path / "own" / "experiments" / "table_mine.yaml").write_text(
        "table: mine\ntitle: Agreement\nreference: agree\nseeds: [0]\ncolumns: {top1: Top-1}\n"
        "rows:\n  agree: {label: Agree, epochs: 200, batch: 1024, run: [method=agree]}\n"
    )
    (tmp_path / "own" / "experiments" / "scale" / "few.yaml").write_text(
        "title: few\nexactly: {epochs: 1, batch: 64}\nmetrics: {top1: [spread]}\n"
        f"overrides: {json.dumps([word for word in RUN if not word.startswith('eval')])}\n"
    )
    mine = ["--config-dir", "own", "table_mine", "scale=few"]
    assert typed(monkeypatch, run, *mine, "--dry-run") == 0
    assert f"python -m caco.train --config-dir {tmp_path / 'own'} name=few method=agree" in capsys.readouterr().out
    trained = []
    monkeypatch.setattr(train, "main", lambda: trained.append(sys.argv[1:3]) or sys.exit(3))
    assert typed(monkeypatch, run, *mine) == 1
    assert trained == [["--config-dir", str(tmp_path / "own")]]
    assert typed(monkeypatch, table, "table_mine", "--scale", "few", "--config-dir", "own") == 0
    assert f"python -m experiments.run --config-dir {tmp_path / 'own'} table_mine scale=few" in capsys.readouterr().out


def test_help_and_refusals_list_own_options(monkeypatch, capsys):
    assert typed(monkeypatch, train, "--config-dir", "own", "--help") == 0
    shown = capsys.readouterr().out
    assert "  pn: both, both_blended, both_by_class, both_weighted, halfway, negative, none, positive\n" in shown
    assert typed(monkeypatch, evaluate, "--config-dir", "own", "--help") == 0
    assert " semi, spread, transfer " in " ".join(capsys.readouterr().out.split())


MISTAKES = {
    ("method=agre",): "method=agre: no such option; did you mean agree? There are: adco, agree, ",
    ("method=agree", "method.temperatur=1"): "method.temperatur: no such key; did you mean temperature?",
    ("method=agree", "method.temperature=hot"): "method.temperature: expected float, got 'hot' (str)",
    ("backbone.depth=3",): "backbone.depth: no such key",
    (
        "method=agree",
        "config_dir=elsewhere",
    ): "config_dir: expected this key left out; use --config-dir DIR instead, got 'elsewhere'",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_own_parts_have_the_early_refusals_of_all_others(monkeypatch, capsys, tmp_path, words):
    assert typed(monkeypatch, train, "--config-dir", "own", *RUN, *words) == 2
    assert f"caco: {MISTAKES[words]}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() and "mine" not in sys.modules, (
        "a refusal must come before anything is written or imported"
    )


METHOD = "# @package _global_\nbank: null\nmethod:\n  _target_: "
BAD_FILES = {
    "a YAML without a module": ("method/bad.yaml", METHOD + "mone.Agree",
    "mone.Agree is not installed here, and there is no {own}/mone.py; did you mean mine?"),
    "a class that is not there": ("method/bad.yaml", METHOD + "mine.Agre",
    "method._target_: no Agre in mine; did you mean Agree?"),
    "no dotted path": ("method/bad.yaml", METHOD + "Agree",
    "method._target_: expected a dotted path to a class or function, got 'Agree'"),
    "no YAML": ("method/bad.yaml", "method: [1\nbank: 2\n", "{own}/method/bad.yaml, line 2: "),
    "no Python": ("mine.py", "class Agree:\n    def f(:\n", "{own}/mine.py, line 2: invalid syntax: def f(:"),
    "another group's folder": ("methods/bad.yaml", METHOD + "mine.Agree",
    "{own}/methods/bad.yaml would have to be in a folder method/ there"),
    "a package further down": ("method/bad.yaml", "# mine\n" + METHOD,
    "{own}/method/bad.yaml: # @package must be in the first line"),
    "an option of caco's": ("method/caco.yaml", METHOD,
    "{own}/method/caco.yaml: caco has its own method/caco.yaml and would use that one"),
    "a root of caco's": ("config.yaml", "batch: 3",
    "{own}/config.yaml: caco has its own config.yaml and would use that one"),
    "Python's own name": ("code.py", "",
    "{own}/code.py: Python would import its own under the name code; give yours another name"),
    "an installed name": ("timm/__init__.py", "", "/timm/__init__.py under the name timm; give yours another name"),
    "caco's name": ("caco.py", "",
    f"{{own}}/caco.py: Python would import {caco.__file__} under the name caco; give yours another name"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_used_is_refused_by_its_name(monkeypatch, capsys, tmp_path, case):
    name, content, said = BAD_FILES[case]
    file = tmp_path / "own" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    option = "agree" if name == "mine.py" else "bad"
    assert typed(monkeypatch, train, "--config-dir", "own", *RUN, f"method={option}") == 2
    assert said.format(own=tmp_path / "own") in capsys.readouterr().err


def test_without_the_folder_a_refusal_says_how_to_name_it(monkeypatch, capsys):
    assert typed(monkeypatch, train, "--config-dir", "nowhere", "method=agree") == 2
    assert (
        capsys.readouterr().err
        == f"caco: --config-dir: expected a folder, got {Path('nowhere').absolute()}, which does not exist\n"
    )
    assert typed(monkeypatch, train, "--config-dir", "own", "-cd", "other", "method=agree") == 2
    assert capsys.readouterr().err == "caco: --config-dir: expected one folder, got own, other\n"
    assert typed(monkeypatch, train, "preset=smoke", "backbone._target_=mine.Flat") == 2
    assert (
        "mine.Flat is not installed here; to use a file of your own, name its folder with --config-dir"
        in capsys.readouterr().err
    )


def test_the_folder_may_be_the_one_that_one_works_in(monkeypatch, capsys):
    monkeypatch.chdir("own")
    monkeypatch.syspath_prepend(Path.cwd())  # as python -m does it
    path = list(sys.path)
    assert typed(monkeypatch, train, "--config-dir", ".", "--help", "method=agree") == 0
    Path("code.py").touch()
    assert typed(monkeypatch, train, "--config-dir", ".", "--help", "method=agree") == 2
    assert "code.py: Python would import its own under the name code" in capsys.readouterr().err
    assert sys.path == path


def test_a_folder_that_holds_runs_and_images_too_is_used_without_them(tmp_path):
    own = tmp_path / "own"
    for name in (
        "parts/__init__.py",
        "parts/deep/er.py",
        "parts/deep/__pycache__/er.py",
        "runs/caco/one/config.yaml",
        "images/a/1.png",
        ".git/x.yaml",
    ):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).touch()
    assert [str(file.relative_to(own)) for file in folders.files(own)] == [
        *FILES[:5],
        "parts/__init__.py",
        "parts/deep/er.py",
        FILES[5],
    ]


def test_a_copy_for_jobs_holds_the_folder_and_is_another_when_that_changes(tmp_path):
    folders.use("own")
    code = snapshot(tmp_path / "code")
    assert [str(file.relative_to(code / "config_dir")) for file in folders.files(code / "config_dir")] == FILES
    (tmp_path / "own" / "mine.py").write_text("")
    assert snapshot(tmp_path / "code") != code
    assert (code / "config_dir" / "mine.py").read_text() == (OWN / "mine.py").read_text()


@pytest.mark.long
def test_it_works_as_a_command_whose_loader_forks_workers(tmp_path):
    command = [
        sys.executable,
        "-P",
        "-m",
        "caco.train",
        "--config-dir",
        "../own",
        "method=agree",
        *RUN,
        "loader=torch",
        "loader.num_workers=1",
    ]
    (tmp_path / "elsewhere").mkdir()
    variables = os.environ | {"PYTHONPATH": str(Path(train.__file__).parents[1])}
    done = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (summary,) = (tmp_path / "elsewhere").glob("runs/caco/*/summary.json")
    assert json.loads(summary.read_text())["spread"] > 0


@pytest.mark.long
def test_two_ranks_find_it(tmp_path):
    codes, outputs = ranks(2, caco_train, "--config-dir", str(OWN), "method=agree", *RUN, "hydra.run.dir=run")
    assert codes == [0, 0], outputs[0][1]
    assert read_json(tmp_path / "run" / "summary.json")["processes"] == 2


@pytest.mark.long
def test_a_local_sweep_runs_the_folder_as_it_was_submitted(tmp_path):
    """There are two jobs, one after the other, and the folder is edited before the second one starts."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "caco.train",
        "--config-dir",
        "own",
        "-m",
        "method=agree",
        *RUN,
        "launcher=local",
        "seed=1,2",
    ]
    variables = os.environ | {"PYTHONPATH": f"{Path(train.__file__).parents[1]}{os.pathsep}{tmp_path / 'own'}"}
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True) as sweep:
        while sweep.poll() is None and not list(tmp_path.glob("runs/caco/*/job.json")):
            time.sleep(0.1)
        (tmp_path / "own" / "mine.py").write_text("raise RuntimeError('edited after the submission')\n")
        _, errors = sweep.communicate(timeout=240)
    assert sweep.returncode == 0, errors
    configs = [OmegaConf.load(path) for path in sorted(tmp_path.glob("runs/caco/*/config.yaml"))]
    (code,) = tmp_path.glob("runs/caco/.code/*")
    assert [cfg.config_dir for cfg in configs] == [str(code / "config_dir")] * 2
