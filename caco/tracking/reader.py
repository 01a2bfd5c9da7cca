"""The one way in which a ledger is read by who sends it on: each point once, whatever is killed, resumed or down."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from caco.tracking.ledger import read_rows
from caco.tracking.watermark import Watermark, is_finite, milliseconds, points

_ROWS_A_PART = 200


class Point(NamedTuple):
    """A number of a series, which is called KIND/NAME: the loss of a step and that of an epoch are two."""

    kind: str
    step: int
    name: str
    time_ms: int
    value: float


class Reader:
    """What is new in the ledger of a run directory.

    Args:
        mark: how far it is where it is sent to; kept up to date, and saved, as parts are taken.
    non_finite: the series that had numbers which are not finite. These stay in the ledger.
    """

    def __init__(self, run_dir: Path, mark: Watermark) -> None:
        self._run_dir, self._mark = run_dir, mark
        self._names = mark.todays_names(run_dir)
        self._offset = 0  # bytes of the ledger that are read
        self._skip = mark.sent  # of the rows behind them, how many were sent
        self.non_finite: set[str] = set()

    def parts(self) -> Iterator[list[Point]]:
        """The points of some rows at a time; asking for the next part says that this one has arrived."""
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
        """The rows' finite numbers, without those that were sent before a roll-back, and those that perhaps were as
        they were then.
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
