"""Tables of text, for analysis.table and caco.results. Imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for a single value) and number of values."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of_some(cls, values: Iterable[float]) -> "Spread":
        """The spread of one or more values."""
        spread = cls.of(values)
        assert spread is not None, "at least one value"
        return spread

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """The spread of values; None if there are none."""
        array = np.fromiter(values, dtype=float)
        if not len(array):
            return None
        return cls(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, len(array))


@dataclass
class Sheet:
    """A table ready for printing: only text.

    Args:
        groups: (heading, number of columns) above the headers.
        notes: what a reader must know. missing: results that do not exist yet, with the commands that make them.
    """

    title: str
    groups: list[tuple[str, int]]
    headers: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def number(value: float, *, percent: bool, signed: bool = False) -> str:
    """Percentages to 0.01; other numbers to three digits, from 1,000 on all digits before the point."""
    sign = "+" if signed else ""
    if abs(value) >= 1000:
        return f"{value:{sign},.0f}"
    return f"{value:{sign}.2f}" if percent else f"{value:{sign}.3g}"


def spread(of: Spread, *, percent: bool, signed: bool = False) -> str:
    mean = number(of.mean, percent=percent, signed=signed)
    return mean if of.sd is None else f"{mean} ± {number(of.sd, percent=percent)}"


# The output formats.


def as_text(of: Sheet) -> str:
    widths = [max(len(row[i]) for row in (of.headers, *of.rows)) for i in range(len(of.headers))]
    over, at = [], 0
    for name, size in of.groups:
        if size:
            room = sum(widths[at : at + size]) + 2 * (size - 1)
            widths[at + size - 1] += max(0, len(name) - room)
            over.append(name.ljust(max(room, len(name))))
            at += size
    lines = [of.title, "", "  ".join(over).rstrip()]
    for row in (of.headers, ["-" * width for width in widths], *of.rows):
        lines.append(
            "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
    lines += ["", *of.notes]
    if of.missing:
        lines += ["", "Missing:", *(f"  {line}" for line in of.missing)]
    return "\n".join(lines)


def as_markdown(of: Sheet) -> str:
    heads = []
    for name, size in of.groups:
        heads += [name] * size
    named = [f"{group}: {header}" if group else header for group, header in zip(heads, of.headers, strict=True)]
    lines = [
        f"**{of.title}**",
        "",
        _pipes(named),
        _pipes([":--", *["--:"] * (len(named) - 1)]),
        *map(_pipes, of.rows),
        "",
    ]
    lines += [f"- {note}" for note in of.notes]
    return "\n".join(lines + [f"- missing: {line}" for line in of.missing])


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
