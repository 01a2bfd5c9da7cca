"""python -m caco.tracking.export RUN_DIR ... : write runs' curves as CSV or TensorBoard files, or send them to W&B.

  python -m caco.tracking.export runs/NAME --csv curves.csv       a line per number: run, kind, step, time, name, value
  python -m caco.tracking.export runs/ --tensorboard              then: tensorboard --logdir runs
  python -m caco.tracking.export runs/ --wandb PROJECT            --offline: without a network, for a later wandb sync

Works on runs of any tracker and version, at any time, also while they are running. To send runs to MLflow, use
python -m caco.tracking.sync.
"""

import argparse
import csv
import io
import os
import sys
from pathlib import Path
from typing import Literal

from caco.errors import UserError, shown
from caco.installed import is_installed, to_install
from caco.runs.files import write_text
from caco.runs.paths import expanded
from caco.saying import amount
from caco.tracking import recorded
from caco.tracking.fed import Feed
from caco.tracking.store import first_line
from caco.tracking.sync import find_runs, last_status
from caco.tracking.watermark import points

COLUMNS = ("run", "kind", "step", "time", "name", "value")


def write_csv(run_dirs: list[Path], file: Path) -> int:
    """Write every number of these runs' ledgers, with today's names, one per line; numbers that are not finite become
    nan, inf or -inf. Returns their count.

    Column run: the directory, relative to the folder that holds all of them. Column time: seconds since 1970.
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
    """Send everything of one run that has not arrived yet; returns a line that says what happened."""
    try:
        feed.open()
        count = feed.send()
        status, summary = last_status(run_dir)
        if status != "RUNNING":
            feed.end(status, summary)
        return f"{amount(count, 'point')} ({status})"
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
            print(
                f"{options.csv}: {amount(write_csv(run_dirs, options.csv), 'number')} of {amount(len(run_dirs), 'run')}"
            )
            return 0
        package = "tensorboard" if options.tensorboard else "wandb"
        if not is_installed(package):
            raise UserError(f"{package} is not installed{to_install(package=package)}")
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
            except Exception as error:  # noqa: BLE001 - libraries and networks raise anything; send the other runs
                failed = 1
                print(f"{run_dir}: not sent: {first_line(error)}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
