"""Records how much of a run's ledger a receiver has, in a side file, mlflow.json or wandb.json. This is not part of the
checkpoints, because it may be ahead of them.
"""

import contextlib
import dataclasses
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

from caco.runs.files import locked, read_json, remove_unfinished, write_json
from caco.runs.renamed import Names

Point = tuple[str, int, str]  # kind, step, name of the value
_NAMES = "names of metrics"


@dataclasses.dataclass
class Watermark:
    """What MLflow, or another receiver, has of a run directory.

    `attempted` advances before a batch is sent, `sent` after it has arrived. After a kill in between it is unknown
    whether the rows arrived: they are sent again, with their old times and values, and MLflow keeps one of two equal
    points.
    """

    FILE: ClassVar[str] = "mlflow"  # name of the side file and of its lock, without .json and .lock

    run_id: str = ""
    token: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)  # to find a run whose id was not saved
    uri: str = ""
    experiment: str = ""
    sent: int = 0  # number of ledger rows
    attempted: int = 0
    closed: str = ""  # the final status that MLflow has
    parent_id: str = ""  # id of the sweep's run
    system_sent: int = 0  # number of rows of system.jsonl
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # artifact -> the state of it that MLflow has
    model_id: str = ""
    # Points that were rolled back. Value: None if they had been sent before; if that is unknown, time in ms and value.
    rolled_back: dict[Point, tuple[int, float] | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """The watermark saved in `run_dir`, or a new one."""
        content = read_json(cls.path(run_dir))
        entries = content.pop("rolled_back", [])
        rolled_back = {(kind, step, name): old and tuple(old) for kind, step, name, old in entries}
        return cls(**content, rolled_back=rolled_back)

    def save(self, run_dir: Path) -> None:
        """Write it atomically."""
        content = dataclasses.asdict(self)
        content["rolled_back"] = [[*point, old] for point, old in self.rolled_back.items()]
        write_json(self.path(run_dir), content)

    @classmethod
    def path(cls, run_dir: Path) -> Path:
        return Path(run_dir) / f"{cls.FILE}.json"

    def todays_names(self, run_dir: Path) -> Names:
        """The names by which the run is read. A run that an earlier version sent under its own names is sent once
        more.
        """
        names = Names.of(run_dir)
        if names.is_old and not self.has_todays_names:
            self.sent = self.attempted = 0
        self.files[_NAMES] = "today's"  # an entry in `files` does not disturb the version that made the run
        return names

    @property
    def has_todays_names(self) -> bool:
        return _NAMES in self.files

    def restart(self) -> None:
        """Forget everything that was sent: another receiver gets it all. The token stays, by which a receiver that has
        had the run before knows it again.
        """
        self.run_id, self.closed = "", ""
        self.parent_id = self.model_id = ""
        self.sent = self.attempted = self.system_sent = 0
        self.files = {}
        self.rolled_back = {}

    def roll_back(self, rows: list[dict[str, Any]], num_rows: int) -> None:
        """Remember the points after the first `num_rows` of `rows` that MLflow has or may have.

        By point and not by row number, because a resumed run may log at other intervals.
        """
        kept = {point for row in rows[:num_rows] for point, _ in points(row)}
        self.rolled_back = {point: old for point, old in self.rolled_back.items() if point not in kept}
        for number, row in enumerate(rows[num_rows : self.attempted], start=num_rows):
            for point, value in points(row):
                if is_finite(value):  # others are never sent
                    # After an earlier roll-back, MLflow has the point of that time, not that of this row.
                    old = self.rolled_back.get(point, (milliseconds(row), value))
                    self.rolled_back[point] = None if number < self.sent else old
        self.sent = min(self.sent, num_rows)
        self.attempted = min(self.attempted, num_rows)


class OfWandb(Watermark):
    """What Weights & Biases has of a run directory."""

    FILE = "wandb"


class OfNobody(Watermark):
    """For output that is rewritten from the whole ledger whenever it is opened, so nothing needs to be recorded."""

    def save(self, run_dir: Path) -> None:
        """Does nothing."""


def roll_back(run_dir: Path, rows: list[dict[str, Any]], num_rows: int, *, wait_s: float) -> None:
    """Prepare the watermarks of `run_dir`, if there are any, for a ledger that is cut to `num_rows` rows.

    Raises:
        BlockingIOError: another process has been sending this run for longer than `wait_s` seconds.
    """
    for kind in (Watermark, OfWandb):
        if kind.path(run_dir).exists():
            with sending(run_dir, wait_s=wait_s, kind=kind):
                watermark = kind.load(run_dir)
                watermark.roll_back(rows, num_rows)
                watermark.save(run_dir)


@contextlib.contextmanager
def sending(run_dir: Path, *, wait_s: float, kind: type[Watermark] = Watermark) -> Iterator[None]:
    """Hold the lock for sending this run to MLflow, or to the receiver that `kind` names. What a sender that was killed
    was writing is removed.
    """
    with locked(Path(run_dir) / f"{kind.FILE}.lock", wait_s=wait_s):
        remove_unfinished(kind.path(run_dir))
        yield


def points(row: dict[str, Any]) -> list[tuple[Point, float | int]]:
    """The numbers of a row, each with its point: kind, step and name."""
    values = ((name, value) for name, value in row.items() if name not in ("kind", "step", "time"))
    return [((row["kind"], row["step"], name), v) for name, v in values if not isinstance(v, str)]


def is_finite(value: float | int) -> bool:
    """Whether the value is a finite float, or an int that can become one."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def milliseconds(row: dict[str, Any]) -> int:
    """The row's time in MLflow's unit."""
    return int(row["time"] * 1000)
