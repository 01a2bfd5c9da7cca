"""`python -m analysis.picture RUN`: show what a run has learned, as one picture in its directory.

    python -m analysis.picture runs/caco/NAME              draw the run in this directory
    python -m analysis.picture preset=demo seed=1          draw the run that caco.train makes with these overrides
    python -m analysis.picture runs/caco/NAME --to FILE    write the picture to another file

On the left is the k-NN accuracy over training, compared with the untrained network and with raw pixels. On the right
are rows of the bank, each shown as the training images nearest to it. The command reads the run's ledger, newest
checkpoint and images. The last line that it prints is the path of the picture.
"""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from caco import errors, metrics
from caco.config import composition, folders, refusals
from caco.errors import UserError
from caco.installed import to_install
from caco.runs.paths import expanded
from caco.saying import amount
from caco.tracking import recorded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analysis.model import BankRows, Trained
    from caco.data.sets.sources import Source
    from caco.data.views.augmentation import Views

# Lengths in inches. A tile is 80 dots wide, so that images of 8, 16, 20, 40 or 80 pixels grow by a whole number.
TILE, GAP, DOTS_PER_INCH = 0.4, 0.04, 200
MARGIN, HEAD, NOTE_LINE = 0.25, 0.74, 0.155
BEFORE, AFTER = 0.98, 1.2  # space for the text before and after the images of a bank row
CURVE, CURVE_ALONE, LEAST_HEIGHT = 3.6, 7.0, 3.0
TICKS, LABELS, ABOVE, BELOW = 0.4, 0.95, 0.25, 0.42  # margins around the curve: left, right, top, bottom
INK, FAINT, SHADE = "#222222", "#606060", "#E8EEF4"
TRAINED, PIXELS, UNTRAINED, ODD = "#0072B2", "#C25400", "#707070", "#E0569B"


@dataclass(frozen=True)
class Curve:
    """k-NN accuracy over training, in percent.

    Args:
        metric: its name, which includes the number of neighbours and the share of images that vote.
        epochs: the x position of each point in epochs; negative during the warm start.
        accuracy: the value of each point.
        steps_before: how many steps were made before epoch 0, to warm up or to fill the bank.
        starts_at_0: whether the first point was measured before the first step.
    """

    metric: str
    epochs: list[float]
    accuracy: list[float]
    steps_before: int
    starts_at_0: bool


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.picture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", nargs="+", metavar="RUN", help="a run's directory, or the overrides of caco.train that made it"
    )
    parser.add_argument("--to", type=expanded, metavar="FILE", help="default: picture.png in the run's directory")
    parser.add_argument("--data-root", metavar="PATH", help="where the run's images are now")
    parser.add_argument(
        "--images", type=int, default=10_000, help="largest number of training images to embed (default: 10,000)"
    )
    with errors.shown():
        print(make(parser.parse_args(folders.take(sys.argv[1:]))))


