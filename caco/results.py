"""`python -m caco.results runs/`: show runs as a table in the terminal. Imports no torch.

Without --columns, the table shows the results and those settings that differ between the runs. Unfinished runs are
shown with their state, runs of earlier versions with today's names.
"""

import argparse
import sys
from pathlib import Path

from caco.errors import UserError, shown
from caco.runs.paths import expanded
from caco.saying import amount
from caco.tracking import comparison
from caco.tracking.recorded import directories, outline

EXAMPLES = """\
  python -m caco.results runs/                                        every run below runs/
  python -m caco.results runs/ --seeds --sort knn20_top1              means and standard deviations over seeds
  python -m caco.results runs/ --where method=byol "epochs>=100"      runs for which all conditions hold
  python -m caco.results runs/ --columns bank.size,lr,knn20_top1      settings and metrics by name, or the end of a name
  python -m caco.results runs/ --format csv > runs.csv
"""


def main(arguments: list[str] | None = None) -> None:
    """The console script."""
    parser = argparse.ArgumentParser(
        prog="python -m caco.results",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=expanded,
        default=[Path("runs")],
        metavar="FOLDER",
        help="a run, or a folder of runs; default: runs",
    )
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="CONDITION",
        help="KEY=VALUE, or !=, <, <=, > or >=, on settings, metrics or state",
    )
    parser.add_argument("--sort", metavar="KEY", help="by a setting or a metric; runs without it come last")
    parser.add_argument("--reverse", action="store_true", help="sort from the largest to the smallest")
    parser.add_argument("--columns", metavar="KEY,...", help="settings, options and metrics to show")
    parser.add_argument(
        "--seeds",
        action="store_true",
        help="one row for runs that differ only in their seed: mean, standard deviation, n",
    )
    parser.add_argument("--format", choices=comparison.FORMATS, default="text")
    with shown():
        given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        runs = comparison.outlines(directories(given.folders), outline)
        total = len(runs)
        runs = comparison.chosen(runs, given.where)
        if not runs:
            raise UserError(f"none of these {total} runs meets the conditions {' and '.join(given.where)}")
        title = amount(total, "run") if len(runs) == total else f"{len(runs)} of {total} runs"
        columns = None if given.columns is None else [name.strip() for name in given.columns.split(",") if name.strip()]
        if columns == []:
            raise UserError(f"--columns: expected names of settings and metrics, got {given.columns!r}")
        print(
            comparison.table(
                runs,
                columns=columns,
                by=given.sort,
                reverse=given.reverse,
                over_seeds=given.seeds,
                format=given.format,
                title=title,
            )
        )


if __name__ == "__main__":
    main()
