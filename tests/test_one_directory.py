"""Two runs never share a directory, and results on two sets of images never share a curve: a command that would mix
them is refused beforehand.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from tiny import BANK, TINY, compose

from caco import checking, evaluate, train
from caco.config import composition
from caco.engine.same_images import other_images
from caco.engine.training import run_training
from caco.errors import SweepFailed, UserError
from caco.launch.jobs import Job
from caco.launch.sweep import follow
from caco.runs.directory import write_config
from caco.runs.files import read_json, write_json


@pytest.mark.parametrize(
    "varied, differ, shown",
    [
        ("loader.num_workers=0,1,2", "loader.num_workers", "${run_name:}-${loader.num_workers}"),
        ("data.root=/a,/b", "data.root", "${run_name:}-${hydra.job.num}"),
        ("log_every_steps=1,2", "log_every_steps", "${run_name:}-${log_every_steps}"),
        ("tracking.system_seconds=0,1", "tracking.system_seconds", "${run_name:}-${tracking.system_seconds}"),
    ],
)
@pytest.mark.parametrize("launcher", ["none", pytest.param("local", marks=pytest.mark.long)])
def test_a_sweep_whose_jobs_would_share_a_directory_is_refused_and_told_what_works(varied, differ, shown, launcher):
    command = ["data=cifar10", "tracking=ledger", varied, f"launcher={launcher}"]
    with pytest.raises(UserError, match="^[23] jobs of this sweep have the same directory, runs/caco/") as refused:
        checking.check_command(command, multirun=True)
    assert f"they differ only in {differ}, which" in str(refused.value) and f"hydra.sweep.subdir='{shown}'" in str(
        refused.value
    )
    assert checking.check_command([*command, f"hydra.sweep.subdir={shown}"], multirun=True).unfinished == len(
        varied.split(",")
    )


def test_a_job_that_is_named_twice_is_refused():
    with pytest.raises(UserError, match="2 jobs of this sweep are the same run, runs/caco/"):
        checking.check_command(["data=digits", "tracking=ledger", "seed=1,1"], multirun=True)


def test_directories_named_by_the_number_of_the_job_are_those_that_hydra_gives(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(train, "run", lambda cfg, run_dir: seen.append((cfg.data.root, run_dir.name[-2:])))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CACO_SWEEP", "null")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    words = [
        "caco-train",
        "-m",
        "data=cifar10",
        "tracking=ledger",
        "data.root=/a,/b",
        "hydra.sweep.subdir=${run_name:}-${hydra.job.num}",
    ]
    monkeypatch.setattr(sys, "argv", words)
    train.main()
    assert seen == [("/a", "-0"), ("/b", "-1")]


def test_what_a_search_draws_is_held_to_it_too(monkeypatch, tmp_path):
    """The jobs of a search are not known when the command is checked, so the second job that would use a directory is
    refused when it starts.
    """
    from hydra.core.hydra_config import HydraConfig

    monkeypatch.setattr(train, "run", lambda cfg, run_dir: None)
    monkeypatch.setattr(train, "_trained", {})
    monkeypatch.chdir(tmp_path)

    def drawn(*overrides):
        cfg = composition.compose(
            [*TINY, *BANK, *overrides, "hydra.mode=MULTIRUN", f"hydra.runtime.output_dir={tmp_path / 'run'}"]
        )
        HydraConfig.instance().set_config(cfg)
        return train.job(composition.job_config(cfg))

    drawn("loader.num_workers=1")
    drawn("loader.num_workers=1")  # the same job once more; its result exists
    with pytest.raises(UserError, match="differ only in loader.num_workers"):
        drawn("loader.num_workers=2")


class AtOnce:
    """A launcher whose jobs end at once when they are submitted; each calls `ends(job)`."""

    needs_refill, parallel = False, 9

    def __init__(self, ends):
        self.ends = ends

    def submit(self, jobs, folder, code):
        for job in jobs:
            self.ends(job)
        return [str(number) for number, _ in enumerate(jobs)]

    def states(self, ids):
        return dict.fromkeys(ids, "ENDED")

    def log(self, folder, id):
        return folder / id


def test_a_job_that_is_refused_beside_the_results_of_another_has_failed(tmp_path):
    def ends(job):
        write_json(job.run_dir / "summary.json", {})
        (job.run_dir / "failure.txt").write_text("other images\n")

    (tmp_path / "run").mkdir()
    with pytest.raises(SweepFailed, match="1 of 1 job has failed:\n.*\n    other images\n"):
        follow(AtOnce(ends), [Job((), tmp_path / "run")], tmp_path)


def test_a_job_that_could_not_say_why_it_failed_is_reported_all_the_same(tmp_path):
    """A full disk leaves failure.txt empty."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with pytest.raises(SweepFailed, match=r"has failed:\n.*\n    why is not known: .*failure\.txt is empty"):
        follow(AtOnce(lambda job: (run_dir / "failure.txt").touch()), [Job((), run_dir)], tmp_path)


@pytest.fixture
def pictures(tmp_path):
    """pictures(name, shade) makes a labelled folder of two classes with test images of this shade."""

    def make(name: str, shade: int) -> Path:
        top = tmp_path / name
        for split, count in (("train", 40), ("test", 6)):
            for label in (0, 1):
                (top / split / str(label)).mkdir(parents=True)
                for i in range(count):
                    colour = (i * 5, shade if split == "test" else 0, 120 * label + i)
                    Image.new("RGB", (16 + (split == "test") * shade, 16), colour).save(
                        top / split / str(label) / f"{i}.png"
                    )
        return top

    return make


