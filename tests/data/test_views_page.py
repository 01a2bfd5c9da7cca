"""docs/views.md: every command is accepted, and the page's example of a user's own operation trains as printed."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import caco.train
from caco.config import folders, validation
from caco.config.composition import CONF, compose, instantiate
from caco.data.views import operations

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "views.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True) for line in re.findall(r"^\$ python -m caco\.train (.*)$", PAGE, re.MULTILINE)
]
OWN = [words for words in COMMANDS if words[0] == "--config-dir"]


@pytest.mark.parametrize("words", [words for words in COMMANDS if words not in OWN])
def test_its_commands_can_be_typed(words):
    cfg = compose(words)
    validation.check(cfg, overrides=words, choices=dict(cfg.hydra.runtime.choices))
    assert instantiate(cfg.augmentation).patches is not None


def test_its_tables_name_what_there_is():
    classes = {
        name
        for name, value in vars(operations).items()
        if isinstance(value, type) and value.__module__ == operations.__name__
    }
    assert set(re.findall(r"^\| `([A-Z]\w+)` \|", PAGE, re.MULTILINE)) == classes
    cut = {file.stem for file in (CONF / "augmentation").glob("*.yaml") if "patches:" in file.read_text()}
    rows = re.findall(r"^\| (`[a-z].*?) \|.*(?:InfoMin|PIRL|CPC v2) \|$", PAGE, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == cut


@pytest.fixture
def mine(tmp_path, monkeypatch):
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL):
        file = tmp_path / re.search(r"^# (mine/.*)$", block, re.MULTILINE)[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    yield tmp_path
    folders.use()


@pytest.mark.long
def test_an_operation_of_one_s_own_trains_as_printed(mine, monkeypatch):
    (words,) = OWN
    monkeypatch.setattr(
        sys, "argv", ["caco-train", *words, "tracking=ledger", "eval=[]", "max_steps=2", "hydra.run.dir=run"]
    )
    caco.train.main()
    assert (mine / "run" / "summary.json").is_file()
    cfg = compose(words[2:])
    views = instantiate(cfg.augmentation)
    white = np.full((16, 16, 3), 255, np.uint8)
    for made in views.batch_pixels([white] * 5, np.arange(5), 0):
        assert ((made == 0).all(-1).sum((1, 2)) >= 36).all(), "each view must contain a black square of 6 x 6 pixels"
