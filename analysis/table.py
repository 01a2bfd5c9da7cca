"""`python -m analysis.table 7 --scale mini`: show a table with the paper's results, our results, and what is missing.

Our results are means over seeds +- one sample standard deviation. Gains are relative to the table's reference row. For
our results they are computed seed by seed, over the seeds that both rows have; p is that of Student's paired t test
(two-sided, not corrected for several rows). The difference between our result and the paper's is shown only at scales
with the paper's data, recipe and metric. Results are read from experiments/records/SCALE.json and
runs/SCALE/record.json, or from --records or --mlflow.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence

from analysis import results
from analysis.results import Found, Gain, Result, heading
from caco import errors, metrics
from caco.config import folders
from caco.errors import UserError
from caco.runs.paths import expanded
from caco.saying import amount
from caco.sheets import Sheet, Spread, as_markdown, as_text, number, spread
from experiments.tables import Scale, Table, load_scale, load_table, scales

FORMATS = ("text", "markdown", "latex", "csv")
REFERENCE, CITED, ELSEWHERE, MISSING, UNMEASURED = "ref.", "cited", "not at this scale", "missing", "not measured"


def state(found: Found, metric: str, column: str) -> str | None:
    """What a cell shows instead of our result; None if there is a result."""
    if not found.has(column):
        return "-"
    if found.experiment.row.run is None:
        return CITED
    if found.experiment.why_not is not None:
        return ELSEWHERE
    if not found.by_seed:
        return MISSING
    return None if found.values(metric) else UNMEASURED


def sheet(table: Table, scale: Scale, found: Sequence[Found]) -> Sheet:
    """Lay out a table at a scale as a sheet of text."""
    reference = next((row for row in found if row.experiment.row_id == table.reference), None)
    sized = [key for key in ("epochs", "batch", "bank") if len({getattr(row, key) for row in table.rows.values()}) > 1]
    ratio = table.compare == "ratio"
    gain_name = "ratio" if ratio else "gain"
    measured = {column: scale.metrics.get(column, []) for column in table.columns}
    with_gains = len(table.columns) <= 2  # tables with more columns would become too wide
    headers = ["setting", *({"bank": "bank rows"}.get(key, key) for key in sized)]
    published = {
        column: title
        for column, title in table.columns.items()
        if any(column in row.published for row in table.rows.values())
    }
    for title in published.values():
        headers += [title, gain_name] if with_gains else [title]
    groups = [("", 1), ("recipe at scale paper", len(sized)), ("paper's results", len(headers) - 1 - len(sized))]
    of_others = [column for column in table.columns if any(row.experiment.theirs(column) is not None for row in found)]
    headers += [scale.theirs_are] * len(of_others)
    groups.append(("published by others", len(of_others)))
    for ours in measured.values():
        for metric in ours:
            headers += [
                heading(metric),
                *([gain_name] if with_gains else []),
                *([] if ratio or not with_gains else ["p"]),
            ]
            headers += ["ours - paper's"] if scale.same_as_paper and published else []
    if any(measured.values()):
        groups.append((f"our results, scale {scale.id}", len(headers) + 1 - sum(size for _, size in groups)))
        headers.append("n")
    rows = []
    for row in found:
        cells = [row.experiment.row.label, *(str(getattr(row.experiment.row, key) or "-") for key in sized)]
        for column in published:
            cells += _published(table, row, column, ratio, with_gains)
        cells += ["-" if (value := row.experiment.theirs(column)) is None else f"{value:g}" for column in of_others]
        for column, ours in measured.items():
            for metric in ours:
                cells += _ours(row, reference, metric, column, ratio, with_gains)
                if scale.same_as_paper and published:
                    cells.append(_against_paper(row, column, metric))
        if any(measured.values()):
            cells.append(str(len(row.by_seed)) if row.by_seed else "-")
        rows.append(cells)
    title = f"Table {table.table}: {table.title}. Ours: {scale.title}"
    return Sheet(title, groups, headers, rows, _notes(table, scale, found, measured), _missing(scale, found, measured))


def _published(table: Table, row: Found, column: str, ratio: bool, with_gains: bool) -> list[str]:
    value = row.experiment.row.published.get(column)
    base = table.rows[table.reference].published.get(column)
    if value is None:
        return ["-"] * (1 + with_gains)
    if not with_gains:
        return [max(f"{value:.1f}", f"{value:g}", key=len)]  # with as many digits as were published
    shown = f"{value:.2f}" if ratio or column.endswith("epoch") else f"{value:.1f}"
    if row.experiment.row_id == table.reference or base is None:
        return [shown, REFERENCE if base is not None else "-"]
    return [shown, f"{value / base:.2f}" if ratio else f"{value - base:+.{2 if column.endswith('epoch') else 1}f}"]


def _ours(row: Found, reference: Found | None, metric: str, column: str, ratio: bool, with_gains: bool) -> list[str]:
    why = state(row, metric, column)
    blanks = (0 if not with_gains else 1 if ratio else 2) * ["-"]
    if why is not None:
        return [why, *blanks]
    percent = metrics.is_percent(metric)
    values = row.values(metric)
    cells = [spread(Spread.of_some(values.values()), percent=percent)]
    if not with_gains:
        return cells
    if row is reference:
        return [*cells, REFERENCE, *blanks[1:]]
    gain = Gain.of(values, reference.values(metric), ratio=ratio) if reference else None
    if gain is None:
        return [*cells, "no reference", *blanks[1:]]
    shown = spread(gain.spread, percent=percent or ratio, signed=not ratio)
    if gain.spread.n < len(values):
        shown += f" (n {gain.spread.n})"
    return [*cells, shown, *([] if ratio else [_p(gain.p)])]


def _p(p: float | None) -> str:
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _against_paper(row: Found, column: str, metric: str) -> str:
    published, values = row.experiment.row.published.get(column), row.values(metric)
    return (
        number(Spread.of_some(values.values()).mean - published, percent=True, signed=True)
        if values and published
        else "-"
    )


def _notes(table: Table, scale: Scale, found: Sequence[Found], measured: dict[str, list[str]]) -> list[str]:
    notes = []
    results = [result for row in found for result in row.by_seed.values()]
    if not scale.same_as_paper and any(row.published for row in table.rows.values()):
        notes.append(
            "Our data, recipe and metric are not the paper's, so our results must not be compared with the paper's"
            " results; compare the rows of one column with each other."
        )
    if any(row.experiment.theirs(column) is not None for row in found for column in table.columns):
        notes.append(f"Published by others: {scale.theirs_are}, for the same recipe as this scale's.")
    if any(any(measured.values()) and row.by_seed for row in found):
        one = all(len(row.by_seed) <= 1 for row in found)
        notes.append(
            "Our results are from one seed each, so their spread is not known."
            if one
            else "Our results are mean ± standard deviation over n seeds."
        )
        if not one and len(table.columns) <= 2 and table.compare != "ratio":
            notes.append(
                f'Gains are differences to row "{table.rows[table.reference].label}", paired by seed; p is that of the'
                " paired t test, two-sided, not corrected for the number of rows."
            )
    same: dict[str, list[str]] = {}
    for row in found:
        if row.experiment.why_not is None:
            same.setdefault(row.experiment.hash(row.experiment.seeds[0]), []).append(row.experiment.row_id)
        elif row.experiment.row.run is not None:
            notes.append(f"{row.experiment.row_id} is {ELSEWHERE}: {row.experiment.why_not}.")
    notes += [f"{', '.join(ids)} have the same configuration at this scale." for ids in same.values() if len(ids) > 1]
    notes += [f"{table.note}."] if table.note else []
    notes += [f"{row.experiment.row.label}: {row.experiment.row.note}." for row in found if row.experiment.row.note]
    for row in found:
        if row.experiment.name in scale.controls:
            notes.append(f"{row.experiment.row.label}: {scale.controls[row.experiment.name]}.")
    unmeasured = [heading for column, heading in table.columns.items() if not measured[column]]
    if unmeasured:
        notes.append(f"Scale {scale.id} does not measure: {', '.join(unmeasured)}.")
    return notes + provenance(results)


def provenance(results: Sequence[Result]) -> list[str]:
    """Lines that name all images, machines and code versions of these results, so that readers see if they differ."""
    lines = []
    digests = sorted({f"{r.summary.get('data', '?')} ({r.summary.get('data_digest', '?')})" for r in results})
    machines = sorted({machine(r.environment) for r in results})
    codes = sorted({code(r.environment) for r in results})
    for name, values in (("Data", digests), ("Machine", machines), ("Code", codes)):
        if values:
            lines.append(f"{name}: {'; '.join(values)}.")
    if len(digests) > 1:
        lines.append("These runs used different images, so do not compare their results with each other.")
    return lines


def machine(environment: dict[str, str]) -> str:
    gpus = environment.get("gpus", "none")
    device = environment.get("cpu", "unknown") if gpus == "none" else gpus
    return f"{device}, {environment.get('cores', '?')} cores, torch {environment.get('torch', '?')}"


def code(environment: dict[str, str]) -> str:
    changed = ", with uncommitted changes" if environment.get("git_dirty") == "true" else ""
    return environment.get("git_sha", "unknown")[:10] + changed


def _missing(scale: Scale, found: Sequence[Found], measured: dict[str, list[str]]) -> list[str]:
    lines = []
    for row in found:
        if row.missing and row.experiment.why_not is None and any(measured.values()):
            what = f"seed{'s' if len(row.missing) > 1 else ''} {', '.join(map(str, row.missing))}"
            seeds = ",".join(map(str, row.missing))
            lines.append(f"{row.experiment.row_id}, {what}: {row.experiment.command(seeds)}")
        for metric in dict.fromkeys(metric for column, ours in measured.items() if row.has(column) for metric in ours):
            for seed, result in row.by_seed.items():
                if result.value(metric) is None and metric not in results.DERIVED:
                    lines.append(
                        f"{row.experiment.row_id}, seed {seed}, {metric}: {_evaluation(scale, metric, result)}"
                    )
    return lines + [line for row in found for line in row.refused]


def _evaluation(scale: Scale, metric: str, result: Result) -> str:
    """The command that measures a metric of a finished run."""
    return (
        f"python -m caco.evaluate run=runs/{scale.id}/{result.name}"
        f" {scale.evaluator_of(metric) or f'(no eval= gives {metric})'}"
    )


# The formats.


def as_latex(of: Sheet) -> str:
    """The sheet in LaTeX, for the package booktabs; notes and missing results are comments."""
    columns = "l" + "r" * (len(of.headers) - 1)
    over = " & ".join(rf"\multicolumn{{{size}}}{{c}}{{{_tex(name)}}}" for name, size in of.groups if size)
    body = [" & ".join(map(_tex, row)) + r" \\" for row in of.rows]
    lines = [
        r"\begin{table}",
        rf"\caption{{{_tex(of.title)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        over + r" \\",
        " & ".join(map(_tex, of.headers)) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
        *(f"% {note}" for note in of.notes),
        *(f"% missing: {line}" for line in of.missing),
    ]
    return "\n".join(lines)


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)


def as_csv(table: Table, scale: Scale, found: Sequence[Found]) -> str:
    """A line for each combination of row, table column and metric; numbers are not rounded."""
    reference = next((row for row in found if row.experiment.row_id == table.reference), None)
    out = io.StringIO()
    names = [
        "table",
        "row",
        "label",
        "paper_epochs",
        "paper_batch",
        "paper_rows",
        "column",
        "published",
        "theirs",
        "scale",
        "metric",
    ]
    names += ["state", "mean", "sd", "n", "seeds", "gain", "gain_sd", "gain_n", "gain_p", "missing_seeds", "command"]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in found:
        about = row.experiment.row
        for column in table.columns:
            for metric in scale.metrics.get(column, [""]):
                values = row.values(metric) if metric else {}
                line = {
                    "table": table.id, "row": row.experiment.row_id, "label": about.label, "paper_epochs": about.epochs,
                    "paper_batch": about.batch, "paper_rows": about.bank, "column": column,
                    "published": about.published.get(column), "theirs": row.experiment.theirs(column),
                    "scale": scale.id, "metric": metric,
                    "state": state(row, metric, column) or "measured",
                    "seeds": " ".join(map(str, values)), "missing_seeds": " ".join(map(str, row.missing)),
                }  # fmt: skip
                ours = Spread.of(values.values())
                if ours:
                    line |= {"mean": ours.mean, "sd": ours.sd, "n": ours.n}
                gain = (
                    Gain.of(values, reference.values(metric), ratio=table.compare == "ratio")
                    if reference and metric
                    else None
                )
                if gain and row is not reference:
                    line |= {
                        "gain": gain.spread.mean,
                        "gain_sd": gain.spread.sd,
                        "gain_n": gain.spread.n,
                        "gain_p": gain.p,
                    }
                if row.missing:
                    line["command"] = row.experiment.command(",".join(map(str, row.missing)))
                writer.writerow(line)
    return out.getvalue().rstrip("\n")


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where results are read, which tables, figures and reports share."""
    parser.add_argument("--records", nargs="+", type=expanded, metavar="FILE", help="read only these record files")
    parser.add_argument("--mlflow", metavar="URI", help="read an MLflow store, as sqlite:///mlflow.db, not records")
    parser.add_argument("--experiment", help="the experiment in MLflow; default: the name of the scale")


