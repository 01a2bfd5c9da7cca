"""`python -m analysis.figure 3|4|5|bank|size|compute`: draw a figure as PNG and PDF, and write its data as CSV.

    python -m analysis.figure 4 --scale mini                   mean maximum positive probability and k-NN over epochs
    python -m analysis.figure bank --scale mini                statistics of the bank's rows over training
    python -m analysis.figure size --scale mini                accuracy over the size of the bank (Table VI)
    python -m analysis.figure compute --scale mini --table 1   accuracy over the compute of training
    python -m analysis.figure 3 --run runs/mini/NAME           the images nearest to learned positives and negatives
    python -m analysis.figure 5 --run runs/mini/NAME           t-SNE of features

Figures 3 and 5 read a run's checkpoint and images; all others read only results, as python -m analysis.table does.
Files are written to figures/. If a figure shows runs that are in MLflow, the files are also logged to them as
artifacts.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.results import Found
from analysis.table import add_sources, found_for, read_results
from caco import errors
from caco.config import folders
from caco.config.refusals import nearest
from caco.errors import UserError
from caco.installed import to_install
from caco.runs.files import read_json
from caco.runs.paths import expanded
from experiments.tables import load_scale, load_table

OF_RESULTS = {"4": "7", "bank": "7", "size": "6", "compute": "7"}  # figure -> the table whose rows it shows by default
OF_A_RUN = ("3", "5")
FIGURES = ("3", "4", "5", "bank", "size", "compute")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.figure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", help=", ".join(FIGURES))
    parser.add_argument("--scale", help="the scale whose results are shown")
    parser.add_argument(
        "--table",
        help=f"the table whose rows are shown; defaults: {', '.join(f'{k}: {v}' for k, v in OF_RESULTS.items())}",
    )
    parser.add_argument("--rows", help="show only these table rows, as none,both")
    parser.add_argument(
        "--x", choices=("flops", "images", "hours"), help="unit of the x axis of figure compute; default: flops"
    )
    add_sources(parser)
    parser.add_argument("--run", type=expanded, metavar="DIR", help="the run that figures 3 and 5 show")
    parser.add_argument("--data-root", metavar="PATH", help="where that run's images are now")
    parser.add_argument("--queries", type=int, default=6, help="number of query images in figure 3")
    parser.add_argument("--images", type=int, default=2000, help="largest number of points in figure 5")
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of images and for t-SNE")
    parser.add_argument("--out", type=expanded, default=Path("figures"))
    parser.add_argument("--no-mlflow", action="store_true", help="do not log the files to the MLflow runs shown")
    with errors.shown():
        arguments = parser.parse_args(folders.take(sys.argv[1:]))
        paths, places = make(arguments)
        if not arguments.no_mlflow:
            from analysis.style import log_to_mlflow

            count = log_to_mlflow(paths, places)
            if count:
                print(f"logged to {count} MLflow runs", file=sys.stderr)
    for path in paths:
        print(path)


def make(arguments: argparse.Namespace) -> tuple[list[Path], list[tuple[str, str]]]:
    """Draw the figure that the command line asks for; returns its files and the MLflow runs that it shows.

    Raises:
        UserError: there is no such figure, or no results or run to draw it from.
    """
    name = arguments.figure
    if name not in FIGURES:
        raise UserError(f"{name}: no such figure{nearest(name, FIGURES) or '.'} There are: {', '.join(FIGURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"figures need matplotlib, which is not installed{to_install('analysis')}")
    if name in OF_A_RUN:
        return of_a_run(arguments)
    if arguments.scale is None:
        raise UserError(f"figure {name}: expected --scale, the scale whose results it shows")
    table, scale = load_table(arguments.table or OF_RESULTS[name]), load_scale(arguments.scale)
    results, messages = read_results(arguments, scale.id, curves=True)
    for line in messages:
        print(f"caco: {line}", file=sys.stderr)
    found = found_for(table, scale, results, arguments, arguments.rows.split(",") if arguments.rows else None)
    return draw(name, found, arguments.out, chosen=arguments.rows is not None, x=arguments.x)


def draw(
    name: str, found: Sequence[Found], out: Path, *, chosen: bool = False, x: str | None = None
) -> tuple[list[Path], list]:
    """Draw a figure from results into out/SCALE-TABLE-figure-NAME.*; returns as `make` does."""
    from analysis import curves, style

    table, scale = found[0].experiment.table, found[0].experiment.scale
    options = {"x": x} if name == "compute" else {}
    drawing = {"4": curves.figure_4, "bank": curves.bank, "size": curves.size, "compute": curves.compute}[name]
    figure, data = drawing(table, scale, found, chosen=chosen, **options)
    paths = style.save(figure, data, out, f"{scale.id}-{table.id}-figure-{name}")
    shown = {entry["row"] for entry in data if "row" in entry}
    places = [
        result.mlflow_run
        for row in found
        if row.experiment.row_id in shown
        for result in row.by_seed.values()
        if result.mlflow_run is not None
    ]
    return paths, places


def of_a_run(arguments: argparse.Namespace) -> tuple[list[Path], list[tuple[str, str]]]:
    """Draw figure 3 or 5 of a run into out/RUN-figure-N.*; returns as `make` does."""
    if arguments.run is None:
        raise UserError(f"figure {arguments.figure}: expected --run DIR, a run's directory, as runs/SCALE/NAME")
    from analysis import model, style

    run, root = arguments.run, arguments.data_root
    if arguments.figure == "3":
        figure, data = model.figure_3(run, data_root=root, queries=arguments.queries, seed=arguments.seed)
    else:
        figure, data = model.figure_5(run, data_root=root, images=arguments.images, seed=arguments.seed)
    paths = style.save(figure, data, arguments.out, f"{run.resolve().name}-figure-{arguments.figure}")
    mark = read_json(run / "mlflow.json")
    return paths, [(mark["uri"], mark["run_id"])] if mark.get("run_id") else []


if __name__ == "__main__":
    main()
