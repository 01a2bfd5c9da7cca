"""What a run has recorded, and comparisons of two runs to the last bit."""

import torch

from caco.runs.checkpoint import load
from caco.tracking.ledger import read_rows

CLOCK = ("time", "images_per_second")  # the only values in a ledger that may differ between equal runs


def record(run_dir):
    rows, _ = read_rows(run_dir / "ledger.jsonl")
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def final(run_dir):
    return load(sorted((run_dir / "checkpoints").glob("*.pt"))[-1])


def assert_same(a, b, where="state"):
    """Assert that two nested structures are equal to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in CLOCK:
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{number}")
    else:
        assert a == b, where
