"""`python -m analysis.report --scale mini`: write one self-contained HTML page with all results of a scale or a sweep.

    python -m analysis.report --scale mini                          all tables and figures with results, the records,
                                                                    and the configurations
    python -m analysis.report --scale mini --run runs/mini/NAME     the same with figures 3 and 5 of that run
    python -m analysis.report --sweep runs/NAME                     the runs of a sweep made by python -m caco.train -m

The page holds its pictures itself, so it can be sent to others as one file.
"""

import argparse
import base64
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from analysis import results, table
from analysis.figure import OF_RESULTS, draw, of_a_run
from analysis.results import Result, heading
from analysis.table import Sheet, add_sources, read_results
from caco import errors, metrics
from caco.config import folders
from caco.errors import UserError
from caco.runs.paths import expanded
from caco.saying import amount
from experiments import record
from experiments.tables import load_scale, load_table, tables

CAPTIONS = {
    "3": (
        "The paper's Figure 3 for our run: test images, and the training images nearest to their learned positive and"
        " negatives"
    ),
    "4": "The paper's Figure 4 for our runs: mean maximum positive probability and k-NN accuracy over epochs",
    "5": "The paper's Figure 5 for our run: t-SNE of features, coloured by class",
    "bank": "Statistics of the bank's rows over training",
    "size": "Accuracy over the size of the bank",
    "compute": "k-NN accuracy over the compute of training",
}
SUMMARY = ("loss", "steps", "images_per_second")  # shown after the accuracies


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--scale", help="show all results at this scale")
    what.add_argument("--sweep", type=expanded, metavar="DIR", help="show the runs in this folder")
    parser.add_argument("--tables", help="show only these tables, as 6,7,rivals")
    parser.add_argument(
        "--run", type=expanded, nargs="*", default=[], metavar="DIR", help="add figures 3 and 5 of these runs"
    )
    parser.add_argument("--data-root", metavar="PATH", help="where the images of those runs are now")
    add_sources(parser)
    parser.add_argument("--out", type=expanded, help="the file to write; default: SCALE.html or SWEEP.html")
    with errors.shown():
        arguments = parser.parse_args(folders.take(sys.argv[1:]))
        page = of_sweep(arguments) if arguments.sweep else of_scale(arguments)
        out = arguments.out or Path(f"{arguments.scale or arguments.sweep.resolve().name}.html")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    print(out)


def of_scale(arguments: argparse.Namespace) -> str:
    """Make the page of a scale.

    Raises:
        UserError: there are no results at this scale.
    """
    scale = load_scale(arguments.scale)
    runs, messages = read_results(arguments, scale.id, curves=True)
    needed = (
        f"scale {scale.id}: no results for its tables among {amount(len(runs), 'run')}; this command makes some:"
        f" python -m experiments.run table7 scale={scale.id}"
    )
    if not runs:
        raise UserError(needed)
    sheets, without = [], list(messages)
    figures: list[dict[str, Any]] = []
    used: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.tables.split(",") if arguments.tables else tables():
            of_paper = load_table(name)
            found = results.find(of_paper, scale, runs)
            if not any(row.by_seed for row in found) and not arguments.tables:
                continue
            used |= {result.hash: result for row in found for result in row.by_seed.values()}
            sheets.append({"id": of_paper.id, "sheet": table.sheet(of_paper, scale, found)})
            for figure, of_table in OF_RESULTS.items():
                if of_paper.id == f"table{of_table}":
                    _figure(
                        figures,
                        without,
                        figure,
                        lambda figure=figure, found=found: draw(figure, found, Path(folder))[0],
                    )
        if not used:
            raise UserError(needed)
        _of_runs(figures, without, arguments, Path(folder))
    title = f"Scale {scale.id}: {scale.title}"
    sources = sorted({result.source for result in runs})
    about = (
        f"{amount(len(used), 'run')}, read from {', '.join(sources)}. Published results are those of the paper"
        " (arXiv 2203.14370) unless the column's heading says otherwise."
    )
    return render(title, about, sheets, figures, without, list(used.values()))