def read_results(arguments: argparse.Namespace, scale: str, *, curves: bool = False) -> tuple[list[Result], list[str]]:
    """Read the results of a scale from the sources on the command line; returns them, and messages about them."""
    if arguments.mlflow:
        return results.from_mlflow(arguments.mlflow, arguments.experiment or scale, curves=curves), []
    return results.from_records(arguments.records or results.default_records(scale))


def found_for(
    table: Table, scale: Scale, runs: Sequence[Result], arguments: argparse.Namespace, rows: Sequence[str] | None = None
) -> list[Found]:
    """results.find, with an error if the user named a source that has no result for this table.

    Raises:
        UserError: --mlflow or --records has no result for this table and scale; the message says which command makes
            them.
    """
    found = results.find(table, scale, runs, rows)
    if (arguments.mlflow or arguments.records) and not any(row.by_seed for row in found):
        source = arguments.mlflow or ", ".join(map(str, arguments.records))
        refused = [line for row in found for line in row.refused]
        tracking = f" tracking=mlflow tracking.uri={arguments.mlflow}" if arguments.mlflow else ""
        raise UserError(
            "\n  ".join(
                [
                    f"{source}: no run of {table.id} at scale {scale.id} among its {amount(len(runs), 'run')}; this"
                    " command makes them:",
                    f"python -m experiments.run {table.id} scale={scale.id}{tracking}",
                    *refused,
                ]
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", help="1 ... 7, or the name of another table, as rivals or negatives")
    parser.add_argument("--scale", help=f"one of {', '.join(scales())}; default: every scale that has results")
    parser.add_argument("--rows", help="show only these rows of the table, as none,both")
    parser.add_argument("--format", choices=FORMATS, default="text")
    add_sources(parser)
    with errors.shown():
        arguments = parser.parse_args(folders.take(sys.argv[1:]))
        print(_main(arguments))


def _main(arguments: argparse.Namespace) -> str:
    table = load_table(arguments.table)
    rows = arguments.rows.split(",") if arguments.rows else None
    parts = []
    for name in [arguments.scale] if arguments.scale else scales():
        scale = load_scale(name)
        if not arguments.scale and not (arguments.mlflow or arguments.records or results.default_records(name)):
            continue
        runs, messages = read_results(arguments, name)
        for line in messages:
            print(f"caco: {line}", file=sys.stderr)
        found = found_for(table, scale, runs, arguments, rows)
        if arguments.scale or any(row.by_seed for row in found):
            parts.append((scale, found))
    if not parts:
        scale = load_scale("paper")
        parts = [(scale, results.find(table, scale, [], rows))]
    if arguments.format == "csv":
        lines = [as_csv(table, scale, found).split("\n") for scale, found in parts]
        return "\n".join([lines[0][0], *(line for part in lines for line in part[1:])])
    show = {"text": as_text, "markdown": as_markdown, "latex": as_latex}[arguments.format]
    return "\n\n".join(show(sheet(table, scale, found)) for scale, found in parts)


if __name__ == "__main__":
    main()
