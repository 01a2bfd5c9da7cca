"""Does a code change alter a result? Train the same short runs with two commits and compare them bit for bit.

    python -m experiments.compare main                            compare main with the working tree as it is
    python -m experiments.compare a06a4e7 main --cases 'pn='      compare two commits on some of the cases

The cases cover every file of conf/method, conf/pn and conf/negatives, multi-crop, optimisers, single settings, two
ranks, and a run that is interrupted and resumed. Each is trained for a few steps (digits, a narrow ResNet, one thread).
Compared are every row of the ledger except its times, every tensor of the last checkpoint and every metric of
summary.json. Exit code 0: everything is equal; 1: something differs, is missing or failed; 2: the arguments make no
sense. Before a refactoring is merged, all cases must be equal with `--steps 50`. Not compared: speed, messages, CUDA,
large images, caco.evaluate and caco.export.
"""

# This package is not a study of a method, but it belongs to the same layer as the other experiments: it runs commands.
# It imports nothing from caco, because the code that it runs belongs to other commits (experiments/compare/worker.py).
# It uses only what a user sees of that code, the command line and the files of a run, so that it keeps working when
# modules are moved or renamed.

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from experiments.compare.cases import Case, cases_of
from experiments.compare.differences import Names, Result, compare, read_run, table
from experiments.compare.refusal import Refused, say
from experiments.compare.running import run_side
from experiments.compare.trees import Side, build_native, check_out

CHECKOUT = Path(__file__).resolve().parents[2]


def expression(option: str, text: str) -> re.Pattern[str]:
    """Compile the regular expression that was given for `option`. Raises: Refused: it is not a valid one."""
    try:
        return re.compile(text)
    except re.error as error:
        raise Refused(f"{option}: expected a regular expression, got {text!r}: {error}") from error


def renaming(texts: list[str]) -> list[tuple[str, str]]:
    """Parse the rules of --renamed: each text is OLD=NEW, or a file with one such rule per line.

    Raises:
        Refused: the file does not exist, a rule has no "=", OLD is not a valid regular expression, or NEW refers to a
            group that OLD does not have.
    """
    rules = []
    for text in texts:
        if "=" not in text and not Path(text).is_file():
            raise Refused(
                f"--renamed: expected OLD=NEW or a file with one a line, got {text!r}, and there is no such file"
            )
        lines = Path(text).read_text().splitlines() if "=" not in text else [text]
        for line in (line.strip() for line in lines):
            if line and not line.startswith("#"):
                old, equals, new = (part.strip() for part in line.partition("="))
                if not (old and equals and new):
                    raise Refused(f"--renamed: expected OLD=NEW, got {line!r}")
                try:
                    expression("--renamed", old).sub(new, "")  # replaces nothing, but raises if NEW is not valid
                except (re.error, IndexError) as error:
                    raise Refused(f"--renamed: expected in NEW the groups of OLD, got {line!r}: {error}") from error
                rules.append((old, new))
    return rules


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="a commit")
    parser.add_argument("head", nargs="?", help="a commit; default: the working tree as it is")
    parser.add_argument(
        "--steps", type=int, default=50, help="steps of every run, warm start included; default: %(default)s"
    )
    parser.add_argument("--cases", default="", metavar="REGEX", help="only the cases whose name matches")
    parser.add_argument("--without", metavar="REGEX", help="leave out the cases whose name matches")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and run nothing")
    parser.add_argument("--set", nargs="+", default=[], metavar="OVERRIDE", help="add to every case in both commits")
    for side in ("base", "head"):
        parser.add_argument(
            f"--{side}-set",
            nargs="+",
            default=[],
            metavar="OVERRIDE",
            help=(
                f"add to every case in {side} only; 'OLD -> NEW' replaces OLD by NEW where one of a case's own"
                " overrides begins with OLD"
            ),
        )
    parser.add_argument(
        "--renamed",
        nargs="+",
        default=[],
        metavar="OLD=NEW",
        help=(
            "what base calls OLD is called NEW in head: a metric, a kind of ledger row, or a tensor (a key at any depth"
            " of the checkpoint, or its dotted path). OLD is a regular expression that must match the whole name; NEW"
            " may use its groups, as \\1. Instead of a rule, a file with one rule per line can be given"
        ),
    )
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="REGEX", help="do not compare names that match, after renaming"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the full comparison to this file")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep both commits' files, runs and outputs there")
    parser.add_argument("--no-native", action="store_true", help="compile nothing; run only the PyTorch code paths")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="run base, then head; default: both at once, one thread each"
    )
    parser.add_argument("--repository", type=Path, default=CHECKOUT, help="default: this checkout")
    return parser


def check_out_both(arguments: argparse.Namespace, folder: Path) -> list[Side]:
    """Check out base and head below `folder`. Raises: Refused: there is no such commit."""
    sides = []
    for label, commit, changes in (
        ("base", arguments.base, arguments.base_set),
        ("head", arguments.head, arguments.head_set),
    ):
        tree = folder / label / "tree"
        sides.append(Side(label, check_out(arguments.repository, commit, tree), tree, [*arguments.set, *changes]))
    return sides