FOLDER = ["data=folder", "data.in_memory_mb=0", "max_steps=2", "epochs=1", "batch=8", "pn=none", "eval.knn.fraction=1"]


def test_a_run_is_never_evaluated_on_two_test_sets(pictures, tmp_path):
    """The training images are the same, and the location of the labelled images is not part of the run's identity."""
    photos, first, second = pictures("photos", 1), pictures("first", 2), pictures("second", 3)
    command = [*FOLDER, f"data.root={photos}"]
    run_dir = tmp_path / "run"
    cfg = compose(*command, f"data.labelled_root={first}", bank=False)
    run_training(cfg, run_dir)
    before = (run_dir / "config.yaml").read_text()
    other = compose(*command, f"data.labelled_root={second}", bank=False)
    with pytest.raises(
        UserError, match="evaluated on other images so far .the test images: test: digest [0-9a-f]+, now [0-9a-f]+"
    ):
        run_training(other, run_dir)
    assert (run_dir / "config.yaml").read_text() == before, "the refused command must not change the run's record"
    shutil.move(first, tmp_path / "moved")
    moved = compose(*command, f"data.labelled_root={tmp_path / 'moved'}", bank=False)
    assert run_training(moved, run_dir)["steps"] == 2, "the same images in another folder must be accepted"


@pytest.fixture
def evaluated(monkeypatch, tmp_path):
    """evaluated(*words) runs caco.evaluate in this process and returns its exit code."""

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["caco-evaluate", *words])
        monkeypatch.setattr("caco.runs.directory._locks", {})
        try:
            evaluate.main()
        except SystemExit as end:
            return end.code
        return 0

    monkeypatch.chdir(tmp_path)
    return main


def test_an_evaluation_on_other_images_of_the_same_kind_says_so_in_the_names(pictures, tmp_path, evaluated, capfd):
    photos, others, run_dir = pictures("photos", 1), pictures("others", 5), tmp_path / "run"
    cfg = compose(*FOLDER, f"data.root={photos}", bank=False)
    run_training(cfg, run_dir)
    write_config(run_dir, cfg)
    command = [f"run={run_dir}", "eval=[knn_all]", "eval.knn.k=3", "overlap=allow"]
    assert evaluated(*command) == 0
    assert evaluated(*command, f"data.root={others}") == 0
    digest = read_json(run_dir / "images.json")["images"]["test"]
    summary = read_json(run_dir / "summary.json")
    (named,) = (name for name in summary if name.startswith("folder-") and name.endswith("/knn3_top1"))
    assert "knn3_top1" in summary and digest not in named

    # Weights from elsewhere, whose results have a folder of their own.
    file = next((run_dir / "checkpoints").glob("*.pt"))
    command = [f"weights={file}", "backbone=small_resnet", "backbone.width=8", "augmentation=digits", "data=folder"]
    command += ["eval=[knn_all]", "eval.knn.k=3", "overlap=allow", "precision=fp32", "tracking=ledger", "to=of_weights"]
    for root in (photos, others, photos):
        assert evaluated(*command, f"data.root={root}") == 0
    names = list(read_json(tmp_path / "of_weights" / "summary.json"))
    assert names == ["knn3_top1", names[1]] and names[1].startswith("folder-") and names[1].endswith("/knn3_top1")
    state = torch.load(file, weights_only=True)
    torch.save({**state, "another": 1}, tmp_path / "other.pt")
    words = [word.replace(str(file), str(tmp_path / "other.pt")) for word in command]
    assert evaluated(*words, f"data.root={photos}") == 2
    assert "of_weights holds results of other weights than" in capfd.readouterr().err
    assert list(read_json(tmp_path / "of_weights" / "summary.json")) == names


def test_evaluating_a_job_of_a_sweep_leaves_its_label_alone(tmp_path, evaluated):
    run_dir = tmp_path / "run"
    cfg = compose("max_steps=2", "epochs=1", "eval=[]", "bank.size=64")
    sweep = {"name": "s", "title": "seed=0,1", "keys": ["seed"], "jobs": 2}
    run_training(cfg, run_dir, label=train.labels.Label("seed=0", {}, sweep))
    write_config(run_dir, cfg)
    assert evaluated(f"run={run_dir}", "eval=[knn]") == 0
    about = read_json(run_dir / "tracking.json")
    assert (about["run_name"], about["sweep"]) == ("seed=0", sweep)
    assert OmegaConf.create(yaml.safe_load((run_dir / "config.yaml").read_text())).seed == 0


def test_a_run_goes_on_with_a_copy_of_an_evaluators_set_and_not_with_another_one():
    def of(sets):
        return {"images": {"test": "t"}, "end": {"transfer": sets}}

    assert "those of eval.transfer" in (other_images(of({"cars": "a"}), of({"cars": "b"}), is_done=True) or "")
    assert other_images(of({"cars": "a"}), of({"cars": "a"}), is_done=True) is None
    assert other_images(of([["cars", "key with times"]]), of({"cars": "a"}), is_done=True) is None, (
        "a key as earlier versions wrote it must be accepted"
    )
