"""Compares runs side by side: selects, sorts and groups them over seeds, as a table of what differs between them.
Imports no torch.
"""

import csv
import difflib
import io
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path
from typing import Any

from caco import metrics
from caco.errors import UserError
from caco.runs.identity import is_neutral
from caco.runs.paths import as_typed
from caco.saying import amount
from caco.sheets import Sheet, Spread, as_markdown, as_text, number, spread
from caco.tracking.recorded import Outline, typed

FORMATS = ("text", "markdown", "csv")
_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


_LAST = ("continued_run", "continued_epochs", "max_steps", "device", "weights_digest")  # settings that explain little


@dataclass(frozen=True)
class Row:
    """One run, or several that differ only in their seed."""

    runs: Sequence[Outline]

    def value(self, name: str) -> Any:
        """A setting, or a metric; if the runs have different numbers, their mean."""
        found = [value for run in self.runs if (value := run.value(name)) is not None]
        if found and all(_is_number(value) for value in found) and len(set(found)) > 1:
            return Spread.of_some(found).mean
        return found[0] if found else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def known_names(runs: Sequence[Outline]) -> set[str]:
    """Everything that can be a column."""
    every: set[str] = {"state", "note", "run"}
    return every.union(*({**run.summary, **run.settings, **run.options} for run in runs))


