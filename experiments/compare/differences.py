"""Read the ledger, last checkpoint and summary of two runs, and list where they differ."""

import contextlib
import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLOCK = re.compile(r"time|(.*_)?seconds|.*_per_second|train_time")


class Names:
    """Translates the names of one commit's values into names that both commits share, and drops ignored ones.

    Args:
        renamed: pairs (pattern, new): a name that the pattern matches as a whole becomes `new`, which may use its
            groups, as \\1.
        ignored: patterns of names that are not compared; they are matched after renaming.
    """

    def __init__(self, renamed: Sequence[tuple[str, str]] = (), ignored: Sequence[str] = ()) -> None:
        self.renamed = [(re.compile(pattern), new) for pattern, new in renamed]
        self.ignored = [CLOCK, *map(re.compile, ignored)]

    def __call__(self, name: str) -> str | None:
        """The common name, or None if values of this name are not compared."""
        for pattern, new in self.renamed:
            if match := pattern.fullmatch(name):
                name = match.expand(new)
                break
        return None if any(pattern.fullmatch(name) for pattern in self.ignored) else name


@dataclass
class Run:
    """The results of a run under common names.

    A ledger row's key is (kind, step, number of earlier rows with the same kind and step).
    """

    rows: dict[tuple[str, int, int], dict[str, Any]]
    tensors: dict[str, Any]
    metrics: dict[str, float]


def read_run(run_dir: Path, names: Names) -> Run:
    """Read a run's directory. Raises: OSError: the run has no ledger, no checkpoint or no summary."""
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for line in (run_dir / "ledger.jsonl").read_text().splitlines():
        row = json.loads(line)
        kind, step = names(row.pop("kind")), row.pop("step")
        if kind is not None:
            rows[kind, step, seen[kind, step]] = _renamed(row, names)
            seen[kind, step] += 1
    import torch  # not at the top: loading torch takes seconds, and wrong arguments are to be refused at once

    checkpoints = sorted((run_dir / "checkpoints").glob("*.pt"))
    if not checkpoints:
        raise FileNotFoundError(f"{run_dir} has no checkpoint")
    state = torch.load(checkpoints[-1], map_location="cpu", weights_only=True)
    tensors = {
        name: value
        for path, value in _leaves(state, names)
        if isinstance(value, torch.Tensor) and (name := names(path)) is not None
    }
    summary = _renamed(json.loads((run_dir / "summary.json").read_text()), names)
    return Run(rows, tensors, {name: value for name, value in summary.items() if isinstance(value, (int, float))})


def _renamed(values: dict[str, Any], names: Names) -> dict[str, Any]:
    return {common: value for name, value in values.items() if (common := names(name)) is not None}


def _leaves(state: Any, names: Names, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of every leaf of a nested state, with each key renamed on the way down.

    The caller renames the whole path once more, because a rule may name a key at any depth or a full dotted path.
    """
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else None
    if items is None:
        yield path, state
        return
    for key, value in items:
        if (common := names(str(key))) is not None:
            yield from _leaves(value, names, f"{path}.{common}" if path else common)


def distance(a: float, b: float) -> str:
    """How far two numbers are apart: in units in the last place (ulp) if they are close, else as a relative error."""
    if a != a or b != b or abs(a) == float("inf") or abs(b) == float("inf"):
        return "not finite"
    if a == 0 and b == 0:
        return "the sign of zero"
    kind, code, integer = "float64", "<d", "<q"
    with contextlib.suppress(OverflowError):
        if all(struct.unpack("<f", struct.pack("<f", x))[0] == x for x in (a, b)):
            kind, code, integer = "float32", "<f", "<i"
    # The bit patterns of non-negative floats, read as integers, have the same order as the floats, so the difference of
    # two integers counts the floats between them. Negative floats get the negated integer of their absolute value.
    bits = [struct.unpack(integer, struct.pack(code, abs(x)))[0] * (1 if x >= 0 else -1) for x in (float(a), float(b))]
    units = abs(bits[0] - bits[1])
    return f"{units} ulp of {kind}" if units < 1000 else f"relative {abs(a - b) / max(abs(a), abs(b)):.1e}"


def told_apart(a: Any, b: Any) -> str:
    """The text "base | head" for two values that differ; for numbers also how far they are apart."""
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return f"{a:.9g} | {b:.9g} ({distance(a, b)})"
    return f"{a!r} | {b!r}"


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal to the last bit: NaN equals NaN, 0.0 differs from -0.0, 1 equals 1.0."""
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return struct.pack("<d", a) == struct.pack("<d", b) if numbers else a == b


def _bits(tensor: Any) -> tuple[Any, ...]:
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def tensors_apart(a: Any, b: Any) -> str | None:
    """How two tensors differ, as text; None if they are equal to the last bit."""
    if _bits(a) == _bits(b):
        return None
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {list(a.shape)} | {b.dtype} {list(b.shape)}"
    pairs = zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True)
    places = [(place, x, y) for place, (x, y) in enumerate(pairs) if not same(x, y)]
    place, x, y = places[0]
    return f"element {place} {told_apart(x, y)}, {len(places)} of {a.numel()} elements"


