"""python -m caco.tracking.sync RUN_DIR ... : send to MLflow what it lacks of these runs, once each.

Works on runs that were tracked with tracking=ledger, that lost their server, or that were killed; at any time, as often
as one likes, and beside runs that are still going on. A run whose process is gone ends as KILLED (or FINISHED, if its
summary is there), never for ever RUNNING; a run on another machine is left RUNNING, since only there one can know.
"""

import argparse
import socket
import sys
from pathlib import Path
from typing import Any

from caco.tracking.feed import Feed, first_line, import_mlflow, require_mlflow, resolve_uri
from caco.tracking.files import process_start, read_json
from caco.tracking.ledger import Ledger
from caco.tracking.watermark import Watermark


def find_runs(paths: list[Path]) -> list[Path]:
    """The run directories at or below `paths`, each once, in order.

    Raises:
        ValueError: there is none below one of them.
    """
    found: dict[Path, None] = {}
    for path in paths:
        runs = sorted(file.parent for file in path.rglob("tracking.json"))
        if not runs:
            raise ValueError(f"expected a run directory, or one that holds some, got {path} (no tracking.json)")
        found.update(dict.fromkeys(runs))
    return list(found)


def last_status(run_dir: Path) -> tuple[str, dict[str, Any]]:
    """How the run ended, or "RUNNING", and its summary."""
    about, summary = read_json(run_dir / "tracking.json"), read_json(run_dir / "summary.json")
    status = about["status"]
    if status == "RUNNING" and _is_gone(about):
        status = summary.get("status", "FINISHED") if summary else "KILLED"
    return status, summary


def _is_gone(about: dict[str, Any]) -> bool:
    began = about["process_start"]
    return about["host"] == socket.gethostname() and began != "" and process_start(about["pid"]) != began


def sync_run(run_dir: Path, *, uri: str | None = None, experiment: str | None = None) -> str:
    """Bring MLflow up to date with one run directory; returns a line that says what happened.

    Where `uri` or `experiment` is None, what the run was sent to before holds.
    Raises:
        Exception: whatever MLflow raises; what arrived is noted, and the next call goes on from there.
    """
    mark = Watermark.load(run_dir)
    uri = resolve_uri(uri or mark.uri or None)
    status, summary = last_status(run_dir)
    num_rows = len(Ledger(run_dir / "ledger.jsonl"))
    if mark.closed == status and mark.sent == num_rows and mark.uri == uri:
        return f"complete ({status}, {num_rows} rows)"
    feed = Feed(run_dir, uri=uri, experiment=experiment or mark.experiment or "caco")
    try:
        feed.open()
        num_sent = feed.send()
        if status != "RUNNING":
            feed.end(status, summary)
    finally:
        feed.release()
    return f"sent {num_sent} rows of {feed.mark.sent} ({status}, run {feed.mark.run_id})"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the number of runs that could not be sent, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m caco.tracking.sync", description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="a run, or a directory of runs")
    parser.add_argument("--uri", help="MLflow server or database; default: the run's, else as tracking=mlflow")
    parser.add_argument("--experiment", metavar="NAME", help="default: the run's, else caco")
    options = parser.parse_args(arguments)
    try:
        require_mlflow()
        runs = find_runs(options.run_dirs)
        if options.uri:
            resolve_uri(options.uri)
    except (ModuleNotFoundError, ValueError) as error:
        parser.error(str(error))
    import_mlflow()
    failed = 0
    for run_dir in runs:
        try:
            line = sync_run(run_dir, uri=options.uri, experiment=options.experiment)
        except BlockingIOError:
            line = "skipped: a running process is sending it"
        except Exception as error:  # noqa: BLE001 - databases, HTTP and MLflow raise what they like; the others go on
            failed = 1
            line = f"not sent: {first_line(error)}"
        print(f"{run_dir}: {line}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
