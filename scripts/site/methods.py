"""Pages of the site with every method's published and measured results, and with all tables that have results.

Published results come from experiments/*.yaml and the file headers of conf/method. Our results come from the records of
each scale in experiments/records; as in python -m analysis.table, the hash of the configuration decides which belong to
a row.
"""

import functools
from collections.abc import Iterator, Sequence

from analysis import results, table
from analysis.results import Found, heading
from caco import metrics
from caco.config.folders import CONF, groups
from caco.sheets import Spread, as_markdown, spread
from experiments.run import RECORDS
from experiments.tables import Row, Scale, Table, load_scale, load_table, scales, tables
from scripts.site.text import comment, prose

FOLDER = "reference"


def pages() -> dict[str, str]:
    return {f"{FOLDER}/methods.md": _methods(), f"{FOLDER}/tables.md": _tables()}


@functools.cache
def measured() -> list[tuple[Table, Scale, Sequence[Found]]]:
    """(table, scale, results of its rows) for every table and scale with a recorded run."""
    found: list[tuple[Table, Scale, Sequence[Found]]] = []
    for name in scales():
        if not (RECORDS / f"{name}.json").is_file():
            continue
        runs, _ = results.from_records([RECORDS / f"{name}.json"])
        recorded = {run.label["table"] for run in runs if run.label.get("scale") == name}
        for known in sorted(recorded & set(tables()), key=_papers_first):
            of, scale = load_table(known), load_scale(name)
            found.append((of, scale, results.find(of, scale, runs)))
    return found


def _papers_first(table: str) -> tuple[bool, str]:
    return not table.startswith("table"), table


def rows_of(method: str) -> Iterator[tuple[Table, Row]]:
    for name in sorted(tables(), key=_papers_first):
        of = load_table(name)
        for row in of.rows.values():
            if f"method={method}" in (row.run or ()):
                yield of, row


def _published(method: str) -> list[str]:
    """A line for each table row of this method that has a published number or a note."""
    lines = []
    for of, row in rows_of(method):
        sizes = [f"{value:,} {name}" for name, value in _sizes(row) if value is not None]
        numbers = [f"{of.columns[column]} {value:g}" for column, value in row.published.items()]
        note = f" ({row.note})" if row.note else ""
        if numbers or note:
            lines.append(
                f"| {_name(of)} | {prose(row.label)} | {', '.join(sizes)} | {prose('; '.join(numbers) + note)} |"
            )
    return lines


def _name(of: Table) -> str:
    """A table of the paper by its number, any other by the name under which experiments.run takes it."""
    return of.table if of.id.startswith("table") else f"`{of.id}`"


def _sizes(row: Row) -> list[tuple[str, int | None]]:
    return [("epochs", row.epochs), ("images a batch", row.batch), ("rows", row.bank)]


def _ours(method: str) -> list[str]:
    lines: dict[tuple[str, ...], str] = {}
    for of, scale, found in measured():
        for one in found:
            if f"method={method}" not in (one.experiment.row.run or ()) or not one.by_seed:
                continue
            key = (scale.id, *sorted(result.hash for result in one.by_seed.values()))
            numbers = []
            for metric in dict.fromkeys(metric for column in of.columns for metric in scale.metrics.get(column, [])):
                if values := one.values(metric):
                    shown = spread(Spread.of_some(values.values()), percent=metrics.is_percent(metric))
                    numbers.append(f"{heading(metric)} {shown}")
            label = f"{one.experiment.row.label}, table {_name(of)}"
            lines.setdefault(key, f"| {scale.id} | {label} | {len(one.by_seed)} | {', '.join(numbers)} |")
    return list(lines.values())


def _methods() -> str:
    parts = [
        "# Methods, published and ours",
        "For each method, this page shows the description in its file of `conf/method`, published results, and results"
        " measured with caco so far. Our results were measured at small scales"
        " ([what these are](../experiments.md)) on other data and with other networks, so they must not be compared"
        " with the published ones. A method without results of ours has not been run. The records are described"
        " [here](../records/real_runs.md), and whole tables are [here](tables.md).",
    ]
    for method in groups()["method"]:
        lines = (CONF / "method" / f"{method}.yaml").read_text(encoding="utf-8").splitlines()
        header = []
        for line in lines:
            if not line.startswith("#"):
                break
            header.append(line)
        parts += [
            f"## {method} {{ #{method} }}",
            comment(line for line in header if "@package " not in line),
            f"Settings and their defaults: [method={method}](configuration/method.md#{method}).",
        ]
        if published := _published(method):
            head = "| table | row | recipe | published result (in percent unless noted) |\n|---|---|---|---|"
            parts.append("\n".join([head, *published]))
        if ours := _ours(method):
            parts.append("\n".join(["| our scale | row | seeds | our result, percent |\n|---|---|---|---|", *ours]))
        else:
            parts.append("This method has not been measured with caco yet.")
    return "\n\n".join(parts)


def _tables() -> str:
    parts = [
        "# Tables so far",
        "These are the outputs of `python -m analysis.table TABLE --scale SCALE --format markdown` for the records in"
        " this repository. [How to read them](../experiments.md#tables-figures-a-page).",
    ]
    for of, scale, found in measured():
        sheet = table.sheet(of, scale, found)
        text = as_markdown(sheet).replace("**", "", 2).removeprefix(sheet.title).strip()
        parts += [f"## Table {of.table} at scale {scale.id}", prose(sheet.title) + ".", _safe(text)]
    return "\n\n".join(parts)


def _safe(text: str) -> str:
    """The table's text with the commands in its notes formatted as code."""
    lines = []
    for line in text.splitlines():
        before, sign, command = line.partition("python -m ")
        lines.append(f"{before}`{sign}{command}`" if sign and line.startswith("- ") else line)
    return "\n".join(lines)
