"""The commands of docs/runs.md, run on real runs."""

import re
import shlex

import pytest
import tiny

from caco import results
from caco.config import composition, continued, validation

BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def printed(page, program):
    lines = [
        line.removeprefix("$ ").partition("   #")[0]
        for block in BLOCK.findall(page.read_text())
        for line in block.splitlines()
    ]
    return [shlex.split(line)[3:] for line in lines if line.startswith(f"python -m {program} ")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    top = tmp_path_factory.mktemp("pages")
    tiny.train(
        top / "runs" / "one", "max_steps=null", "epochs=2", "data.limit=64", "eval=[knn_all]", "eval_every_epochs=2"
    )
    return top


def test_what_continues_a_run_composes(runs, repo_root):
    commands = [words for words in printed(repo_root / "docs/runs.md", "caco.train") if "continue_from=RUN" in words]
    assert len(commands) == 2
    for words in commands:
        words = [word.replace("RUN", str(runs / "runs/one")) for word in words]
        cfg = composition.job_config(composition.compose(words, continued.root(words)))
        validation.check(cfg, overrides=words, choices=continued.choices())
        assert (cfg.epochs, cfg.continued_epochs) == (400, 2)


def test_every_table_is_shown(runs, repo_root, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    commands = printed(repo_root / "docs/runs.md", "caco.results")
    assert len(commands) == 5
    for words in commands:
        # this option is recorded only by runs from a command line
        results.main([word for word in words if word != "method=caco"])
        assert "runs/one" in capsys.readouterr().out
