"""python -m caco.tracking.sync RUN_DIR ... : send to MLflow what it lacks of these runs, each row once.

Works on runs that were tracked with tracking=ledger, that lost their server, or that were killed; at any time, any
number of times, also while they are running. A run whose process is gone is ended as KILLED (or FINISHED, if it has a
summary) and does not stay RUNNING for ever. For a run on another machine, SLURM tells whether its job still exists;
without SLURM, a run that has written nothing for a day counts as gone.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from caco.errors import UserError, shown
from caco.redaction import redacted
from caco.runs import renamed
from caco.runs.files import process_start, read_json
from caco.runs.paths import expanded
from caco.saying import amount
from caco.tracking.feed import Feed, has_new_model, new_files, refresh_sweep
from caco.tracking.ledger import Ledger
from caco.tracking.store import connect, first_line, import_mlflow, own_uri, require_mlflow, resolve_uri
from caco.tracking.watermark import Watermark

_SILENT_HOURS = 24  # so long, because an evaluation may take hours without writing a row


def find_runs(paths: list[Path]) -> list[Path]:
    """The run directories at or below `paths`, each once, in order.

    Raises:
        UserError: one of the paths holds no run.
    """
    found: dict[Path, None] = {}
    for path in paths:
        runs = sorted(file.parent for file in path.rglob("tracking.json"))
        if not runs:
            raise UserError(f"expected a run directory, or a folder of them, got {path} (no tracking.json)")
        found.update(dict.fromkeys(runs))
    return list(found)


def last_status(run_dir: Path) -> tuple[str, dict[str, Any]]:
    """How the run ended, or "RUNNING"; and its summary."""
    about, summary = read_json(run_dir / "tracking.json"), read_json(run_dir / "summary.json")
    status = about["status"]
    if status == "RUNNING" and _is_gone(run_dir, about):
        status = summary.get("status", "FINISHED") if summary else "KILLED"
    return status, summary


def _is_gone(run_dir: Path, about: dict[str, Any]) -> bool:
    began = about["process_start"]
    if about["host"] == socket.gethostname():
        return began != "" and process_start(about["pid"]) != began
    job = about["tags"].get("slurm_job_id")
    if job and (runs := _runs_in_slurm(job)) is not None:
        return not runs
    signs = (run_dir / name for name in ("ledger.jsonl", "system.jsonl", "tracking.json"))
    return max(sign.stat().st_mtime for sign in signs if sign.exists()) < time.time() - _SILENT_HOURS * 3600


def _runs_in_slurm(job: str) -> bool | None:
    """Whether a job has processes now; None if SLURM does not tell. A job waiting in the queue has none, and goes on
    later.
    """
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if shown.returncode and "Invalid job id" not in shown.stderr:
        return None  # the controller does not answer, or the job was on another cluster
    return any(
        state in shown.stdout.split() for state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING")
    )


def sync_run(run_dir: Path, *, uri: str | None = None, experiment: str | None = None, check: bool = True) -> str:
    """Bring MLflow up to date with one run directory; returns a line that says what happened, and where.

    Uses the run's own store and experiment (caco/tracking/store.py: own_uri), unless `uri` or `experiment` name others,
    which then become the run's own.

    Args:
        check: count what the store really has, instead of trusting what was noted here when it was sent.
    Raises:
        UserError: the store did not keep what it was sent, or its password is not known here.
        Exception: whatever MLflow raises; what has arrived is noted, and the next call continues from there.
    """
    mark = Watermark.load(run_dir)
    uri = own_uri(run_dir, uri)
    status, summary = last_status(run_dir)
    num_rows = len(Ledger(run_dir / "ledger.jsonl"))
    is_complete = mark.sent == num_rows and mark.system_sent == len(Ledger(run_dir / "system.jsonl"))
    is_complete = is_complete and not new_files(run_dir, mark) and not has_new_model(run_dir, mark)
    is_complete = is_complete and (mark.has_todays_names or not renamed.is_old(run_dir))
    is_complete = is_complete and mark.closed == status and mark.uri == redacted(uri)
    complete = f"complete ({status}, {amount(num_rows, 'row')} in {redacted(uri)})"
    if is_complete and not check:
        return complete
    about = read_json(run_dir / "tracking.json")
    name = about.get("store", {}).get("experiment") or about["params"].get("name")
    feed = Feed(run_dir, uri=uri, experiment=experiment or mark.experiment or name or "caco")
    try:
        if check and mark.run_id and mark.uri == redacted(uri):
            if missing := feed.missing():
                feed.forget_what_was_sent()
            elif is_complete:
                return complete
        feed.open()
        num_sent = feed.send()
        if status != "RUNNING":
            feed.end(status, summary)
        if check and (missing := feed.missing()):
            raise UserError(
                f"the store {redacted(uri)} lacks {missing} of the points just sent; the ledger keeps all of them"
            )
    finally:
        feed.release()
    return f"sent {amount(num_sent, 'row')} of {feed.mark.sent} to {redacted(uri)} ({status}, run {feed.mark.run_id})"


def sync(
    run_dirs: list[Path], *, uri: str | None = None, experiment: str | None = None, check: bool = True
) -> tuple[list[str], int]:
    """Run sync_run() for each run; then update the status of the runs that stand for sweeps.

    Returns:
        A line for each run, and the number of runs that could not be sent.
    """
    lines, failed, parents = [], 0, {}
    for run_dir in run_dirs:
        try:
            line = sync_run(run_dir, uri=uri, experiment=experiment, check=check)
            mark = Watermark.load(run_dir)
            if mark.parent_id:
                parents[own_uri(run_dir, uri), mark.parent_id] = mark.experiment
        except BlockingIOError:
            line = "skipped: a running process is sending it"
        except Exception as error:  # noqa: BLE001 - databases, HTTP and MLflow raise anything; send the other runs
            failed += 1
            line = f"not sent: {first_line(error)}"
        lines.append(f"{run_dir}: {line}")
    for (at, parent_id), name in parents.items():
        try:
            refresh_sweep(*connect(at, name), parent_id)
        except Exception as error:  # noqa: BLE001 - as above
            failed += 1
            lines.append(f"sweep {parent_id}: not brought up to date: {first_line(error)}")
    return lines, failed


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 if anything could not be sent, else 0."""
    parser = argparse.ArgumentParser(prog="python -m caco.tracking.sync", description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", type=expanded, metavar="RUN_DIR", help="a run, or a directory of runs")
    parser.add_argument("--uri", help="send to this MLflow server or database, from now on the run's own store")
    parser.add_argument("--experiment", metavar="NAME", help="default: the run's name, else caco")
    options = parser.parse_args(arguments)
    with shown():
        require_mlflow()
        runs = find_runs(options.run_dirs)
        if options.uri:
            resolve_uri(options.uri)
        import_mlflow()
        lines, failed = sync(runs, uri=options.uri, experiment=options.experiment)
        print("\n".join(lines), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
