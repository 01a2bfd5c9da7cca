"""What two runs left, and where it differs."""

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
    """What the values of a run are called in both commits, and what is left out.

    Args:
        renamed: (pattern, new) of base's names: a name that matches as a whole becomes `new`, with \\1 for its groups.
        ignored: patterns of names that are not compared, after renaming.
    """

    def __init__(self, renamed: Sequence[tuple[str, str]] = (), ignored: Sequence[str] = ()) -> None:
        self.renamed = [(re.compile(pattern), new) for pattern, new in renamed]
        self.ignored = [CLOCK, *map(re.compile, ignored)]

    def __call__(self, name: str) -> str | None:
        """The common name, or None for one that is left out."""
        for pattern, new in self.renamed:
            if match := pattern.fullmatch(name):
                name = match.expand(new)
                break
        return None if any(pattern.fullmatch(name) for pattern in self.ignored) else name


@dataclass
class Run:
    """What a run left, by common names. Rows are told apart by kind, step and how many such came before."""

    rows: dict[tuple[str, int, int], dict[str, Any]]
    tensors: dict[str, Any]
    metrics: dict[str, float]


def read_run(run_dir: Path, names: Names) -> Run:
    """Raises: OSError: the run left no ledger, checkpoint or summary."""
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for line in (run_dir / "ledger.jsonl").read_text().splitlines():
        row = json.loads(line)
        kind, step = names(row.pop("kind")), row.pop("step")
        if kind is not None:
            rows[kind, step, seen[kind, step]] = _renamed(row, names)
            seen[kind, step] += 1
    import torch  # late: what can be refused is refused before

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
    """(dotted path, leaf) of what is nested. A rule of renaming may mean a key at any depth, or the whole path."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else None
    if items is None:
        yield path, state
        return
    for key, value in items:
        if (common := names(str(key))) is not None:
            yield from _leaves(value, names, f"{path}.{common}" if path else common)


def distance(a: float, b: float) -> str:
    """How far two numbers are apart, in units of the last place where they are close."""
    if a != a or b != b or abs(a) == float("inf") or abs(b) == float("inf"):
        return "not finite"
    if a == 0 and b == 0:
        return "the sign of zero"
    kind, code, integer = "float64", "<d", "<q"
    with contextlib.suppress(OverflowError):
        if all(struct.unpack("<f", struct.pack("<f", x))[0] == x for x in (a, b)):
            kind, code, integer = "float32", "<f", "<i"
    # Floats of one sign are ordered as the integers of the same bits; the other sign counts down from zero.
    bits = [struct.unpack(integer, struct.pack(code, abs(x)))[0] * (1 if x >= 0 else -1) for x in (float(a), float(b))]
    units = abs(bits[0] - bits[1])
    return f"{units} ulp of {kind}" if units < 1000 else f"relative {abs(a - b) / max(abs(a), abs(b)):.1e}"


def told_apart(a: Any, b: Any) -> str:
    """Two values that differ, and by how much."""
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return f"{a:.9g} | {b:.9g} ({distance(a, b)})"
    return f"{a!r} | {b!r}"


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit: NaN is itself, 0.0 is not -0.0, 1 is 1.0."""
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return struct.pack("<d", a) == struct.pack("<d", b) if numbers else a == b


def _bits(tensor: Any) -> tuple[Any, ...]:
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def tensors_apart(a: Any, b: Any) -> str | None:
    """What differs between two tensors; None where nothing does."""
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
    """One case in both commits."""

    case: str
    rows: int = 0  # compared, as the next two
    tensors: int = 0
    metrics: int = 0
    differences: list[str] = field(default_factory=list)  # in the order of steps; then tensors, then metrics
    differing: dict[str, int] = field(default_factory=dict)  # how many rows, tensors, metrics
    only_base: list[str] = field(default_factory=list)
    only_head: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # side: why
    cpu_seconds: dict[str, float] = field(default_factory=dict)  # by side; the first case's with torch's import

    @property
    def verdict(self) -> str:
        if self.failed:
            return "failed"
        if self.differences:
            return "differs"
        return "equal in what both have" if self.only_base or self.only_head else "equal"


OPTIMISER_STATE = re.compile(r"(optimi[sz]er\.state\.)\d+\.(.*)")


def without_order(tensors: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The optimiser's tensors named by their number, less those of `other`: the order in which it was given the
    parameters is no result.

    Only where both have the same tensors, each as often; else all stay.
    """
    ours, theirs = ({k: v for k, v in side.items() if OPTIMISER_STATE.fullmatch(k)} for side in (tensors, other))

    def content(side: dict[str, Any]) -> Counter[Any]:
        return Counter((OPTIMISER_STATE.sub(r"\2", name), _bits(tensor)) for name, tensor in side.items())

    return {k: v for k, v in tensors.items() if k not in ours} if content(ours) == content(theirs) else tensors


def compare(case: str, base: Run, head: Run) -> Result:
    """Everything that both have, bit for bit, and the names of what only one has."""
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
    """A line a case, and then the names that only one commit has, once each."""
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
