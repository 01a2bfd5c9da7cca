"""Does a change change a number? The same short runs in two commits, compared bit for bit.

    python -m experiments.compare main                            main with the working tree as it is
    python -m experiments.compare a06a4e7 main --cases 'pn='      two commits, some of the cases

Every file of conf/method and conf/pn, multi-crop, optimisers, single settings, two ranks and a run that was cut and went on are trained
for a few steps (digits, a narrow ResNet, one thread), and then every row of the ledger but its times, every tensor of the last
checkpoint and every metric of summary.json are compared. Exit code 0: all equal; 1: something differs, is missing or failed; 2: the
question makes no sense. A refactoring shows `--steps 50` over all cases. Not compared: speed, words, CUDA, large images, evaluate and
export.

This is no study of a method, but it stands on the same floor as experiments: above every command, and importing nothing of caco, because
the code that it runs is another commit's (experiments/compared.py). That code is reached as a user reaches it, by its command line and
the files of a run, so that what is behind them may be moved about freely.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).resolve().with_name("compared.py")

# The cases: small as tests/tiny.py is, with a value of every step and an evaluation after every epoch. Projector and optimiser are
# the method's own, narrow.

BATCH, IMAGES = 64, 1400
TINY = [
    "data=digits", "augmentation=digits", "backbone=small_resnet", "backbone.width=8", "projector.hidden_dim=16", "projector.dim=8",
    "schedule.warmup_epochs=0", f"batch={BATCH}", "precision=fp32", "device=cpu", "eval=[knn]", "eval_every_epochs=1",
    "tracking=ledger", "loader.num_workers=0", "log_every_steps=1",
]  # fmt: skip
MULTICROP = ["+augmentation.views.small.count=2", "+augmentation.views.small.size=8"]
SETTINGS = {  # of CaCo itself, besides what the files of conf/method, pn, optimizer and projector give
    "bank.reading=paper": ["bank.reading=paper"],
    "bank.initialisation=random": ["bank.initialisation=random"],
    "bank.final_lr=0.01": ["bank.lr=0.3", "bank.final_lr=0.01"],
    "warm_start.passes=3": ["warm_start.passes=3"],
    "schedule.unit=epoch": ["schedule.unit=epoch", "schedule.warmup_epochs=1"],
    "precision=bf16": ["precision=bf16"],
    "accumulate=4": ["accumulate=4"],
    "augmentation=cifar": ["augmentation=cifar"],
    "evaluators": [
        "eval=[knn_all,probe,geometry,linear,semi]", "eval.linear.epochs=2", "eval.linear.batch=256", "eval.semi.epochs=[2,1]",
    ],
}  # fmt: skip
ON_TWO_RANKS = ["pn=both", "pn=positive", "method=simclr", "method=nnclr", "method=adco multi-crop"]
CUT_AND_RESUMED = ["pn=both"]


@dataclass(frozen=True)
class Case:
    """A short run. `cut`: it is taken back to its middle and goes on from there."""

    name: str
    overrides: list[str]
    ranks: int = 1
    cut: bool = False


def options(tree: Path, group: str) -> list[str]:
    return sorted(path.stem for path in (tree / "conf" / group).glob("*.yaml"))


def replaced(overrides: list[str], others: list[str]) -> list[str]:
    """`others` behind `overrides`, less those that they set anew: caco refuses two choices of which one would be ignored."""
    keys = {override.partition("=")[0] for override in others}
    return [override for override in overrides if override.partition("=")[0] not in keys] + others


def cases_of(tree: Path, steps: int) -> dict[str, Case]:
    """Every case that a commit has, by name, in the words of this checkout."""
    epochs = max(2, steps // (IMAGES // BATCH) + 1)
    tiny = [*TINY, f"epochs={epochs}", f"max_steps={steps}"]
    cases = {f"method={name}": Case(f"method={name}", [*tiny, f"method={name}"]) for name in options(tree, "method")}
    cases |= {
        f"{name} multi-crop": Case(f"{name} multi-crop", [*case.overrides, *MULTICROP]) for name, case in list(cases.items())
    }
    chosen = [f"{group}={name}" for group in ("pn", "optimizer", "projector") for name in options(tree, group)]
    settings = {name: [name] for name in chosen} | SETTINGS
    cases |= {name: Case(name, replaced(tiny, overrides)) for name, overrides in settings.items()}
    for name in set(ON_TWO_RANKS) & set(cases):
        cases[f"{name}, two ranks"] = Case(f"{name}, two ranks", cases[name].overrides, ranks=2)
    for name in set(CUT_AND_RESUMED) & set(cases):
        cases[f"{name}, cut and resumed"] = Case(f"{name}, cut and resumed", cases[name].overrides, cut=True)
    return {name: cases[name] for name in sorted(cases, key=lambda name: (cases[name].ranks, name))}


def translated(overrides: list[str], changes: list[str]) -> list[str]:
    """What a side is told: each change "OLD -> NEW" puts NEW where an override begins with OLD, any other is added."""
    told = list(overrides)
    for change in changes:
        old, arrow, new = (part.strip() for part in change.partition("->"))
        if arrow:
            told = [re.sub(rf"^(\+*){re.escape(old)}", rf"\g<1>{new}", override) for override in told]
        else:
            told = replaced(told, [change])
    return told


# The two commits' files.


@dataclass
class Side:
    """One of the two that are compared. `told`: what is changed in its command lines (see translated)."""

    label: str  # base or head
    name: str  # as typed, with the commit
    tree: Path
    told: list[str]


def git(repository: Path, *arguments: str) -> bytes:
    """Raises: ValueError: git has no such commit, or this is no repository; in git's words."""
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)} failed: {done.stderr.decode().strip()}")
    return done.stdout


