"""docs/images.md: every command is accepted, and what the page names exists."""

import re
import shlex
from pathlib import Path

import pytest

from caco.config import validation
from caco.config.channels_needed import problems
from caco.config.composition import compose, job_config
from caco.data.sets.statistics import MOST_IMAGES
from caco.runs.identity import plain

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "images.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True) for line in re.findall(r"^\$ python -m caco\.train (.*)$", PAGE, re.MULTILINE)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_its_commands_can_be_typed(words):
    cfg = compose(words)
    validation.check(cfg, overrides=words, choices=dict(cfg.hydra.runtime.choices))


def test_it_says_how_many_images_are_measured():
    assert f"up to {MOST_IMAGES:,} images" in PAGE and len(COMMANDS) == 5


def test_the_evaluations_that_it_says_are_refused_are():
    said = re.search(r"photographs of their own \((.*?)\)", PAGE, re.DOTALL)[1]
    names = re.findall(r"`(\w+)`", said)
    options = {"domain": [], "detect": []} | {name: [] for name in names}
    cfg = plain(job_config(compose(["data=folder", "data.channels=5", f"eval=[{','.join(options)}]"])))
    assert {line.split(":")[0] for line in problems(cfg, [])} == {f"eval.{name}" for name in names}
