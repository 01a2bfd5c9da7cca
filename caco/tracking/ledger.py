"""The ledger: the record of a run, one row per line as JSON, written before the numbers go anywhere else."""

import json
import logging
import math
import numbers
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caco.errors import FileError, UserError
from caco.ranges import NonNegative, held
from caco.redaction import redacted
from caco.runs.files import process_start, read_json, write_json
from caco.tracking import watermark
from caco.tracking.base import Row, Tracker

if TYPE_CHECKING:
    from torch import nn

    from caco.tracking.system import Sampler

_log = logging.getLogger(__name__)

# JSON cannot express these. They are written as strings, and become floats again when they are read.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_OWN_KEYS = ("kind", "step", "time")


def _encode(name: str, value: float | int | str) -> float | int | str:
    if isinstance(value, str):
        if value in _NON_FINITE:
            raise ValueError(f"{name}: expected text, got {value!r}, which stands for a float in the ledger")
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        value = float(value)
        if math.isfinite(value):
            return value  # json writes repr(), which reads back exactly the same float
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    raise ValueError(f"{name}: expected a float, an int or a str, got {type(value).__name__}")


def _decode(line: bytes, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"a {type(row).__name__}")
    except ValueError as error:
        raise UserError(f"{path}: expected one JSON object a line, got {line[:80]!r}") from error
    return {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()}


