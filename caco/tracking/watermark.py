"""How far a run's ledger is where it is sent to: the side file mlflow.json or wandb.json, kept apart from checkpoints
because it runs ahead.
"""

import dataclasses
import math
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Self

from caco.runs.files import locked, read_json, write_json
from caco.runs.renamed import Names

Point = tuple[str, int, str]  # kind, step, name of the value
_NAMES = "names of metrics"


@dataclasses.dataclass
class Watermark:
    """What MLflow, or another, has of a run directory.

    Before a batch leaves, `attempted` moves; after it arrived, `sent`. Between the two a kill leaves rows of which
    nobody here knows whether they arrived: they are sent again, with their old times and values, and MLflow keeps one
    of two equal points.
    """

    FILE: ClassVar[str] = "mlflow"  # of its name, before .json and .lock

    run_id: str = ""
    token: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)  # finds a run whose id did not get here
    uri: str = ""
    experiment: str = ""
    sent: int = 0  # ledger rows
    attempted: int = 0
    closed: str = ""  # the final status that MLflow has
    parent_id: str = ""  # the sweep's run
    system_sent: int = 0  # rows of system.jsonl
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # artifacts, and which state of each MLflow has
    model_id: str = ""
    # Points that were rolled back after they had been sent (None) or perhaps sent (their time in ms, and value).
    rolled_back: dict[Point, tuple[int, float] | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """That of `run_dir`, or a fresh one."""
        content = read_json(cls.path(run_dir))
        entries = content.pop("rolled_back", [])
        rolled_back = {(kind, step, name): old and tuple(old) for kind, step, name, old in entries}
        return cls(**content, rolled_back=rolled_back)

    def save(self, run_dir: Path) -> None:
        """Write it, atomically."""
        content = dataclasses.asdict(self)
        content["rolled_back"] = [[*point, old] for point, old in self.rolled_back.items()]
        write_json(self.path(run_dir), content)

    @classmethod
    def path(cls, run_dir: Path) -> Path:
        return Path(run_dir) / f"{cls.FILE}.json"

    def todays_names(self, run_dir: Path) -> Names:
        """How the run is read. One that an earlier version has sent by its own names is sent once more, by today's."""
        names = Names.of(run_dir)
        if names.is_old and not self.has_todays_names:
            self.sent = self.attempted = 0
        self.files[_NAMES] = "today's"  # here, where the version that made the run does not mind it
        return names

    @property
    def has_todays_names(self) -> bool:
        return _NAMES in self.files

    def restart(self) -> None:
        """Forget the run: MLflow has nothing."""
        self.run_id, self.token, self.closed = "", uuid.uuid4().hex, ""
        self.parent_id = self.model_id = ""
        self.sent = self.attempted = self.system_sent = 0
        self.files = {}
        self.rolled_back = {}

    def roll_back(self, rows: list[dict[str, Any]], num_rows: int) -> None:
        """Keep in mind which points MLflow has, or may have, of the `rows` behind the first `num_rows`.

        By point and not by row number: the cadence of logging may be another after a resume.
        """
        kept = {point for row in rows[:num_rows] for point, _ in points(row)}
        self.rolled_back = {point: old for point, old in self.rolled_back.items() if point not in kept}
        for number, row in enumerate(rows[num_rows : self.attempted], start=num_rows):
            for point, value in points(row):
                if is_finite(value):  # MLflow gets no others
                    # A point known from an earlier roll-back is in MLflow as it was then, not as in this row.
                    old = self.rolled_back.get(point, (milliseconds(row), value))
                    self.rolled_back[point] = None if number < self.sent else old
        self.sent = min(self.sent, num_rows)
        self.attempted = min(self.attempted, num_rows)


class OfWandb(Watermark):
    """What Weights & Biases has."""

    FILE = "wandb"


class OfNobody(Watermark):
    """Of what is made anew from the whole ledger whenever it is opened."""

    def save(self, run_dir: Path) -> None:
        """Nothing."""


def roll_back(run_dir: Path, rows: list[dict[str, Any]], num_rows: int, *, wait_s: float) -> None:
    """Prepare the watermarks of `run_dir`, if it has some, for a ledger cut to `num_rows`.

    Raises:
        BlockingIOError: another process has been sending this run for longer than `wait_s` seconds.
    """
    for kind in (Watermark, OfWandb):
        if kind.path(run_dir).exists():
            with sending(run_dir, wait_s=wait_s, kind=kind):
                watermark = kind.load(run_dir)
                watermark.roll_back(rows, num_rows)
                watermark.save(run_dir)


def sending(run_dir: Path, *, wait_s: float, kind: type[Watermark] = Watermark) -> AbstractContextManager[None]:
    """The lock of those who send this run to MLflow, or to whom `kind` names."""
    return locked(Path(run_dir) / f"{kind.FILE}.lock", wait_s=wait_s)


def points(row: dict[str, Any]) -> list[tuple[Point, float | int]]:
    """A row's numbers, each with the point that it is of its series."""
    values = ((name, value) for name, value in row.items() if name not in ("kind", "step", "time"))
    return [((row["kind"], row["step"], name), v) for name, v in values if not isinstance(v, str)]


def is_finite(value: float | int) -> bool:
    """Whether it is a finite float, or an int that can become one."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def milliseconds(row: dict[str, Any]) -> int:
    """The row's time as MLflow counts it."""
    return int(row["time"] * 1000)