def make(arguments: argparse.Namespace) -> Path:
    """Draw a run's picture; returns its path.

    Raises:
        UserError: an option has an impossible value, matplotlib is not installed, there is no run, or the run has
            neither a bank nor a k-NN evaluation.
    """
    run_dir = directory(arguments.run)
    path = arguments.to or run_dir / "picture.png"
    if arguments.images < 1:
        raise UserError(f"--images: expected at least 1, got {arguments.images}")
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UserError(f"the picture needs matplotlib, which is not installed{to_install('analysis')}") from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds or path.is_dir():
        raise UserError(f"--to: expected a file of one of the kinds {', '.join(sorted(kinds))}, got {path}")
    from analysis import model  # not at the top: it imports torch, and mistakes are to be reported at once

    trained = model.load(run_dir, arguments.data_root)
    accuracy = metrics.knn_metric(trained.cfg.eval)
    curve = curve_of(recorded.read(run_dir).rows, accuracy, len(trained.splits.pretrain) // trained.cfg.batch)
    pixels = None if curve is None else model.pixels_knn(trained)
    rows = None if trained.bank is None else model.bank_rows(trained, num_images=arguments.images)
    if curve is None and rows is None:
        raise UserError(f"{run_dir}: expected a bank or an evaluation by k-NN to draw, got a run with neither")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(trained, curve, pixels, rows, name=run_dir.resolve().name).savefig(path, dpi=DOTS_PER_INCH)
    return path


def directory(run: Sequence[str]) -> Path:
    """The directory of a run, given as itself or by the overrides of caco.train that made the run.

    Raises:
        UserError: there is no such run, or the overrides do not compose.
    """
    if len(run) == 1 and ("=" not in run[0] or Path(run[0]).is_dir()):
        path = Path(run[0])
        expected = "expected a run's directory, or overrides such as preset=demo seed=1"
    else:
        try:
            path = Path(composition.compose(list(run)).hydra.run.dir)
        except (*refusals.COMPOSITION_ERRORS, ValueError) as error:
            raise UserError(refusals.explain(error, run)) from error
        expected = f"expected the run that python -m caco.train {shlex.join(run)} makes"
    if not path.is_dir():
        raise UserError(f"{path}: {expected}, got no such directory")
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: {expected}, got a directory without a run's config.yaml")
    return path


def curve_of(ledger: Sequence[dict[str, Any]], metric: str | None, steps_per_epoch: int) -> Curve | None:
    """The k-NN curve that training wrote into its ledger; None if the run was never evaluated by k-NN.

    "step" in a ledger row counts from the first step of the run, "epochs" from the start of epoch 0.
    """
    # Rows without "epochs" were added by caco.evaluate after the training; they are no part of the curve.
    rows = [row for row in ledger if row["kind"] == "eval" and metric in row and "epochs" in row]
    if metric is None or not rows:
        return None
    before = [round(row["step"] - row["epochs"] * steps_per_epoch) for row in rows if row["epochs"] > 0]
    steps_before = before[0] if before else rows[-1]["step"]
    return Curve(
        metric=metric,
        epochs=[(row["step"] - steps_before) / steps_per_epoch for row in rows],
        accuracy=[row[metric] for row in rows],
        steps_before=steps_before,
        starts_at_0=rows[0]["step"] == 0,
    )


# Drawing. Lengths are in inches.


def draw(
    trained: "Trained", curve: Curve | None, pixels: float | None, rows: "BankRows | None", *, name: str
) -> "Figure":
    """Draw the curve on the left and the bank rows on the right; if one of them is None, only the other.

    Args:
        pixels: the k-NN accuracy of raw pixels, in percent; None leaves it out.
        name: the run's name, for the note at the bottom.
    """
    from analysis.style import Figure

    lines, tiles = (0, 0) if rows is None else rows.image_RN.shape
    rows_width = 0 if rows is None else BEFORE + tiles * (TILE + GAP) + AFTER
    curve_width = 0 if curve is None else CURVE_ALONE if rows is None else CURVE
    rows_left = 2 * MARGIN + curve_width if curve_width else MARGIN
    width = MARGIN + (rows_left + rows_width if rows_width else MARGIN + curve_width)
    notes = ["" if rows is None else rows_note(trained, rows), f"{name}, step {trained.step:,}"]
    note = [line for text in notes for line in textwrap.wrap(text, int(width * 16.5))]
    foot = 0.3 + NOTE_LINE * len(note)
    body = max(lines * (TILE + GAP), 0 if curve is None else LEAST_HEIGHT)
    height = HEAD + body + foot
    figure = Figure(figsize=(width, height), layout="none")

    def panel(left: float, bottom: float, wide: float, high: float) -> "Axes":
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    def words(left: float, down: float, text: str, **look: Any) -> None:
        figure.text(left / width, 1 - down / height, text, va="top", **look)

    if curve is not None:
        _, test = trained.splits.labelled("the curve")
        words(MARGIN, 0.18, f"{metrics.title(curve.metric)} accuracy", fontsize=13, weight="bold", color=INK)
        words(MARGIN, 0.44, f"of {len(test):,} images of {test.name}, in percent", fontsize=9, color=FAINT)
        axes = panel(MARGIN + TICKS, foot + BELOW, curve_width - TICKS - LABELS, body - ABOVE - BELOW)
        draw_curve(axes, curve, pixels, start="at the start" if trained.cfg.get("weights") else "untrained")
    if rows is not None:
        words(rows_left, 0.18, "Rows of the bank", fontsize=13, weight="bold", color=INK)
        framed = "" if rows.label_RN is None else "; a frame marks another label"
        words(rows_left, 0.44, f"the {tiles} training images nearest to each row{framed}", fontsize=9, color=FAINT)
        draw_rows(panel(rows_left, foot, rows_width, body), trained, rows, size=(rows_width, body))
    figure.text(MARGIN / width, 0.13 / height, "\n".join(note), fontsize=8, color=FAINT, va="bottom", linespacing=1.3)
    return figure


def draw_curve(axes: "Axes", curve: Curve, pixels: float | None, *, start: str) -> None:
    """Draw the curve, and horizontal lines for the accuracy at its start and of raw pixels, with the values at the
    right.

    Args:
        pixels: the k-NN accuracy of raw pixels, in percent; None leaves it out.
        start: the label of the accuracy before the first step, as "untrained".
    """
    from matplotlib.ticker import MaxNLocator

    first, last = curve.epochs[0], max(curve.epochs[-1], 1.0)
    axes.plot(
        curve.epochs, curve.accuracy, color=TRAINED, marker="o", markersize=4.5, linewidth=2, clip_on=False, zorder=3
    )
    levels = [(curve.accuracy[-1], "trained", TRAINED)]
    if pixels is not None:
        axes.axhline(pixels, color=PIXELS, linewidth=1.4, linestyle=(0, (5, 2)))
        levels.append((pixels, "raw pixels", PIXELS))
    if curve.starts_at_0 and len(curve.epochs) > 1:
        axes.axhline(curve.accuracy[0], color=UNTRAINED, linewidth=1.4, linestyle=(0, (1, 1.2)))
        levels.append((curve.accuracy[0], start, UNTRAINED))
    levels.sort()
    values = [*curve.accuracy, levels[0][0], levels[-1][0]]
    space = 0.07 * max(max(values) - min(values), 1.0)
    low, high = min(values) - space, max(values) + space
    axes.set(xlim=(first, last), ylim=(low, high))
    if curve.steps_before:
        axes.axvspan(first, 0, color=SHADE, linewidth=0, zorder=0)
        above = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate(f"warm start: {amount(curve.steps_before, 'step')}", fontsize=8, color=FAINT, **above)
    axes.set_xlabel("epochs", fontsize=9, color=INK)
    axes.xaxis.set_label_coords((last / 2 - first) / (last - first), -0.24 / _inches(axes))
    ticks = MaxNLocator(nbins=5, integer=True, steps=[1, 2, 4, 5, 10]).tick_values(0, last)
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= last])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.tick_params(labelsize=9, colors=INK, length=3)
    positions = spread([level for level, *_ in levels], (high - low) * 0.38 / _inches(axes))
    for (level, what, colour), position in zip(levels, positions, strict=True):
        beside = {
            "xy": (1, position),
            "xycoords": axes.get_yaxis_transform(),
            "textcoords": "offset points",
            "color": colour,
        }
        axes.annotate(f"{level:.1f}", xytext=(9, 0), fontsize=12, weight="bold", va="bottom", **beside)
        axes.annotate(what, xytext=(9, -1), fontsize=8.5, va="top", **beside)