def read_rows(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The complete rows from byte `offset` on, and the offset after them; an incomplete last line is left out.

    Safe while another process is writing.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read()
    except FileNotFoundError:
        return [], offset
    end = content.rfind(b"\n") + 1
    return [_decode(line, path) for line in content[:end].splitlines()], offset + end


class Ledger:
    """Rows of numbers in a file of JSON Lines: "kind", "step", "time" (seconds since 1970) and the values.

    Once append() has returned, its row survives the death of the process; once sync() has, also that of the machine.
    The first append() or truncate() opens the file for writing; only one process may write at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._fd: int | None = None
        self._num_rows = 0
        self._size = 0

    def append(self, kind: str, step: int, values: Row) -> None:
        """Add one row.

        Raises:
            ValueError: a value is not a float, int or str, or its name is one of the row's own keys.
            OSError: the disk is full; earlier rows are complete, and nothing of this one is left.
        """
        row: dict[str, Any] = {"kind": kind, "step": int(step), "time": time.time()}
        for name, value in values.items():
            if name in _OWN_KEYS:
                raise ValueError(f"expected value names other than {', '.join(_OWN_KEYS)}, got {name!r}")
            row[name] = _encode(name, value)
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        fd = self._open()
        written = 0
        try:
            # Unbuffered: once written, the data are the kernel's, and a forked worker has no buffer to write again.
            while written < len(line):
                written += os.write(fd, line[written:])
        except OSError as error:
            os.ftruncate(fd, self._size)
            raise FileError(error.errno, error.strerror, str(self.path)) from error
        self._size += len(line)
        self._num_rows += 1

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows, oldest first."""
        return read_rows(self.path)[0]

    def __len__(self) -> int:
        if self._fd is not None:
            return self._num_rows
        try:
            return self.path.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def truncate(self, num_rows: int) -> None:
        """Keep the first `num_rows` rows.

        A single ftruncate at the end of a row: a kill leaves either all rows or exactly these, and it works on a full
        disk.

        Raises:
            UserError: there are fewer rows.
        """
        fd = self._open()
        if not 0 <= num_rows <= self._num_rows:
            raise UserError(f"{self.path}: expected at least {num_rows} rows, got {self._num_rows}")
        with open(self.path, "rb") as file:
            size = sum(len(file.readline()) for _ in range(num_rows))
        os.ftruncate(fd, size)
        os.fsync(fd)
        self._num_rows, self._size = num_rows, size

    def sync(self) -> None:
        """Return once all rows are on the disk."""
        os.fsync(self._open())

    def close(self) -> None:
        """Close the file; a later append() opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> int:
        if self._fd is None:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            content = self.path.read_bytes()
            self._num_rows = content.count(b"\n")
            self._size = content.rfind(b"\n") + 1
            if self._size < len(content):
                os.ftruncate(fd, self._size)  # remove a line cut off by a kill, so that no new row is appended to it
            self._fd = fd
        return self._fd


class LedgerTracker(Tracker):
    """Tracks a run in its directory only; `python -m caco.tracking.sync` can send it to MLflow at any time.

    Files: ledger.jsonl (the record), system.jsonl (the machine's load), tracking.json (name, parameters, tags, process,
    status).

    Args:
        system_seconds: seconds between two records of the machine's load; 0 turns them off.
        paper: published values by the names of our metrics, such as {linear_top1: 71.3}; MLflow shows them beside ours.
    """

    @held
    def __init__(self, *, system_seconds: NonNegative = 10.0, paper: dict[str, float] | None = None) -> None:
        self._system_seconds, self._paper = system_seconds, dict(paper or {})
        # Set by a tracker that also feeds a store: where the run belongs, for those who send it later.
        self.store: dict[str, str] | None = None
        self._ledger: Ledger | None = None
        self._sampler: Sampler | None = None

    def start(
        self,
        run_dir: Path,
        *,
        params: dict[str, Any],
        tags: dict[str, str],
        run_name: str,
        state: dict[str, Any] | None,
        sweep: dict[str, Any] | None = None,
    ) -> None:
        """Open the run's ledger and roll it back to a checkpoint's `state`, or empty it if there is none.

        Args:
            params, tags: by their names in MLflow; the tags "data" and "data_digest" name the data set.
            run_name: short; need not be unique.
            sweep: "name", unique in the experiment; "title"; "jobs", the number of its runs, 0 if unknown.
        Raises:
            UserError: the ledger has fewer rows than were written when the checkpoint was saved.
            BlockingIOError: another process has been sending this run to MLflow for a minute.
        """
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(run_dir / "ledger.jsonl")
        num_rows = state["rows"] if state else 0
        if num_rows < len(ledger):
            # First record which rows MLflow has, then remove them: a kill in between loses no information.
            watermark.roll_back(run_dir, ledger.rows(), num_rows, wait_s=60)
        ledger.truncate(num_rows)
        self._about = run_dir / "tracking.json"
        before = read_json(self._about)
        store = self.store or before.get("store")
        if sweep is None and before.get("sweep"):  # a job of a sweep that goes on alone stays one, and its name
            sweep, run_name = before["sweep"], before.get("run_name", run_name)
        about = {
            "run_name": run_name,
            "params": {name: redacted(_text(value)) for name, value in params.items()},
            "tags": {name: redacted(_text(value)) for name, value in tags.items()},
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "status": "RUNNING",
            "sweep": sweep,
            "paper": self._paper,
            **({"store": store} if store else {}),
        }
        write_json(self._about, about)
        self._ledger = ledger
        if self._system_seconds:
            from caco.tracking.system import Sampler

            self._sampler = Sampler(Ledger(run_dir / "system.jsonl"), self._system_seconds)
            self._sampler.start()

    def log(self, step: int, values: Row, kind: str = "train") -> None:
        """Add one row to the ledger; raises OSError, naming the file, if the disk is full."""
        assert self._ledger is not None, "start() first"
        self._ledger.append(kind, step, values)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the number of rows, which are all on the disk when this returns."""
        assert self._ledger is not None, "start() first"
        self._ledger.sync()
        return {"rows": len(self._ledger)}

    def log_model(self, make_backbone: "Callable[[], nn.Module]") -> None:
        """Does nothing: without MLflow the weights are only in the checkpoints."""

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Close the record with FINISHED, FAILED or KILLED; a second call, or one without a start, does nothing."""
        if self._ledger is None:
            return
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None
        self._ledger.close()
        self._ledger = None
        try:
            write_json(self._about, {**read_json(self._about), "status": status})
        except OSError as error:
            # Often the same disk error that ends the run and is already being raised.
            _log.warning("the run's end is not recorded: %s", error)


def close_left_open(run_dir: Path) -> None:
    """Note in tracking.json that a finished run has ended, if its process was killed before it could. Only for the
    holder of the run's lock.
    """
    about = read_json(run_dir / "tracking.json")
    if about.get("status") == "RUNNING":
        write_json(run_dir / "tracking.json", {**about, "status": "FINISHED"})


def _text(value: Any) -> str:
    """A parameter as it is typed on the command line: true and null, not True and None."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
