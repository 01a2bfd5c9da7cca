"""Figures that need only results: curves over training, accuracy over the size of the bank, accuracy over compute."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import style
from analysis.results import Found, Spread, heading
from caco import metrics
from caco.config.signatures import declared
from caco.errors import UserError
from experiments.tables import Scale, Table

Data = list[dict[str, Any]]
BANK = {  # title of the panel -> (metric, label of the y axis)
    "bank rows chosen as a positive": ("bank/rows_used", "rows, %"),
    "evenness of row use (entropy / maximum)": ("bank/use_entropy", "rows, %"),
    "rows that nearly equal another (cosine > 0.99)": ("bank/near_duplicates", "rows, %"),
    "mean norm of the bank rows": ("bank/row_norm_mean", "norm"),
    "images whose positive has their class": ("purity/positives", "test images, %"),  # only runs with eval=[purity]
}
COMPUTE = {
    "flops": "compute, 10$^{15}$ floating-point operations",  # as caco.plan counts them
    "images": "training images seen, millions",
    "hours": "hours of training at the measured rate",  # comparable only between runs on one idle machine
}


def series(found: Found, metric: str) -> dict[float, dict[int, float]]:
    """The values of a metric over training: {number of finished epochs: {seed: value}}."""
    points: dict[float, dict[int, float]] = {}
    for seed, result in sorted(found.by_seed.items()):
        for row in result.curve:
            if metric in row:
                epochs = row["epoch"] + 1 if row["kind"] == "epoch" else row["epochs"]
                points.setdefault(float(epochs), {})[seed] = row[metric]
    return dict(sorted(points.items()))


def steps(found: Found, metric: str) -> dict[float, float]:
    """{number of finished epochs: number of steps so far, warm start included} for each evaluation of a metric."""
    return {
        float(row["epochs"]): row["step"]
        for result in found.by_seed.values()
        for row in result.curve
        if row["kind"] == "eval" and metric in row
    }


def line(
    axes: Axes, number: int, label: str, points: dict[float, dict[int, float]], xs: Sequence[float] | None = None
) -> None:
    """Draw a line through the means over seeds, with a band from the smallest to the largest value."""
    xs = list(points) if xs is None else list(xs)
    spreads = [Spread.of_some(by_seed.values()) for by_seed in points.values()]
    look = style.look(number)
    every = max(1, len(xs) // 10)
    axes.plot(xs, [spread.mean for spread in spreads], label=label, markevery=every, **look)
    low, high = [min(v.values()) for v in points.values()], [max(v.values()) for v in points.values()]
    if low != high:
        axes.fill_between(xs, low, high, color=look["color"], alpha=0.18, linewidth=0)


def epochs_axis(axes: Axes) -> None:
    axes.set_xlabel("epochs")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def data_of(found: Found, metric: str, points: dict[float, dict[int, float]]) -> Data:
    return [
        {"row": found.experiment.row_id, "metric": metric, "epochs": epochs, "seed": seed, "value": value}
        for epochs, by_seed in points.items()
        for seed, value in by_seed.items()
    ]


def _figure(width: float, height: float, *shape: int, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(*shape, **options)


def _need(found: Sequence[Found], what: str, holds: Callable[[Found], Any]) -> list[Found]:
    chosen = [row for row in found if holds(row)]
    if not chosen:
        commands = [f"  {row.experiment.command()}" for row in found if row.experiment.why_not is None]
        raise UserError("\n".join([f"no results with {what}; these commands make them:", *commands]))
    return chosen


def _footnote(figure: Figure, scale: Scale, found: Sequence[Found]) -> None:
    """Write below the axes which scale the figure shows, and how many seeds each line averages."""
    counts = {len(row.by_seed) for row in found}
    n = str(counts.pop()) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    band = "; lines are means over seeds, bands their range" if n != "1" else ""
    style.footnote(figure, f"{scale.title}. {n} seed{'' if n == '1' else 's'} per line{band}.")


def figure_4(table: Table, scale: Scale, found: Sequence[Found], *, chosen: bool) -> tuple[Figure, Data]:
    """The paper's Figure 4: the mean maximum positive probability over epochs, with the k-NN accuracy below it.

    Args:
        chosen: whether the user named the table rows to show; if not, only those are shown whose positives are bank
            rows.
    """

    def fits(row: Found) -> bool:
        has = bool(row.by_seed) and bool(series(row, "max_probability"))
        return has and (chosen or declared(row.experiment.cfg.method.positives._target_, "bank_rows"))

    rows = _need(
        [row for row in found if row.experiment.why_not is None], "max_probability and a bank's positives", fits
    )
    figure, (top, bottom) = _figure(style.COLUMN, 3.9, 2, 1, sharex=True)
    data: Data = []
    accuracy = _knn(rows)
    for number, row in enumerate(rows):
        for axes, metric in ((top, "max_probability"), (bottom, accuracy)):
            points = series(row, metric)
            line(axes, number, row.experiment.row.label, points)
            data += data_of(row, metric, points)
    sizes = {row.experiment.cfg.bank.size for row in rows if row.experiment.cfg.bank is not None}
    if len(sizes) == 1:
        (size,) = sizes
        top.axhline(1 / size, color="#777777", linewidth=0.8, linestyle=":", label=f"chance, 1 / {size:,}")
        top.legend()
    top.set_yscale("log")
    top.set_ylabel("mean max. probability")
    bottom.set_ylabel(f"{heading(accuracy)} accuracy, %")
    epochs_axis(bottom)
    if len(rows) > 1:
        bottom.legend()
    _footnote(figure, scale, rows)
    return figure, data


def bank(table: Table, scale: Scale, found: Sequence[Found], *, chosen: bool) -> tuple[Figure, Data]:
    """Statistics of the bank's rows over training, with the k-NN accuracy and the maximum probability.

    The latter two are also shown for runs without a bank.
    """
    rows = [row for row in found if row.experiment.why_not is None and row.by_seed]
    _need(rows or list(found), "a bank", lambda row: any(series(row, metric) for metric, _ in BANK.values()))
    accuracy = _knn(rows)
    shown = {
        f"{heading(accuracy)} accuracy": (accuracy, "accuracy, %"),
        "mean probability of the most probable row": ("max_probability", "probability"),
        **BANK,
    }
    shown = {title: panel for title, panel in shown.items() if any(series(row, panel[0]) for row in rows)}
    lines = -(-len(shown) // 2)
    figure, panels = _figure(style.PAGE, 0.5 + 1.7 * lines, lines, 2, sharex=True, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.remove()
    data: Data = []
    for axes, (title, (metric, ylabel)) in zip(panels.flat, shown.items(), strict=False):
        for number, row in enumerate(rows):
            points = series(row, metric)
            if points:
                line(axes, number, row.experiment.row.label, points)
                data += data_of(row, metric, points)
        axes.set_title(title, loc="left")
        axes.set_ylabel(ylabel)
        if ylabel == "rows, %":
            axes.set_ylim(-3, 103)
        elif ylabel == "probability":
            axes.set_yscale("log")
        elif ylabel == "norm":
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.9), max(high, 1.1))  # so that rounding errors do not look like changes
    for axes in panels.flat[max(0, len(shown) - 2) : len(shown)]:
        epochs_axis(axes)
        axes.tick_params(labelbottom=True)
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [row.experiment.row.label for row in rows if row.experiment.row.label in handles]
    # A page is about 128 letters wide, and a line and its marker take six.
    columns = max(1, min(len(labels), 128 // (max(map(len, labels)) + 6)))
    figure.legend([handles[label] for label in labels], labels, loc="outside upper center", ncols=columns)
    _footnote(figure, scale, rows)
    return figure, data


def size(table: Table, scale: Scale, found: Sequence[Found], *, chosen: bool) -> tuple[Figure, Data]:
    """Accuracy over the number of bank rows: the paper's numbers on the left, ours on the right."""
    column = next(iter(table.columns))
    metric = _metric(scale, column)
    methods: dict[str, list[Found]] = {}
    for row in found:
        if row.experiment.row.run is not None and row.experiment.row.bank is not None:
            methods.setdefault(row.experiment.row.run[0].partition("=")[2], []).append(row)
    methods = {name: rows for name, rows in methods.items() if len({row.experiment.row.bank for row in rows}) > 1}
    _need(
        [row for rows in methods.values() for row in rows], "several sizes of the bank", lambda row: row.values(metric)
    )
    figure, (left, right) = _figure(style.PAGE, 2.6, 1, 2)
    data: Data = []
    for number, (name, rows) in enumerate(methods.items()):
        label = rows[0].experiment.row.label.split()[0]
        rows = sorted(rows, key=lambda row: row.experiment.row.bank or 0)
        left.plot(
            [row.experiment.row.bank for row in rows], [row.experiment.row.published[column] for row in rows],
            label=label, **style.look(number),
        )  # fmt: skip
        data += [
            {
                "source": "paper",
                "method": name,
                "rows": row.experiment.row.bank,
                "value": row.experiment.row.published[column],
            }
            for row in rows
        ]
        rows = [row for row in rows if row.values(metric)]
        spreads = [Spread.of_some(row.values(metric).values()) for row in rows]
        right.errorbar(
            [row.experiment.sized("bank") for row in rows], [spread.mean for spread in spreads],
            yerr=[spread.sd or float("nan") for spread in spreads], capsize=2, label=label, **style.look(number),
        )  # fmt: skip
        data += [
            {"source": "ours", "method": name, "rows": row.experiment.sized("bank"), "seed": seed, "value": value}
            for row in rows
            for seed, value in row.values(metric).items()
        ]
    for axes, title, ylabel in ((left, "paper: ImageNet", "top-1, %"), (right, "ours", f"{heading(metric)}, %")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xticks(sorted({x for drawn in axes.lines for x in drawn.get_xdata()}), minor=False)
        axes.tick_params(axis="x", rotation=30)
        axes.set_xlabel("number of bank rows")
        axes.set_ylabel(ylabel)
        axes.set_title(title, loc="left")
        axes.legend()
    counts = [len(row.values(metric)) for rows in methods.values() for row in rows if row.values(metric)]
    what = "one seed" if max(counts) == 1 else "mean over seeds; bars show one standard deviation"
    style.footnote(figure, f"{scale.title}. Ours: {what}.")
    return figure, data


def compute(
    table: Table, scale: Scale, found: Sequence[Found], *, chosen: bool, x: str | None = None
) -> tuple[Figure, Data]:
    """k-NN accuracy over the cost of the training so far.

    Args:
        x: the unit of cost, a key of COMPUTE; None for "flops", or "images" if caco.plan is missing.
    """
    if x is None:
        x = "images" if importlib.util.find_spec("caco.plan") is None else "flops"
    able = [row for row in found if row.experiment.why_not is None]
    metric = _knn(able)
    what = f"several values of {metric}" + (" and a known images_per_second" if x == "hours" else "")
    rows = _need(
        able, what, lambda row: len(series(row, metric)) > 1 and (x != "hours" or bool(row.values("train_hours")))
    )
    figure, axes = _figure(style.PAGE * 0.75, 3.2)
    data: Data = []
    drawn = set()
    for row in rows:
        if row.experiment.hash(row.experiment.seeds[0]) in drawn:
            continue  # at this scale another table row has the same run
        drawn.add(row.experiment.hash(row.experiment.seeds[0]))
        points, at = series(row, metric), steps(row, metric)
        per_step = _cost_of_a_step(row, x)
        xs = [at[epochs] * per_step for epochs in points]
        line(axes, len(drawn) - 1, row.experiment.row.label, points, xs)
        data += [entry | {x: at[entry["epochs"]] * per_step} for entry in data_of(row, metric, points)]
    axes.set_xlabel(COMPUTE[x])
    axes.set_ylabel(f"{heading(metric)} accuracy, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    _footnote(figure, scale, rows)
    return figure, data


def _cost_of_a_step(row: Found, x: str) -> float:
    batch = row.experiment.cfg.batch
    if x == "images":
        return batch / 1e6
    if x == "hours":
        rates = row.values("images_per_second").values()
        return sum(batch / rate for rate in rates) / len(rates) / 3600
    if importlib.util.find_spec("caco.plan") is None:
        raise UserError("--x flops: needs caco.plan, which this version of caco lacks; expected --x hours or images")
    from caco.plan import plan

    return plan(row.experiment.cfg, world=1)["flops_per_step"] / 1e15


def _knn(rows: Sequence[Found]) -> str:
    """The name of the k-NN metric; the same for all rows, because a scale evaluates them alike."""
    name = metrics.knn_metric(rows[0].experiment.cfg.eval) if rows else None
    if name is None:
        raise UserError(
            "no k-NN accuracy over training: this scale does not measure it; expected eval=[knn] or eval=[knn_all]"
            " among its overrides"
        )
    return name


def _metric(scale: Scale, column: str) -> str:
    if not scale.metrics.get(column):
        raise UserError(f"scale {scale.id} measures nothing for the column {column}")
    return scale.metrics[column][0]
