"""`python -m analysis.figure 3|4|5|bank|size|compute`: a figure as PNG and PDF, and the data behind it as CSV.

    python -m analysis.figure 4 --scale mini                   mean maximum positive probability and k-NN over epochs
    python -m analysis.figure bank --scale mini                how the bank's rows are used and how they lie
    python -m analysis.figure size --scale mini                accuracy over the size of the bank (Table VI)
    python -m analysis.figure compute --scale mini --table 1   accuracy over what training has cost
    python -m analysis.figure 3 --run runs/mini/NAME           real images in place of learned positives and negatives
    python -m analysis.figure 5 --run runs/mini/NAME           t-SNE of features

3 and 5 read a run's checkpoint and its images, all others only results, as python -m analysis.table does. Files go into
figures/; MLflow runs that are shown get them as artifacts.
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
from caco.installed import command_to_install
from caco.runs.files import read_json
from caco.runs.paths import expanded
from experiments.tables import load_scale, load_table

OF_RESULTS = {"4": "7", "bank": "7", "size": "6", "compute": "7"}  # and the table whose rows they show
OF_A_RUN = ("3", "5")
FIGURES = ("3", "4", "5", "bank", "size", "compute")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", help=", ".join(FIGURES))
    parser.add_argument("--scale", help="whose results")
    parser.add_argument(
        "--table", help=f"whose rows; by default {', '.join(f'{k}: {v}' for k, v in OF_RESULTS.items())}"
    )
    parser.add_argument("--rows", help="these rows alone, as none,both")
    parser.add_argument(
        "--x", choices=("flops", "images", "hours"), help="of the figure compute; flops where caco.plan is"
    )
    add_sources(parser)
    parser.add_argument("--run", type=expanded, metavar="DIR", help="of the figures 3 and 5")
    parser.add_argument("--data-root", metavar="PATH", help="where that run's images are now")
    parser.add_argument("--queries", type=int, default=6, help="rows of figure 3")
    parser.add_argument("--images", type=int, default=2000, help="points of figure 5, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the images that are drawn, and of t-SNE")
    parser.add_argument("--out", type=expanded, default=Path("figures"))
    parser.add_argument("--no-mlflow", action="store_true", help="do not log it to the MLflow runs that it shows")
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
    """Draw a figure; returns its files and the MLflow runs that it shows.

    Raises:
        UserError: no such figure; no results, no run to draw it from.
    """
    name = arguments.figure
    if name not in FIGURES:
        raise UserError(f"{name}: no such figure{nearest(name, FIGURES) or '.'} There are: {', '.join(FIGURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            f"figures need matplotlib, which is not installed; to have it: {command_to_install('analysis')}"
        )
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
    """A figure of results, into out/SCALE-TABLE-figure-NAME.*."""
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
    """Figures 3 and 5, into out/RUN-figure-N.*."""
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
