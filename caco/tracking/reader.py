"""Reads a ledger for everyone who sends it elsewhere: each point once, even if processes are killed, resumed or
offline.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from caco.tracking.ledger import read_rows
from caco.tracking.watermark import Watermark, is_finite, milliseconds, points

_ROWS_A_PART = 200


class Point(NamedTuple):
    """A number of a series named KIND/NAME, so the loss of steps and that of epochs are different series."""

    kind: str
    step: int
    name: str
    time_ms: int
    value: float


class Reader:
    """Reads the new rows in the ledger of a run directory.

    Args:
        mark: how far the receiver is; updated and saved as parts are taken.
    non_finite: names of the series that had numbers which are not finite. These numbers stay in the ledger.
    """

    def __init__(self, run_dir: Path, mark: Watermark) -> None:
        self._run_dir, self._mark = run_dir, mark
        self._names = mark.todays_names(run_dir)
        self._offset = 0  # bytes of the ledger that have been read
        self._skip = mark.sent  # number of rows after them that were already sent
        self.non_finite: set[str] = set()

    def parts(self) -> Iterator[list[Point]]:
        """The points of some rows at a time. Asking for the next part confirms that the previous one has arrived."""
        rows, end = read_rows(self._run_dir / "ledger.jsonl", self._offset)
        rows, self._skip = [self._names.row(row) for row in rows[self._skip :]], 0
        for first in range(0, len(rows), _ROWS_A_PART):
            part = rows[first : first + _ROWS_A_PART]
            self._mark.attempted = self._mark.sent + len(part)
            self._mark.save(self._run_dir)
            yield self.points_of(part)
            self._mark.sent += len(part)
            self._mark.save(self._run_dir)
        self._offset = end

    def points_of(self, rows: list[dict[str, Any]]) -> list[Point]:
        """The rows' finite numbers. Points that were sent before a roll-back are left out; points that may have been
        sent keep their earlier time and value.
        """
        found = []
        for row in rows:
            for (kind, step, name), value in points(row):
                old = self._mark.rolled_back.get((kind, step, name), (milliseconds(row), value))
                if not is_finite(value):
                    self.non_finite.add(f"{kind}/{name}")
                elif old is not None:
                    found.append(Point(kind, step, name, old[0], float(old[1])))
        return found
