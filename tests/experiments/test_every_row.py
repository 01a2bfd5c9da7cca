"""Every row of every table is trained and evaluated at the smallest scale."""

import json
import sys

import pytest

from experiments import run, tables
from experiments.tables import experiments, load_scale, load_table

# From two of our own tables, only the rows that differ from all others; the rest are settings of methods that are in
# the paper's tables, too.
SOME = {"study_bank": ["weighted", "blended", "balanced", "renewed"], "cifar10_repetitions": ["mocov2_symmetric"]}


@pytest.mark.long
@pytest.mark.timeout(1800)  # about ninety runs of five to ten seconds each
def test_every_row_of_every_table_is_trained_at_the_smallest_scale(monkeypatch, tmp_path):
    """Most rows train on digits. Methods that need larger or coloured images use tiles of two photographs, and AdCo's
    page is evaluated on toy sets.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "RECORDS", tmp_path / "records")
    scale = load_scale("smoke")
    measured = [name for name in tables.tables() if load_table(name).columns.keys() & scale.metrics.keys()]
    assert {f"table{number}" for number in (1, 2, 3, 4, 6, 7)} <= set(measured)
    for name in measured:
        chosen = [f"rows={','.join(SOME[name])}"] if name in SOME else []
        monkeypatch.setattr(sys, "argv", ["run", name, "scale=smoke", "seed=0", *chosen])
        with pytest.raises(SystemExit) as end:
            run.main()
        assert end.value.code in (0, None), name
    made = json.loads((tmp_path / "runs/smoke/record.json").read_text())
    trained = {entry["config_hash"]: entry["summary"] for entry in made["runs"]}
    for name in tables.tables():  # rows of Table V are runs of Table II with more evaluations
        for one in experiments(load_table(name), scale, rows=SOME.get(name)):
            assert one.why_not is None and 0 <= trained[one.hash(0)]["knn20_top1"] <= 100, one.name