def choose_cases(arguments: argparse.Namespace, sides: list[Side]) -> tuple[list[Case], dict[str, list[str]]]:
    """The chosen cases that both commits have, and the names of the cases that only one commit has.

    Raises:
        Refused: the commits have none of the chosen cases in common.
    """
    wanted = expression("--cases", arguments.cases)
    unwanted = expression("--without", arguments.without) if arguments.without else None
    every = {side.label: cases_of(side.tree, arguments.steps) for side in sides}
    base, head = (
        {name: case for name, case in cases.items() if wanted.search(name) and not (unwanted and unwanted.search(name))}
        for cases in every.values()
    )
    common = [case for name, case in base.items() if name in head]
    if not common:
        there = ", ".join(every["base"])
        raise Refused(f"--cases: expected at least one case that both commits have, got none; there are: {there}")
    return common, {
        "base": [name for name in base if name not in head],
        "head": [name for name in head if name not in base],
    }


def run_both(
    arguments: argparse.Namespace, sides: list[Side], cases: list[Case], folder: Path
) -> dict[str, dict[str, dict]]:
    """Run the cases with both commits; returns {"base" or "head": {case name: outcome}}, with outcomes as in run_side.

    The files of each case are then in FOLDER/SIDE/runs/NUMBER.

    Raises:
        Refused: the native code cannot be compiled.
    """
    for side in sides:
        built = [] if arguments.no_native else build_native(side.tree, arguments.repository / "build" / "compare")
        say(f"{side.label}: {side.name}, {', '.join(built) or 'no native parts'}")
    stop = threading.Event()
    with ThreadPoolExecutor(1 if arguments.one_at_a_time else 2) as pool:
        running = {
            side.label: pool.submit(run_side, side, cases, folder / side.label / "runs", arguments.steps, stop)
            for side in sides
        }
        try:
            return {label: future.result() for label, future in running.items()}
        except BaseException:
            stop.set()
            raise


def result_of(case: Case, outcomes: dict[str, dict], run_dirs: dict[str, Path], names: dict[str, Names]) -> Result:
    """Compare one case from the outcomes and the run directories of both sides."""
    failed = {label: outcome["error"] for label, outcome in outcomes.items() if outcome["error"]}
    read = {}
    for label in outcomes if not failed else ():
        try:
            read[label] = read_run(run_dirs[label], names[label])
        except OSError as error:
            failed[label] = str(error)
    result = Result(case.name) if failed else compare(case.name, read["base"], read["head"])
    result.failed, result.cpu_seconds = failed, {label: outcome["cpu_seconds"] for label, outcome in outcomes.items()}
    return result


def compared(arguments: argparse.Namespace, folder: Path) -> tuple[list[Side], list[Result], dict[str, list[str]]]:
    """Check out, run and compare; returns both sides, a result per common case, and the cases that only one side has.

    Raises:
        Refused: the arguments make no sense; then nothing has been run.
    """
    for text in arguments.ignore:
        expression("--ignore", text)
    names = {"base": Names(renaming(arguments.renamed), arguments.ignore), "head": Names(ignored=arguments.ignore)}
    if arguments.steps < 2:
        raise Refused(f"--steps: expected at least 2, got {arguments.steps}")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise Refused(f"--json: expected a file in a folder that exists, got {arguments.json}")
    sides = check_out_both(arguments, folder)
    cases, only = choose_cases(arguments, sides)
    if arguments.list:
        return sides, [Result(case.name) for case in cases], only
    outcomes = run_both(arguments, sides, cases, folder)
    results = []
    for number, case in enumerate(cases):
        run_dirs = {label: folder / label / "runs" / f"{number:02}" / "run" for label in outcomes}
        results.append(
            result_of(case, {label: of_side[case.name] for label, of_side in outcomes.items()}, run_dirs, names)
        )
    return sides, results, only


@contextlib.contextmanager
def working_folder(keep: Path | None) -> Iterator[Path]:
    """The folder for both commits' files and runs: `keep`, or a temporary folder that is removed at the end."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="caco-compare-") as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise Refused(f"--keep: expected an empty folder or none, got {keep}")
    yield keep


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and return its exit code, which the module's docstring explains."""
    arguments = parser().parse_args(argv)
    started = time.monotonic()
    try:
        with working_folder(arguments.keep) as folder:
            sides, results, only = compared(arguments, folder)
    except (Refused, OSError) as error:
        if os.environ.get("CACO_TRACEBACK") == "1":
            raise
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
    verdicts = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    print(f"\n{sides[0].name} and {sides[1].name}, {arguments.steps} steps a case, {seconds:.0f} s: {verdicts}")
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
    # A case that only head has is a new one and no failure; a case that only base has was lost.
    return 1 if set(counts) != {"equal"} or only["base"] else 0


if __name__ == "__main__":
    sys.exit(main())
