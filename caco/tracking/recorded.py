"""A run as recorded in its directory, with today's names whichever version made it. All code that reads several runs
uses this module.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caco import metrics
from caco.errors import UserError
from caco.runs.files import read_json
from caco.runs.identity import flat
from caco.runs.renamed import Names, nested
from caco.tracking.ledger import read_rows
from caco.tracking.sync import last_status


@dataclass(frozen=True)
class Recorded:
    """Its configuration as dicts and lists, the rows of its ledger, and summary.json ({} before the run's end)."""

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def read(run_dir: Path) -> Recorded:
    """What a run has recorded so far; safe while another process is writing."""
    names = Names.of(run_dir)
    rows, _ = read_rows(run_dir / "ledger.jsonl")
    return Recorded(
        names.config, [names.row(row) for row in rows], names.summary(read_json(run_dir / "summary.json"), rows)
    )


@dataclass(frozen=True)
class Outline:
    """A run as one of many: what is known without reading its ledger.

    run_dir: its directory. state: finished, running, stopped (by a signal, after saving), killed, failed, incomplete
    (an evaluation at its end is missing), begun (it has not reached its first step), damaged. note: why it stopped or
    failed, or what it lacks, or "". options: group -> option with which it was started, as far as recorded. settings:
    the leaves of its configuration by today's dotted names. summary: {} before its end.
    """

    run_dir: Path
    state: str
    note: str
    options: dict[str, str]
    settings: dict[str, Any]
    summary: dict[str, Any]

    def value(self, name: str) -> Any:
        """The state, a setting, a metric of its summary, or an option; None if it has no such value."""
        for values in (
            {"state": self.state, "note": self.note, "run": str(self.run_dir)},
            self.settings,
            self.summary,
            self.options,
        ):
            if name in values:
                return values[name]
        return None


def directories(paths: Iterable[Path]) -> list[Path]:
    """The run directories at or below these folders, each once, sorted within each folder. Inside a run's directory no
    further runs are looked for.

    Raises:
        UserError: one of the folders holds no run.
    """
    found: dict[Path, None] = {}
    for path in paths:
        before, seen = len(found), set[tuple[int, int]]()
        for folder, below, files in os.walk(path, followlinks=True):
            try:
                status = os.stat(folder)
            except OSError:
                continue  # removed meanwhile
            if (status.st_dev, status.st_ino) in seen:  # by a link, to what holds it perhaps
                below.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            if "config.yaml" in files and ("environment.json" in files or "tracking.json" in files):
                found[Path(folder)] = None
                below.clear()
            below[:] = sorted(name for name in below if not name.startswith("."))
        if len(found) == before:
            raise UserError(f"expected a run's directory, or a folder of some, got {path}, which has none")
    return list(found)


def outline(run_dir: Path) -> Outline:
    """What can be said of a run in one row; safe while another process is writing."""
    try:
        return _outline(run_dir)
    except UserError as error:
        return Outline(run_dir, "damaged", str(error), {}, {}, {})


def _outline(run_dir: Path) -> Outline:
    about, summary = read_json(run_dir / "tracking.json"), read_json(run_dir / "summary.json")
    params = {name: typed(value) for name, value in about.get("params", {}).items()}
    groups = {"pn", "preset", *(name.partition(".")[0] for name in params if "." in name)}
    options = {name: str(value) for name, value in params.items() if name in groups}
    leaves = {name: value for name, value in params.items() if name not in options}
    names = Names(nested(leaves)) if leaves else Names.of(run_dir)
    if names.is_old:  # only the ledger tells which of its numbers were measured while training
        run = read(run_dir)
        names, summary = Names.of(run_dir), run.summary
    note = _lines(run_dir / "failure.txt")
    missing = metrics.missing_at_the_end(summary) if summary else []
    if summary:
        state = "incomplete" if missing else "finished"
    elif note:
        state = "failed"
    else:
        state = last_status(run_dir)[0].lower() if about else "begun"
        if state == "killed" and (note := _lines(run_dir / "stopped.txt")):
            state = "stopped"
    why = (missing or note)[-1] if missing or note else ""
    return Outline(
        run_dir,
        state,
        why if state in ("failed", "incomplete", "stopped") else "",
        options,
        flat(names.config),
        summary,
    )


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").strip().splitlines() if file.is_file() else []


def typed(text: Any) -> Any:
    """A parameter as a value, undoing the tracker's conversion to text."""
    try:
        return json.loads(text)
    except (ValueError, TypeError):
        return text