@dataclass
class Result:
    """How one case compares between both commits."""

    case: str
    rows: int = 0  # how many rows, tensors and metrics were compared
    tensors: int = 0
    metrics: int = 0
    differences: list[str] = field(default_factory=list)  # of rows in the order of steps, then of tensors and metrics
    differing: dict[str, int] = field(default_factory=dict)  # how many "rows", "tensors" and "metrics" differ
    only_base: list[str] = field(default_factory=list)  # names that only base has
    only_head: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # side -> reason
    cpu_seconds: dict[str, float] = field(default_factory=dict)  # by side; the first case includes the import of torch

    @property
    def verdict(self) -> str:
        if self.failed:
            return "failed"
        if self.differences:
            return "differs"
        return "equal in what both have" if self.only_base or self.only_head else "equal"


OPTIMISER_STATE = re.compile(r"(optimi[sz]er\.state\.)\d+\.(.*)")


def without_order(tensors: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`tensors` without the optimiser's, if `other` has the same optimiser tensors in any order; else all `tensors`.

    An optimiser numbers its parameters in the order in which it received them, and that order is not a result.
    """
    ours, theirs = ({k: v for k, v in side.items() if OPTIMISER_STATE.fullmatch(k)} for side in (tensors, other))

    def content(side: dict[str, Any]) -> Counter[Any]:
        return Counter((OPTIMISER_STATE.sub(r"\2", name), _bits(tensor)) for name, tensor in side.items())

    return {k: v for k, v in tensors.items() if k not in ours} if content(ours) == content(theirs) else tensors


def compare(case: str, base: Run, head: Run) -> Result:
    """Compare two runs bit for bit; also collects the names that only one of them has."""
    result = Result(case)
    only = {"base": result.only_base, "head": result.only_head}

    def common(a: dict[Any, Any], b: dict[Any, Any], called: Callable[[Any], str]) -> list[Any]:
        only["base"].extend(name for key in a if key not in b and (name := called(key)) not in only["base"])
        only["head"].extend(name for key in b if key not in a and (name := called(key)) not in only["head"])
        return [key for key in a if key in b]

    rows = common(base.rows, head.rows, lambda key: f"row {key[0]} of step {key[1]}")
    for kind, step, number in sorted(rows, key=lambda key: key[1]):
        a, b = base.rows[kind, step, number], head.rows[kind, step, number]
        shared = common(a, b, f"{kind}: {{}}".format)
        apart = [
            f"step {step}, {kind}: {name} {told_apart(a[name], b[name])}"
            for name in shared
            if not same(a[name], b[name])
        ]
        result.differences += apart
        result.differing["rows"] = result.differing.get("rows", 0) + bool(apart)
    result.rows = len(rows)

    result.tensors = len(base.tensors.keys() & head.tensors.keys())
    a, b = without_order(base.tensors, head.tensors), without_order(head.tensors, base.tensors)
    apart = [
        f"checkpoint: {k} {why}" for k in common(a, b, lambda k: f"tensor {k}") if (why := tensors_apart(a[k], b[k]))
    ]
    result.differing["tensors"] = len(apart)
    result.differences += apart

    metrics = common(base.metrics, head.metrics, lambda name: f"summary: {name}")
    apart = [
        f"summary: {k} {told_apart(base.metrics[k], head.metrics[k])}"
        for k in metrics
        if not same(base.metrics[k], head.metrics[k])
    ]
    result.metrics, result.differing["metrics"] = len(metrics), len(apart)
    result.differences += apart
    return result


def table(results: list[Result]) -> str:
    """Show the results as text: one line per case, then each name that only one commit has."""
    width = max(len("case"), *(len(result.case) for result in results))
    lines = [f"{'case':<{width}}  rows  tensors  metrics  result"]
    for result in results:
        words = result.verdict
        if result.failed:
            sides = {
                why: " and ".join(side for side in result.failed if result.failed[side] == why)
                for why in result.failed.values()
            }
            words += " in " + "; in ".join(f"{side}: {why}" for why, side in sides.items())
        elif result.differences:
            compared = {"rows": result.rows, "tensors": result.tensors, "metrics": result.metrics}
            counts = ", ".join(f"{result.differing[what]} of {number} {what}" for what, number in compared.items())
            words += f": first {result.differences[0]}; {counts}"
        lines.append(f"{result.case:<{width}} {result.rows:>5}  {result.tensors:>7}  {result.metrics:>7}  {words}")
    for side in ("base", "head"):
        found = Counter(name for result in results for name in getattr(result, f"only_{side}"))
        if found:
            lines += ["", f"only in {side}:", *(f"  {name} ({number} cases)" for name, number in found.items())]
    return "\n".join(lines)