def full_name(name: str, known: set[str]) -> str:
    """The full name of a column, given that name or an end of it that fits only one: lr_reference_batch for
    bank.lr_reference_batch.

    Raises:
        UserError: no run has such a name, or several names end like this.
    """
    if name in known:
        return name
    ending = sorted(key for key in known if key.endswith(f".{name}"))
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise UserError(f"{name}: could be {', '.join(ending)}; give the full name")
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    raise UserError(
        f"{name}: no run here has such a setting or metric" + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def chosen(runs: Sequence[Outline], conditions: Sequence[str]) -> list[Outline]:
    """The runs for which all conditions hold: KEY=VALUE, KEY!=VALUE, KEY<VALUE, ... on settings, metrics, options and
    state.

    Raises:
        UserError: a condition cannot be read, or names something that no run has.
    """
    known = known_names(runs)
    for condition in conditions:
        parsed = re.fullmatch(r"([\w./-]+?)(!=|<=|>=|=|<|>)(.*)", condition)
        if parsed is None:
            raise UserError(f"--where {condition}: expected KEY=VALUE, or !=, <, <=, > or >= in its place")
        name, sign, text = full_name(parsed[1], known), parsed[2], parsed[3]
        wanted = typed(text)
        if "<" in sign or ">" in sign:
            if not _is_number(wanted):
                raise UserError(f"--where {condition}: expected a number after {sign}, got {text}")
            runs = [run for run in runs if _is_number(run.value(name)) and _COMPARED[sign](run.value(name), wanted)]
        else:
            runs = [run for run in runs if _COMPARED[sign](_among(run, name, wanted, text), True)]
    return list(runs)


def _among(run: Outline, name: str, wanted: Any, text: str) -> bool:
    """Whether the setting or the option of this name has the wanted value; both may exist."""
    return any(value == wanted or str(value) == text for value in (run.value(name), run.options.get(name)))


def differing(runs: Sequence[Outline]) -> list[str]:
    """A minimal list of settings that distinguish the runs: options first, then other settings. A setting whose value
    follows from those before it is left out.
    """
    first = ["method", "pn", "bank", "backbone", "data", "augmentation", "optimizer", "projector", "negatives"]
    options = sorted(set().union(*(run.options for run in runs)) - {"tracking", "loader", "launcher", "eval", "preset"})
    options.sort(key=lambda name: first.index(name) if name in first else len(first))
    settings = sorted(
        filterfalse(is_neutral, set().union(*(run.settings for run in runs))),
        key=lambda key: (key in _LAST, "." in key, key),
    )
    groups: dict[tuple[str, ...], list[Outline]] = {(): list(runs)}
    taken: list[str] = []

    def value(run: Outline, key: str) -> str:
        return repr(run.options.get(key) if key in options else run.settings.get(key))

    # The run's own seed comes first, because other seeds mostly follow it.
    seeds = [key for key in settings if key == "seed" or key.endswith(".seed")]
    for key in [
        *options,
        *(key for key in settings if key not in seeds),
        *sorted(seeds, key=lambda key: key != "seed"),
    ]:
        parts: dict[tuple[str, ...], list[Outline]] = {}
        for of, together in groups.items():
            for run in together:
                parts.setdefault((*of, value(run, key)), []).append(run)
        if len(parts) > len(groups):
            groups = parts
            taken.append(key)
    return taken


def rows_of(runs: Sequence[Outline], *, over_seeds: bool) -> list[Row]:
    """One row for each run; or one for all runs in the same state whose settings differ only in the seed. Runs without
    a summary stay in rows of their own.
    """
    if not over_seeds:
        return [Row([run]) for run in runs]
    together: dict[Any, list[Outline]] = {}
    # Another seed, such as the bank's, may follow the run's seed, or be fixed and equal it by chance.
    equal: dict[str, set[Any]] = {}
    for run in runs:
        for key, value in run.settings.items():
            if key.endswith(".seed") and value == run.settings.get("seed"):
                equal.setdefault(key, set()).add(value)
    following = {key for key, values in equal.items() if len(values) > 1}
    for run in runs:
        seed = run.settings.get("seed")
        follows = {"seed", *(key for key in following if run.settings.get(key) == seed)}
        own = {key: value for key, value in run.settings.items() if key not in follows and not is_neutral(key)}
        together.setdefault((run.state, repr(sorted(own.items())) if run.summary else run.run_dir), []).append(run)
    return [Row(some) for some in together.values()]


def sort(rows: list[Row], by: str | None, *, reverse: bool, known: set[str]) -> list[Row]:
    """Sort by a setting or a metric: numbers before words, rows without a value last."""
    if by is None:
        return rows
    name = full_name(by, known)
    having = [row for row in rows if row.value(name) is not None]
    having.sort(
        key=lambda row: (0, row.value(name), "") if _is_number(row.value(name)) else (1, 0, str(row.value(name))),
        reverse=reverse,
    )
    return having + [row for row in rows if row.value(name) is None]


def results_of(runs: Sequence[Outline]) -> list[str]:
    """The metrics that a table shows by default: the accuracies or, if there are none, the loss."""
    found = metrics.accuracies(set().union(*(run.summary for run in runs)))
    return found or (["loss"] if any("loss" in run.summary for run in runs) else [])


def table(
    runs: Sequence[Outline], *, columns: Sequence[str] | None = None, by: str | None = None, reverse: bool = False,
    over_seeds: bool = False,
    format: str = "text", title: str = "",
) -> str:  # fmt: skip
    """The runs as a table; see `python -m caco.results --help`.

    Args:
        columns: settings, options and metrics; None: what differs between the runs, and their results.
    """
    known = known_names(runs)
    rows = sort(rows_of(runs, over_seeds=over_seeds), by, reverse=reverse, known=known)
    if columns is None:
        left = [key for key in differing(runs) if not (over_seeds and key == "seed")]
        names = [*left, *results_of(runs)]
    else:
        names = [full_name(name, known) for name in columns]
    states = any(run.state != "finished" for run in runs)
    in_full = format == "csv"
    heads, lines = [metrics.title(name) if not in_full else name for name in names], []
    if in_full and over_seeds:
        heads = [head for name in names for head in ((name, f"{name}_sd") if _varies(rows, name) else (name,))]
    heads += (["n"] if over_seeds else []) + (["state", "run"] if in_full else [*(["state"] if states else []), "run"])
    for row in rows:
        cells = [
            cell
            for name in names
            for cell in _cells(row, name, in_full=in_full, with_sd=over_seeds and _varies(rows, name))
        ]
        cells += [str(len(row.runs))] if over_seeds else []
        run = row.runs[0]
        cells += [run.state] if in_full or states else []
        lines.append(
            [
                *cells,
                (
                    " ".join(as_typed(one.run_dir) for one in row.runs)
                    if in_full or len(row.runs) == 1
                    else f"{as_typed(run.run_dir)} ..."
                ),
            ]
        )
    if in_full:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([heads, *lines])
        return out.getvalue().rstrip("\n")
    notes = [f"{as_typed(run.run_dir)}: {run.note}" for run in runs if run.note]
    if over_seeds:
        notes.insert(0, "Mean ± standard deviation over n runs that differ only in their seed.")
    if format == "text":  # left-align the paths and their heading
        width = max(len(line[-1]) for line in (heads, *lines))
        heads, lines = [*heads[:-1], heads[-1].ljust(width)], [[*line[:-1], line[-1].ljust(width)] for line in lines]
    sheet = Sheet(title or amount(len(runs), "run"), [("", len(heads))], heads, lines, notes)
    if format == "markdown":
        return as_markdown(sheet)
    return re.sub(r"\n{2,}", "\n\n", as_text(sheet).rstrip(), count=1)


def _measured(row: Row, name: str) -> list[float]:
    """A metric's values; empty if a setting has the same name, which takes precedence."""
    return [run.summary[name] for run in row.runs if name not in run.settings and _is_number(run.summary.get(name))]


def _varies(rows: Sequence[Row], name: str) -> bool:
    return any(_measured(row, name) for row in rows)


def _cells(row: Row, name: str, *, in_full: bool, with_sd: bool) -> list[str]:
    if measured := _measured(row, name):
        of = Spread.of_some(measured)
        if in_full:
            return [repr(of.mean), *([repr(of.sd) if of.sd is not None else ""] if with_sd else [])]
        return [spread(of, percent=metrics.is_percent(name))]
    value = row.value(name)
    if name in row.runs[0].options and not in_full:
        value = row.runs[0].options[name]
    blank = "" if in_full else "-"
    text = (
        blank
        if value is None
        else number(value, percent=False)
        if isinstance(value, float) and not in_full
        else str(value)
    )
    return [text, *([""] if in_full and with_sd else [])]


def outlines(run_dirs: Iterable[Path], read: Callable[[Path], Outline]) -> list[Outline]:
    """The outlines of those directories that exist."""
    return [read(folder) for folder in run_dirs if folder.is_dir()]
