"""python -m caco.tracking.export RUN_DIR ... : the curves of any runs as CSV, in TensorBoard's files, or in Weights &
Biases.

  python -m caco.tracking.export runs/NAME --csv curves.csv       one line a number: run, kind, step, time, name, value
  python -m caco.tracking.export runs/ --tensorboard              then: tensorboard --logdir runs
  python -m caco.tracking.export runs/ --wandb PROJECT            --offline: without a network, for wandb sync

Works on runs of any tracking and version, at any time, beside runs that are still going on; to MLflow python -m
caco.tracking.sync sends.
"""

import argparse
import csv
import io
import os
import sys
from pathlib import Path
from typing import Literal

from caco.errors import UserError, shown
from caco.installed import is_installed
from caco.runs.files import write_text
from caco.runs.paths import expanded
from caco.tracking import recorded
from caco.tracking.fed import Feed
from caco.tracking.store import first_line
from caco.tracking.sync import find_runs, last_status
from caco.tracking.watermark import points

COLUMNS = ("run", "kind", "step", "time", "name", "value")


def write_csv(run_dirs: list[Path], file: Path) -> int:
    """Every number of these runs' ledgers, by today's names, one a line; a number that is not finite is nan, inf or
    -inf. Returns how many.

    run: the directory, from the folder that holds them all on. time: seconds since 1970.
    """
    common = Path(os.path.commonpath([run.absolute().parent for run in run_dirs]))
    out, count = io.StringIO(), 0
    table = csv.writer(out, lineterminator="\n")
    table.writerow(COLUMNS)
    for run_dir in run_dirs:
        name = run_dir.absolute().relative_to(common).as_posix()
        for row in recorded.read(run_dir).rows:
            for (kind, step, key), value in points(row):
                table.writerow((name, kind, step, repr(row["time"]), key, repr(value)))
                count += 1
    write_text(file, out.getvalue())
    return count


def send(feed: Feed, run_dir: Path) -> str:
    """Everything of one run that is not there yet; a line that says what happened."""
    try:
        feed.open()
        count = feed.send()
        status, summary = last_status(run_dir)
        if status != "RUNNING":
            feed.end(status, summary)
        return f"{count} points ({status})"
    except BlockingIOError:
        return "skipped: a running process is sending it"
    finally:
        feed.release()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 if a run could not be sent."""
    parser = argparse.ArgumentParser(prog="python -m caco.tracking.export", description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", type=expanded, metavar="RUN_DIR", help="a run, or a directory of runs")
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--csv", type=expanded, metavar="FILE")
    to.add_argument("--tensorboard", action="store_true", help="into the folder tensorboard/ of each run")
    to.add_argument("--wandb", metavar="PROJECT")
    parser.add_argument("--offline", action="store_true", help="with --wandb")
    options = parser.parse_args(arguments)
    failed = 0
    with shown():
        run_dirs = find_runs(options.run_dirs)
        if options.csv:
            print(f"{options.csv}: {write_csv(run_dirs, options.csv):,} numbers of {len(run_dirs)} runs")
            return 0
        package = "tensorboard" if options.tensorboard else "wandb"
        if not is_installed(package):
            raise UserError(f"{package} is not installed; to have it: pip install {package}")
        from caco.tracking.tensorboard import TensorBoardFeed
        from caco.tracking.wandb import WandbFeed, require_login

        mode: Literal["online", "offline"] = "offline" if options.offline else "online"
        if options.wandb and mode == "online":
            require_login()
        for run_dir in run_dirs:
            feed: Feed = (
                TensorBoardFeed(run_dir)
                if options.tensorboard
                else WandbFeed(run_dir, project=options.wandb, mode=mode)
            )
            try:
                print(f"{run_dir}: {send(feed, run_dir)}", flush=True)
            except Exception as error:  # noqa: BLE001 - libraries and networks raise what they like; the others go on
                failed = 1
                print(f"{run_dir}: not sent: {first_line(error)}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
