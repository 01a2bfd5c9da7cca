"""Training on any folder of images: settings that follow from the images are derived, settings that the user gave are
kept, and settings that do not fit the images are refused at once.
"""

import os
import time

import numpy as np
import pytest
from PIL import Image

from caco import checking
from caco.config import composition
from caco.data.sets import walking
from caco.engine import fitting
from caco.errors import UserError
from caco.launch import labels
from caco.runs import directory
from caco.runs.identity import identity, plain, run_hash

LABELLED = "{kind}: expected labelled training and test images"


def write(folder, count, *, side=40, seed=0):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(generator.integers(0, 255, (side + number, side, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    top = tmp_path_factory.mktemp("images")
    write(top / "flat", 30)
    for name in ("a", "b"):
        write(top / "classes" / name, 40)
        write(top / "split" / "train" / name, 40)
        write(top / "split" / "test" / name, 10)
    (top / "empty").mkdir()
    return top


def derived(root, *overrides):
    """The overrides that were derived for a folder, including the one that marks them as derived."""
    return checking.check_command(
        ["data=folder", f"data.root={root}", "tracking=ledger", *overrides], multirun=False, look=True
    ).derived


def refused(root, *overrides):
    with pytest.raises(UserError) as error:
        derived(root, *overrides)
    return str(error.value).splitlines()


def test_a_folder_without_labels_is_measured_by_what_needs_none(images, capsys):
    assert derived(images / "flat", "batch=16") == ["eval=[geometry]", "derived=[eval]"]
    assert (
        "eval is not set; it becomes [geometry], because the images have no labels, which knn and probe need"
        in capsys.readouterr().err
    )


def test_a_warm_up_fits_a_short_run(images):
    assert derived(images / "flat", "batch=16", "eval=[]", "epochs=5") == [
        "schedule.warmup_epochs=0.5",
        "derived=[schedule.warmup_epochs]",
    ]
    assert derived(images / "flat", "batch=16", "eval=[]", "epochs=11") == [], (
        "eleven epochs have room for ten of warm-up, so nothing is derived"
    )


def test_classes_without_test_images_hold_some_out_and_evaluators_fit_what_is_left(images):
    assert derived(images / "classes", "batch=64", "eval=[knn,linear]") == [
        "data.validation_fraction=0.1", "eval.knn.fraction=1", "eval.linear.batch=72",
        "derived=[data.validation_fraction,eval.knn.fraction,eval.linear.batch]",
    ]  # fmt: skip


def test_what_is_derived_makes_a_run_that_can_be_composed_again_and_is_marked_in_it(images):
    words = ["data=folder", f"data.root={images / 'flat'}", "tracking=ledger", "batch=16", "epochs=5"]
    extra = checking.check_command(words, multirun=False, look=True).derived
    cfg = composition.job_config(composition.compose([*words, *extra]))
    assert list(cfg.derived) == ["schedule.warmup_epochs", "eval"] and list(cfg.eval) == ["geometry"]
    assert checking.check_command([*words, *extra], multirun=False, look=True).derived == [], (
        "a job that gets the derived settings derives nothing"
    )
    said = composition.job_config(
        composition.compose([*words, *(item for item in extra if not item.startswith("derived"))])
    )
    assert run_hash(cfg) == run_hash(said), "derived and given settings make the same run"


def test_the_name_of_a_run_has_what_was_typed_and_its_hash_what_was_derived(images):
    words = ["data=folder", f"data.root={images / 'flat'}", "tracking=ledger", "batch=16", "epochs=5"]
    checked = checking.check_command(words, multirun=False, look=True)
    cfg = composition.compose([*words, *checked.derived])
    (folder,) = checked.folders
    assert checked.derived and folder.name == f"batch-16_data-folder_epochs-5-{run_hash(cfg)}"
    assert labels.title([*words, *checked.derived]) == "data=folder batch=16 epochs=5"
    assert run_hash(cfg) != run_hash(composition.compose(words)), "the derived settings still distinguish runs"


def test_the_same_run_under_another_name_is_pointed_out(images, tmp_path, capsys):
    """As a run that an earlier version began, whose name contained the derived settings too."""
    words = ["data=folder", f"data.root={images / 'flat'}", "tracking=ledger", "batch=16", "epochs=5"]
    cfg = composition.compose([*words, *checking.check_command(words, multirun=False, look=True).derived])
    former, today = tmp_path / f"batch-16_eval-geometry-{run_hash(cfg)}", tmp_path / f"batch-16-{run_hash(cfg)}"
    directory.write_config(former, composition.job_config(cfg))
    directory.open_run(today, composition.job_config(cfg))
    told = capsys.readouterr().err
    assert f"caco: {former} is the same run, " in told and f"add hydra.run.dir={former}" in told


@pytest.mark.parametrize(
    ("folder", "given", "expected"),
    [
        ("flat", ["batch=16", "eval=[knn]"], ["eval=[knn]: expected labelled training and test images"]),
        ("flat", ["batch=16", "eval.knn.k=5"], ["eval=[knn,probe]: expected labelled"]),
        (
            "flat",
            ["eval=[]", "epochs=5", "schedule.warmup_epochs=5", "batch=16"],
            ["schedule.warmup_epochs: expected less than the 5 epochs"],
        ),
        (
            "split",
            ["batch=64", "eval.linear.batch=81", "eval=[linear]"],
            ["eval.linear.batch: expected at most 80, the number of labelled"],
        ),
        (
            "split",
            ["batch=64", "eval=[knn]", "eval.knn.fraction=0.1"],
            ["eval.knn.k: expected at most 8, the number of labelled"],
        ),
        (
            "flat",
            ["eval=[]"],
            ["batch: expected at most 30, the number of training images of folder, got 1,024; batch=16 leaves 1 step"],
        ),
        ("empty", ["eval=[]"], ["{root}: expected images"]),
        ("flat", ["preset=demo", "data=folder", "batch=16"], ["eval=[knn,probe]: expected labelled"]),
    ],
)
def test_what_the_command_line_or_a_preset_gives_is_refused_and_not_replaced(images, folder, given, expected):
    lines = refused(images / folder, *given)
    assert len(lines) == len(expected), lines
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start.format(root=images / folder))


def test_one_refusal_names_all_that_is_wrong_with_settings_and_folder(images):
    lines = refused(
        images / "flat", "eval=[linear]", "epochs=5", "schedule.warmup_epochs=7", "method.temperature=-1", "seed=-1"
    )
    for start in ("seed:", "method.temperature:", "schedule.warmup_epochs:", "eval=[linear]:", "batch:"):
        assert sum(line.startswith(start) for line in lines) == 1, (start, lines)


def test_a_sweep_whose_jobs_would_need_different_values_is_refused(images):
    with pytest.raises(
        UserError,
        match="^the jobs of this sweep would need different values of settings that are not set:"
        " schedule.warmup_epochs=0.5",
    ):
        words = ["data=folder", f"data.root={images / 'flat'}", "batch=16", "eval=[]", "epochs=5,50"]
        checking.check_command(words, multirun=True, look=True)


def test_no_configuration_that_ran_before_gets_another_identity():
    """Only settings that would be refused are derived, and the list of them is not part of a run's identity."""
    cfg = plain(composition.job_config(composition.compose(["preset=demo"])))
    assert not {"derived", "continued_run"} & identity(cfg).keys()
    given = fitting.Given(["preset=demo"], ["demo"])
    assert fitting.fit(cfg, given, lambda data: None) == fitting.Fit()


def test_the_run_does_not_walk_over_the_folder_a_second_time(images, monkeypatch):
    words = [
        "data=folder",
        f"data.root={images / 'classes'}",
        "batch=64",
        "tracking=ledger",
        "data.validation_fraction=0.1",
        "eval=[]",
    ]
    checking.check_command(words, multirun=False, look=True)
    seen = []
    monkeypatch.setattr(walking.Walk, "_enter", lambda self, folder: seen.append(folder))
    data = plain(composition.job_config(composition.compose(words)))["data"]
    first = composition.instantiate(data)
    assert seen == [] and len(first.pretrain) == 72
    composition.instantiate(data)
    assert len(seen) == 2, "the next command reads the folder again"


def test_ten_thousand_files_take_a_moment(tmp_path):
    write(tmp_path / "one", 1, side=8)
    for folder in range(100):
        (tmp_path / "many" / str(folder)).mkdir(parents=True)
        for number in range(100):
            os.link(tmp_path / "one" / "0.png", tmp_path / "many" / str(folder) / f"{number}.png")
    begun = time.process_time()
    assert derived(tmp_path / "many", "eval=[]", "batch=64") == []
    assert time.process_time() - begun < 2


def test_a_folder_that_takes_longer_says_how_far_it_is(images, monkeypatch, capsys):
    monkeypatch.setattr(walking, "_QUIET_S", 0.0)
    derived(images / "flat", "eval=[]", "batch=16")
    assert f"caco: looking through {images / 'flat'}: 0 images so far" in capsys.readouterr().err
