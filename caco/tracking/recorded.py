"""A run as it lies in its directory, by today's names, whichever version made it. What reads several runs reads them through this."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caco.runs.files import read_json
from caco.runs.renamed import Names
from caco.tracking.ledger import read_rows


@dataclass(frozen=True)
class Recorded:
    """Its configuration as dicts and lists, the rows of its ledger, and summary.json ({} before the run's end)."""

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def read(run_dir: Path) -> Recorded:
    """What a run has written so far; safe beside a process that is writing."""
    names = Names.of(run_dir)
    rows, _ = read_rows(run_dir / "ledger.jsonl")
    return Recorded(names.config, [names.row(row) for row in rows], names.summary(read_json(run_dir / "summary.json"), rows))