def check_out(repository: Path, commit: str | None, into: Path) -> str:
    """Write a commit's files, or for None those of the working tree that git does not ignore; returns what they are called.

    An archive and not `git worktree`: nothing is left in the repository, however this ends.
    """
    into.mkdir(parents=True)
    if commit is None:
        listed = git(repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0")
        for name in filter(None, listed):
            if (repository / name).is_file():  # one that was deleted is still listed
                (into / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(repository / name, into / name)
        changed = len(git(repository, "status", "--porcelain").splitlines())
        return f"the working tree (at {git(repository, 'rev-parse', '--short', 'HEAD').decode().strip()}, {changed} files changed)"
    sha = git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}").decode().strip()
    with tarfile.open(fileobj=io.BytesIO(git(repository, "archive", sha))) as archive:
        archive.extractall(into, filter="data")
    return commit if sha.startswith(commit) else f"{commit} ({sha[:7]})"


def native_digest(tree: Path) -> str:
    """Of everything that the compiled parts are made from."""
    digest = hashlib.sha256(f"{sys.implementation.cache_tag} {platform.machine()} {sysconfig.get_config_var('CXX')}".encode())
    digest.update(json.dumps([os.environ.get(name) for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS")]).encode())
    for path in sorted(tree.rglob("*")):
        if path.name == "setup.py" or path.suffix in (".c", ".cc", ".cpp", ".h", ".hpp"):
            digest.update(f"\0{path.relative_to(tree)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build_native(tree: Path, cache: Path) -> list[str]:
    """Put the compiled parts into a tree; sources that were compiled before are not compiled again. Returns their names.

    Raises:
        ValueError: nothing could be compiled; with the compiler's last words.
    """
    kept = cache / native_digest(tree)
    if not kept.is_dir():
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, capture_output=True, text=True, check=False
        )
        built = [path.relative_to(tree) for path in tree.rglob("*.so") if "build" not in path.relative_to(tree).parts]
        if not built:
            words = (done.stderr or done.stdout).strip()[-500:]
            raise ValueError(f"the native parts could not be built (--no-native compares without them):\n{words}")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as aside:
            for name in built:
                (Path(aside) / "kept" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(tree / name, Path(aside) / "kept" / name)
            with contextlib.suppress(OSError):  # another comparison was faster
                (Path(aside) / "kept").rename(kept)
    shutil.copytree(kept, tree, dirs_exist_ok=True)
    return sorted(path.name.partition(".")[0] for path in kept.rglob("*.so"))


# Running the cases.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(tree: Path) -> dict[str, str]:
    """Of a child: the commit's code first, one thread, and nothing that would make it a part of something larger."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_")) and k != "CACO_SWEEP"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        kept.pop(name, None)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return kept | threads | {"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}


def run_side(side: Side, cases: list[Case], folder: Path, steps: int, stop: threading.Event) -> dict[str, dict[str, Any]]:
    """Run all cases of a commit; {case: {"error": words or None, "cpu_seconds": ...}}. Each leaves `folder`/NUMBER/run."""
    folder.mkdir(parents=True)
    folders = {case.name: folder / f"{number:02}" for number, case in enumerate(cases)}
    outcomes: dict[str, dict[str, Any]] = {}
    for ranks in sorted({case.ranks for case in cases}):
        todo = [case for case in cases if case.ranks == ranks]
        while todo:  # again after a crash, without the case that crashed
            codes = run_children(side, todo, folders, folder / "job.json", ranks, steps, stop)
            if stop.is_set():
                return outcomes
            for case in list(todo):
                found = [folders[case.name] / f"outcome-{rank}.json" for rank in range(ranks)]
                if not all(path.is_file() for path in found):
                    outcomes[case.name] = {"error": f"the process ended with {codes}", "cpu_seconds": 0.0}
                    todo = todo[todo.index(case) + 1 :]
                    break
                told = [json.loads(path.read_text()) for path in found]
                errors = [outcome["error"] for outcome in told if outcome["error"]]
                outcomes[case.name] = {**told[0], "error": errors[0] if errors else None}
            else:
                todo = []
    return outcomes


def run_children(
    side: Side, cases: list[Case], folders: dict[str, Path], job: Path, ranks: int, steps: int, stop: threading.Event
) -> list[int]:
    """One process a rank, which runs all cases; their exit codes, when they have ended, however."""
    content = [
        {
            "name": case.name,
            "overrides": translated([*case.overrides, *cut_settings(case, steps)], side.told),
            "folder": str(folders[case.name].resolve()),
            "cut_at": steps // 2 if case.cut else None,
            "port": free_port(),
        }
        for case in cases
    ]
    job.write_text(json.dumps({"side": side.label, "tree": str(side.tree.resolve()), "cases": content}))
    command = [sys.executable, "-P", str(WORKER), str(job.resolve())]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"} if ranks > 1 else {}
    children = []
    try:
        for rank in range(ranks):
            of_rank = group | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            # A session of its own: Ctrl-C is for this process, which then ends them.
            child = subprocess.Popen(command, env=environment(side.tree) | of_rank, cwd=job.parent, start_new_session=True)
            children.append(child)
        while any(child.poll() is None for child in children) and not stop.is_set():
            if any(child.poll() for child in children):  # one died: the others wait for it in vain
                time.sleep(2)
                break
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [child.returncode for child in children]


def cut_settings(case: Case, steps: int) -> list[str]:
    return [f"checkpoint.every_steps={steps // 2}", "checkpoint.keep=1000"] if case.cut else []


# Comparing two runs.

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
        name: value for path, value in _leaves(state, names) if isinstance(value, torch.Tensor) and (name := names(path)) is not None
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
    """The optimiser's tensors named by their number, less those of `other`: the order in which it was given the parameters is no result.

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
        apart = [f"step {step}, {kind}: {name} {told_apart(a[name], b[name])}" for name in shared if not same(a[name], b[name])]
        result.differences += apart
        result.differing["rows"] = result.differing.get("rows", 0) + bool(apart)
    result.rows = len(rows)

    result.tensors = len(base.tensors.keys() & head.tensors.keys())
    a, b = without_order(base.tensors, head.tensors), without_order(head.tensors, base.tensors)
    apart = [f"checkpoint: {k} {why}" for k in common(a, b, lambda k: f"tensor {k}") if (why := tensors_apart(a[k], b[k]))]
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


# The command.


def table(results: list[Result]) -> str:
    """A line a case, and then the names that only one commit has, once each."""
    width = max(len("case"), *(len(result.case) for result in results))
    lines = [f"{'case':<{width}}  rows  tensors  metrics  result"]
    for result in results:
        told = result.verdict
        if result.failed:
            sides = {why: " and ".join(side for side in result.failed if result.failed[side] == why) for why in result.failed.values()}
            told += " in " + "; in ".join(f"{side}: {why}" for why, side in sides.items())
        elif result.differences:
            compared = {"rows": result.rows, "tensors": result.tensors, "metrics": result.metrics}
            counts = ", ".join(f"{result.differing[what]} of {number} {what}" for what, number in compared.items())
            told += f": first {result.differences[0]}; {counts}"
        lines.append(f"{result.case:<{width}} {result.rows:>5}  {result.tensors:>7}  {result.metrics:>7}  {told}")
    for side in ("base", "head"):
        found = Counter(name for result in results for name in getattr(result, f"only_{side}"))
        if found:
            lines += ["", f"only in {side}:", *(f"  {name} ({number} cases)" for name, number in found.items())]
    return "\n".join(lines)


def renaming(texts: list[str]) -> list[tuple[str, str]]:
    """The rules of --renamed: OLD=NEW, or a file with one a line.

    Raises:
        ValueError: a rule has no "=", or is no regular expression.
    """
    rules = []
    for text in texts:
        lines = Path(text).read_text().splitlines() if "=" not in text else [text]
        for line in (line.strip() for line in lines):
            if line and not line.startswith("#"):
                old, equals, new = (part.strip() for part in line.partition("="))
                if not (old and equals and new):
                    raise ValueError(f"--renamed: expected OLD=NEW, got {line!r}")
                rules.append((old, new))
    return rules


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="a commit")
    parser.add_argument("head", nargs="?", help="a commit; without it, the working tree as it is")
    parser.add_argument("--steps", type=int, default=50, help="of every run, warm start included; default: %(default)s")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases in whose name this is found")
    parser.add_argument("--without", metavar="REGEX", help="no case in whose name this is found")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, run nothing")
    parser.add_argument("--set", nargs="+", default=[], metavar="OVERRIDE", help="for every case, in both commits")
    for side in ("base", "head"):
        parser.add_argument(
            f"--{side}-set", nargs="+", default=[], metavar="OVERRIDE",
            help=f"for every case of {side} alone; 'OLD -> NEW' puts NEW where one of a case's own overrides begins with OLD",
        )  # fmt: skip
    parser.add_argument(
        "--renamed", nargs="+", default=[], metavar="OLD=NEW",
        help="base's OLD is head's NEW: a metric, a kind of rows, a tensor (a key at any depth of the checkpoint, or its dotted "
        "path), as a regular expression that matches the whole name, \\1 in NEW; or a file with one a line",
    )  # fmt: skip
    parser.add_argument("--ignore", nargs="+", default=[], metavar="REGEX", help="names that are not compared, after renaming")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything that was found")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep both commits' files, runs and outputs there")
    parser.add_argument("--no-native", action="store_true", help="compile nothing: PyTorch's paths alone")
    parser.add_argument("--one-at-a-time", action="store_true", help="base first, then head; default: both at once, a thread each")
    parser.add_argument("--repository", type=Path, default=CHECKOUT, help="default: this checkout")
    return parser


def say(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)


def compared(arguments: argparse.Namespace, folder: Path) -> tuple[list[Side], list[Result], dict[str, list[str]]]:
    """Both sides, a result for each case that both have, and the cases that only one has.

    Raises:
        ValueError: what was asked makes no sense; nothing has been run.
    """
    names = {"base": Names(renaming(arguments.renamed), arguments.ignore), "head": Names(ignored=arguments.ignore)}
    chosen = re.compile(arguments.cases)
    if arguments.steps < 2:
        raise ValueError(f"--steps: expected at least 2, got {arguments.steps}")
    sides = []
    for label, commit, told in (("base", arguments.base, arguments.base_set), ("head", arguments.head, arguments.head_set)):
        tree = folder / label / "tree"
        sides.append(Side(label, check_out(arguments.repository, commit, tree), tree, [*arguments.set, *told]))
    found = {side.label: cases_of(side.tree, arguments.steps) for side in sides}
    for label, of_side in found.items():
        found[label] = {
            name: case
            for name, case in of_side.items()
            if chosen.search(name) and not (arguments.without and re.search(arguments.without, name))
        }
    only = {
        "base": [name for name in found["base"] if name not in found["head"]],
        "head": [name for name in found["head"] if name not in found["base"]],
    }
    cases = [case for name, case in found["base"].items() if name in found["head"]]
    if not cases:
        raise ValueError(f"--cases: expected at least one case that both commits have, got none; there are: "
                         f"{', '.join(cases_of(sides[0].tree, arguments.steps))}")  # fmt: skip
    if arguments.list:
        return sides, [Result(case.name) for case in cases], only
    for side in sides:
        built = [] if arguments.no_native else build_native(side.tree, arguments.repository / "build" / "compare")
        say(f"{side.label}: {side.name}, {', '.join(built) or 'no native parts'}")
    stop = threading.Event()
    with ThreadPoolExecutor(1 if arguments.one_at_a_time else 2) as pool:
        running = {
            side.label: pool.submit(run_side, side, cases, folder / side.label / "runs", arguments.steps, stop) for side in sides
        }
        try:
            outcomes = {label: future.result() for label, future in running.items()}
        except BaseException:
            stop.set()
            raise
    results = []
    for number, case in enumerate(cases):
        told = {label: outcomes[label][case.name] for label in outcomes}
        failed = {label: outcome["error"] for label, outcome in told.items() if outcome["error"]}
        result = Result(case.name)
        if not failed:
            read = {}
            for label in told:
                try:
                    read[label] = read_run(folder / label / "runs" / f"{number:02}" / "run", names[label])
                except OSError as error:
                    failed[label] = str(error)
            if not failed:
                result = compare(case.name, read["base"], read["head"])
        result.failed, result.cpu_seconds = failed, {label: outcome["cpu_seconds"] for label, outcome in told.items()}
        results.append(result)
    return sides, results, only


def main(argv: list[str] | None = None) -> int:
    """The exit code: see above."""
    arguments = parser().parse_args(argv)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if arguments.keep:
            folder = arguments.keep
            if folder.exists() and any(folder.iterdir()):
                print(f"compare: --keep: expected an empty folder or none, got {folder}", file=sys.stderr)
                return 2
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="caco-compare-")))
        try:
            sides, results, only = compared(arguments, folder)
        except (ValueError, re.error, OSError) as error:
            say(str(error))
            return 2
        except KeyboardInterrupt:
            say("interrupted; nothing was compared")
            return 130
    if arguments.list:
        print("\n".join(result.case for result in results))
        return 0
    seconds = time.monotonic() - started
    print(table(results))
    for side, cases in only.items():
        if cases:
            print(f"\ncases that only {side} has, not run: {', '.join(cases)}")
    counts = Counter(result.verdict for result in results)
    told = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    print(f"\n{sides[0].name} and {sides[1].name}, {arguments.steps} steps a case, {seconds:.0f} s: {told}")
    if arguments.json:
        content = {
            "base": sides[0].name,
            "head": sides[1].name,
            "steps": arguments.steps,
            "seconds": seconds,
            "cases": [{**asdict(result), "verdict": result.verdict} for result in results],
            "only": only,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    # A case that is new in head proves nothing wrong; one that head has lost does.
    return 1 if set(counts) != {"equal"} or only["base"] else 0


if __name__ == "__main__":
    sys.exit(main())
