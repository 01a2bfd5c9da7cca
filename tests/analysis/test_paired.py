"""`python -m analysis.paired`: two settings are compared on the same test images, seed by seed."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny import compose, train

from analysis import paired
from caco.runs.directory import open_run


@pytest.fixture
def here(command):
    return command(paired)


def test_over_images_the_interval_is_that_of_the_normal_distribution():
    ahead = np.array([1] * 80 + [-1] * 40 + [0] * 280)  # 400 images of one seed: +10 points
    mean, low, high = paired.difference((ahead > 0)[None], (ahead < 0)[None])
    assert mean == pytest.approx(10)
    half = 100 * 1.96 * ahead.std() / 20
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.06)


def test_over_seeds_it_is_that_of_their_means():
    """Each seed is ahead, or not, on all images alike, so that only the draw of the seeds matters."""
    first, second = np.zeros((400, 10), dtype=bool), np.zeros((400, 10), dtype=bool)
    first[:280], second[280:] = True, True
    mean, low, high = paired.difference(first, second)
    assert mean == pytest.approx(40)
    half = 100 * 1.96 * np.sqrt(1 - 0.4**2) / 20
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.1)


def test_images_that_both_get_right_or_wrong_add_nothing():
    right = np.random.default_rng(0).random((3, 50)) < 0.7
    assert paired.difference(right, right) == (0, 0, 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    settings = {"a0": ["pn=both"], "b0": ["pn=none"], "b1": ["pn=none", "seed=1"]}
    for name, chosen in settings.items():
        overrides = ["data.limit=256", "eval=[knn_all]", *chosen]
        bank = name == "a0"
        open_run(folder / name, compose(*overrides, bank=bank))
        train(folder / name, *overrides, bank=bank)
    return folder


def test_the_accuracies_are_those_of_the_runs_and_a_kept_file_says_the_same(here, runs):
    code, told, _ = here(str(runs / "a0"), "--than", str(runs / "b0"), "--to", "kept.json")
    assert code == 0
    for name in ("a0", "b0"):
        accuracy = json.loads((runs / name / "summary.json").read_text())["knn20_top1"]
        assert f"{accuracy:.2f} {name}" in told
    assert "mean difference" in told and "bootstrap over 1 seeds and 397 images" in told
    assert here("kept.json")[:2] == (0, told)


@pytest.mark.parametrize(
    "typed, refusal",
    [
        (["a0", "--than", "b1"], "expected each seed once on both sides, got seeds [0] and, for --than, [1]"),
        (["a0", "--than", "b0", "b0"], "got seeds [0] and, for --than, [0, 0]"),
        (["a0"], "expected RUNS --than RUNS, or one file that --to has written"),
        (["a0/summary.json"], "expected RUNS --than RUNS, or one file that --to has written"),
        (["a0", "--than", "nowhere"], "nowhere: expected a run's directory, got none"),
    ],
)
def test_what_cannot_be_compared_is_refused(here, runs, typed, refusal):
    words = [word if word.startswith("--") else str(runs / word) for word in typed]
    code, _, errors = here(*words)
    assert code == 2 and refusal in errors


def test_a_kept_file_is_told_without_torch():
    program = "import sys, analysis.paired; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
