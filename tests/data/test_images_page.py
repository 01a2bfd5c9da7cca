"""docs/images.md: the numbers and evaluators that the page names are those of the code."""

import re
from pathlib import Path

from caco.config.channels_needed import problems
from caco.config.composition import compose, job_config
from caco.data.sets.statistics import MOST_IMAGES
from caco.runs.identity import plain

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "images.md").read_text(encoding="utf-8")


def test_it_says_how_many_images_are_measured():
    assert f"up to {MOST_IMAGES:,} images" in PAGE


def test_the_evaluations_that_it_says_are_refused_are():
    said = re.search(r"photographs of their own \((.*?)\)", PAGE, re.DOTALL)[1]
    names = re.findall(r"`(\w+)`", said)
    options = {"domain": [], "detect": []} | {name: [] for name in names}
    cfg = plain(job_config(compose(["data=folder", "data.channels=5", f"eval=[{','.join(options)}]"])))
    assert {line.split(":")[0] for line in problems(cfg, [])} == {f"eval.{name}" for name in names}
