"""A damaged file is either read or refused with a message: there is no crash, no hang and no traceback."""

import damaging
import pytest


@pytest.mark.parametrize(("kind", "count"), [("jpegs", 300), ("betons", 100), ("checkpoints", 40), ("weights", 40)])
def test_damaged_files_are_read_or_refused(kind, count):
    found, bad = damaging.outcomes(kind, count)
    assert not bad, "\n".join(bad)
    assert found["refused"] > count / 10


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("kind", "first", "count"),
    [
        ("jpegs", 300, 1000),
        ("betons", 100, 1000),
        ("checkpoints", 40, 200),
        ("weights", 40, 160),
        ("disks", 0, 12),
        ("kills-train", 0, 8),
        ("kills-evaluate", 0, 8),
        ("kills-export", 0, 8),
        ("kills-sync", 0, 12),
        ("kills-sweep", 0, 4),
        ("kills-jobs", 0, 1),
        ("servers", 0, 5),
    ],
)
def test_many_more_are_too(kind, first, count):
    _, bad = damaging.outcomes(kind, count, first=first)
    assert not bad, "\n".join(bad)
