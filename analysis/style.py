"""The style of figures, and how they are saved: as PNG and PDF, with the data as CSV."""

import csv
import logging
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # draws to files, and so works on machines without a display

from matplotlib.figure import Figure  # noqa: E402

_log = logging.getLogger(__name__)

# Okabe and Ito's colours, which most colour-blind readers can tell apart, without the yellow, which is too light for a
# line. Lines also differ in dashes and markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (8, 2)), (0, (2, 2)), (0, (6, 1, 1, 1, 1, 1)))
# Paul Tol's "muted" colours and a grey, for ten classes.
CLASS_COLOURS = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#777777",
)
COLUMN, PAGE = 3.4, 7.0  # width of one column and of both in a two-column paper, in inches
RC = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.5, "axes.axisbelow": True, "lines.linewidth": 1.3,
    "lines.markersize": 3.5, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "figure.constrained_layout.use": True, "savefig.dpi": 300, "pdf.fonttype": 42,
}  # fmt: skip
mpl.rcParams.update(RC)


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of line `number`, counted from 0."""
    at = number % len(COLOURS)
    return {"color": COLOURS[at], "marker": MARKERS[at], "linestyle": DASHES[at]}


def footnote(figure: Figure, text: str) -> None:
    """Write a text below the axes, wrapped to the width of the figure."""
    width = int(figure.get_figwidth() * 23)
    figure.supxlabel("\n".join(textwrap.wrap(text, width)), fontsize=6, color="#555555")


def save(figure: Figure, data: Sequence[dict[str, Any]], folder: Path, name: str) -> list[Path]:
    """Write NAME.png, NAME.pdf and the figure's data as NAME.csv; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "pdf", "csv")]
    figure.savefig(paths[0])
    figure.savefig(paths[1], metadata={"CreationDate": None})  # so that the same figure gives the same bytes
    columns = list(dict.fromkeys(key for row in data for key in row))
    with open(paths[2], "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(data)
    return paths


def log_to_mlflow(paths: Iterable[Path], places: Iterable[tuple[str, str]]) -> int:
    """Log the files to MLflow runs as figures/NAME; returns how many runs took them, and warns of each that did not.

    Args:
        places: (tracking URI, run id) of each run.
    """
    places = sorted(set(places))
    if not places:
        return 0
    from caco.tracking.store import first_line, import_mlflow

    import_mlflow()
    from mlflow import MlflowClient

    done = 0
    for uri, run_id in places:
        try:
            client = MlflowClient(uri)
            for path in paths:
                client.log_artifact(run_id, str(path), "figures")
            done += 1
        except Exception as error:  # noqa: BLE001 - databases, HTTP and artifact stores raise all kinds of exceptions
            _log.warning("MLflow at %s did not take the figure (%s)", uri, first_line(error))
    return done