def _plain(views: "Views", images: "Source", index: int) -> np.ndarray:
    """An image's plain view as RGB pixels to show, uint8 [H, W, 3]."""
    if views.channels is None:
        return views.plain_pixels(images.image(index))
    from caco.data.sets.stored import shown

    return np.asarray(shown(views.plain_pixels(images.pixels(index))))


def _inches(axes: "Axes") -> float:
    return axes.get_position().height * axes.get_figure().get_figheight()


def spread(levels: Sequence[float], apart: float) -> list[float]:
    """Move ascending values so that neighbours are at least `apart`, to keep their labels from overlapping.

    A group of values that are too close is spread evenly around its mean.
    """
    groups: list[list[float]] = []
    for level in levels:
        groups.append([level])
        while (
            len(groups) > 1
            and np.mean(groups[-1]) - np.mean(groups[-2]) < apart * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [float(np.mean(group)) + apart * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]


def draw_rows(axes: "Axes", trained: "Trained", rows: "BankRows", *, size: tuple[float, float]) -> None:
    """Draw one line per bank row: its index and use, its nearest images, and their most common label.

    Images with another label than the most common one are framed.
    """
    from matplotlib.patches import Rectangle

    from analysis.model import most_common

    lines, tiles = rows.image_RN.shape
    label_RN = rows.label_RN
    common_R, count_R = (None, None) if label_RN is None else most_common(label_RN)
    right = BEFORE + tiles * (TILE + GAP) + 0.05
    for r in range(lines):
        top = r * (TILE + GAP)
        middle = top + TILE / 2
        axes.text(0, middle - 0.01, f"row {int(rows.row_R[r]):,}", fontsize=10, color=INK, va="bottom")
        axes.text(0, middle + 0.02, f"chosen by {int(rows.uses_R[r]):,}", fontsize=8, color=FAINT, va="top")
        for n in range(tiles):
            left = BEFORE + n * (TILE + GAP)
            pixels = _plain(trained.views, rows.images, int(rows.image_RN[r, n]))
            smooth = len(pixels) > TILE * DOTS_PER_INCH  # the image is larger than its tile
            position = (left, left + TILE, top + TILE, top)
            axes.imshow(pixels, extent=position, interpolation="antialiased" if smooth else "nearest")
            if label_RN is not None and common_R is not None and label_RN[r, n] != common_R[r]:
                axes.add_patch(Rectangle((left, top), TILE, TILE, fill=False, edgecolor=ODD, linewidth=2))
        cosines = f"cosine {rows.cosine_RN[r, 0]:.2f} to {rows.cosine_RN[r, -1]:.2f}"
        if common_R is None or count_R is None:
            axes.text(right, middle, cosines, fontsize=8, color=FAINT, va="center")
            continue
        name = rows.images.classes[common_R[r]] if rows.images.classes else str(common_R[r])
        share = f"{count_R[r]} of {tiles}: {name if len(name) <= 12 else name[:10] + '...'}"
        axes.text(right, middle - 0.01, share, fontsize=10, color=INK, va="bottom")
        axes.text(right, middle + 0.02, cosines, fontsize=8, color=FAINT, va="top")
    # Coordinates are inches, downwards from the top; imshow has changed the limits.
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="auto")
    axes.axis("off")


def rows_note(trained: "Trained", rows: "BankRows") -> str:
    """The note below the rows: how they were chosen, and how well labels agree over all rows in use."""
    every = "all " if len(rows.images) == len(trained.splits.pretrain) else ""
    size = trained.cfg.bank.size or len(trained.splits.pretrain)  # null: the bank has one row for each image
    note = (
        f"The keys of {every}{len(rows.images):,} training images choose {rows.num_used:,} of the {size:,} rows as"
        f" positives. The {rows.num_frequent:,} most chosen rows are the choice of {rows.share_frequent:.0%} of the"
        " images; shown are the most chosen one and others of them that lie far apart."
    )
    if rows.agreement is not None:
        note += (
            f" Averaged over all {rows.num_used:,} chosen rows, {rows.agreement:.0%} of the"
            f" {rows.image_RN.shape[1]} images nearest to a row share one label (images drawn at random:"
            f" {rows.chance:.0%}); training saw no labels."
        )
    return note


if __name__ == "__main__":
    main()