def of_sweep(arguments: argparse.Namespace) -> str:
    """Make the page of a folder of runs.

    Raises:
        UserError: no run in it has finished.
    """
    finished = sorted(path.parent for path in arguments.sweep.glob("*/summary.json"))
    if not finished:
        raise UserError(
            f"{arguments.sweep}: expected a sweep's folder with finished runs, each with summary.json; got none"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        record.write_json(path, record.gather(finished))
        runs, _ = results.from_records([path])
        figures: list[dict[str, Any]] = []
        without: list[str] = []
        _of_runs(figures, without, arguments, Path(folder))
    about = f"{amount(len(runs), 'finished run')} in {arguments.sweep}."
    unfinished = sorted(
        path.parent.name for path in arguments.sweep.glob("*/config.yaml") if path.parent not in finished
    )
    without += [f"{name}: has not finished and is not shown" for name in unfinished]
    sheet = Sheet("Runs", [], *_runs_table(runs), notes=table.provenance(runs))
    return render(
        f"Sweep {arguments.sweep.resolve().name}", about, [{"id": "runs", "sheet": sheet}], figures, without, runs
    )


def _runs_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table with one line per run: the settings in which runs differ, then the main metrics."""
    keys = sorted({key for r in results for key in r.config if len({str(q.config.get(key, "-")) for q in results}) > 1})
    shown = [key for key in keys if not key.endswith(("._target_", ".seed"))]
    measured = _measured(results)
    rows = [
        [result.name[-10:], *(str(result.config.get(key, "-")) for key in shown), *_values(result, measured)]
        for result in sorted(results, key=lambda result: [str(result.config.get(key, "")) for key in shown])
    ]
    return ["run", *shown, *map(heading, measured)], rows


def _measured(results: Sequence[Result]) -> list[str]:
    """The main metrics of these runs: all accuracies, then those of SUMMARY."""
    found = {metric for result in results for metric in result.summary}
    return metrics.accuracies(found) + [metric for metric in SUMMARY if metric in found]


def _values(result: Result, measured: Sequence[str]) -> list[str]:
    values = [(metric, result.value(metric)) for metric in measured]
    return [
        "-" if value is None else table.number(value, percent=metrics.is_percent(metric)) for metric, value in values
    ]


def _figure(figures: list[dict[str, Any]], without: list[str], name: str, make: Any) -> None:
    """Draw a figure and add it to `figures`; if it cannot be drawn, add the reason to `without`."""
    try:
        (png,) = [path for path in make() if path.suffix == ".png"]
    except UserError as error:
        without.append(f"{CAPTIONS[name]}: {str(error).splitlines()[0].rstrip(':')}")
        return
    # The page has two columns of figures; these are too wide for one column.
    wide = name in ("3", "bank", "size")
    figures.append({"wide": wide, "caption": CAPTIONS[name], "png": base64.b64encode(png.read_bytes()).decode()})


def _of_runs(figures: list[dict[str, Any]], without: list[str], arguments: argparse.Namespace, folder: Path) -> None:
    for run in arguments.run:
        for name in ("3", "5"):
            one = argparse.Namespace(
                figure=name, run=run, data_root=arguments.data_root, queries=6, images=2000, seed=0, out=folder
            )
            _figure(figures, without, name, lambda one=one: of_a_run(one)[0])


def render(
    title: str, about: str, sheets: list[dict], figures: list[dict], without: list[str], runs: Sequence[Result]
) -> str:
    """Fill the page's template, which escapes every text."""
    runs = sorted(runs, key=lambda result: (result.name, result.seed))
    measured = _measured(runs)
    keys = sorted({key for result in runs for key in result.config})
    alike = {key for key in keys if len({str(result.config.get(key, "-")) for result in runs}) == 1}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html").render(
        title=title,
        about=about,
        contents=[
            *((sheet["sheet"].title.partition(":")[0], sheet["id"]) for sheet in sheets),
            *([("Figures", "figures")] if figures else []),
            ("Records", "records"),
            ("Configurations", "configurations"),
        ],
        sheets=sheets,
        absent=(table.CITED, table.ELSEWHERE, "-"),
        figures=figures,
        without=without,
        metrics=list(map(heading, measured)),
        runs=[
            {
                "name": result.name,
                "seed": result.seed,
                "run_values": _values(result, measured),
                "machine": table.machine(result.environment),
                "code": table.code(result.environment),
                "hash": result.hash,
                "command": result.command,
            }
            for result in runs
        ],
        shared=[(key, runs[0].config[key]) for key in keys if key in alike],
        different=[(key, [result.config.get(key, "-") for result in runs]) for key in keys if key not in alike],
        columns=[f"{result.name.rpartition('-')[0]}" for result in runs],
    )


if __name__ == "__main__":
    main()
