"""What docs/bank.md prints."""

import pytest
from test_negatives import commands

from caco.train import check_command
from experiments.tables import experiments, load_scale, load_table


@pytest.mark.long
def test_the_docs_commands_are_accepted(repo_root):
    printed = commands((repo_root / "docs/bank.md").read_text(encoding="utf-8"))
    assert [module for module, *_ in printed] == ["caco.train"] * 7 + ["experiments.run"]
    for module, *words in printed:
        if module == "caco.train":
            check_command(words, multirun=False)
        else:
            table, scale, rows = words
            chosen = rows.removeprefix("rows=").split(",")
            assert [
                one.row_id
                for one in experiments(load_table(table), load_scale(scale.removeprefix("scale=")), rows=chosen)
            ] == chosen
