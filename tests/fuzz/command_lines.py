"""Compose and check random command lines in one process: each must be accepted, or refused with a message.

    python -m tests.fuzz.command_lines --lines 10000              the first 10,000 lines; --from 3000 starts later
    python -m tests.fuzz.command_lines --line 'seed=1 batch=x'    this line, with its traceback
    python -m tests.fuzz.command_lines --lines 300 --processes    each as a command; what runs is told to stop

A refusal is a UserError. Any other exception is a bug, and is printed with the line. Each line follows from its number,
so that number 4711 is the same line on every machine.
"""

import argparse
import collections
import contextlib
import copy
import functools
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from hydra._internal.core_plugins import file_config_source
from hydra.core.config_store import ConfigStore

from caco import checking
from caco.config import composition, folders, no_effect, pretrained
from caco.errors import UserError
from caco.redaction import redacted
from caco.runs.identity import flat, plain

ROOT = Path(__file__).parents[2]
RUNS_S = 8.0  # so long a command that is accepted may run
PATIENCE_S = 120.0  # after which a process that was told to stop hangs
MARKS = ("Traceback", "Lexer", " object at 0x", "full_key", "object_type", "u:secret")  # that no message shows
LONG = "x" * 300
NUMBERS = [
    "0", "1", "-1", "2", "3", "64", "1e-3", "0.5", "1.5", "-0.0", "nan", "inf", "-inf", "1e400", "1e-400",
    "99999999999999999999", "007", "1_000", "0x10", "4294967296", "2147483648",
]  # fmt: skip
TEXTS = [
    "a", "null", "true", "false", "''", '""', '" "', "'a b'", "a b", "~", "~/x", "'~nobody/x'", "/dev/null", "/", ".",
    "..", "é", "'größe'", LONG, "a=b", "'a=b'", "(a)", "'(a)'", "a,b", "1,2", "?", "???", "*", "a:b", "a/b/c",
    "http://u:secret@h", "'${name}'", "\\", "'", '"', "$", "#", "@", "\t", "caco.nn.backbones.small_resnet",
    "os.system", "caco.nope.Nope", "'a\\0b'", "None", "[", "]", "{", "}", "<", "%", "&", ";", "\U0001f600", "run_name",
]  # fmt: skip
LISTS = [
    "[]", "[1]", "[1,2]", "[0,0,0]", "[nan,1,1]", "[null]", "[[1]]", "[a,b]", "[1,1,1,1000000]", "[1,2,3,4,5]",
    "[-1,-2]", "[{a:1}]", "[knn,knn]",
]  # fmt: skip
GROUPS = [
    "{}", "{a:1}", "{a:{b:[1]}}", "{_target_:a}", "{_target_:1}", "{_target_:caco.nn.heads.Projector}",
    "{_target_:null}", "{size:1}", "{1:2}",
]  # fmt: skip
MADE = [
    "${batch}", "${name}", "${nope}", "${nope.nope}", "${oc.env:NOPE}", "${oc.env:HOME}", "${oc.env:PATH,1}",
    "${oc.decode:1}", "${nope:1}", "${bank}", "${.lr}", "${..seed}", "${run_name:}", "${hydra:job.num}",
    "${hydra.run.dir}", "${oc.create:{a:1}}", "${oc.decode:'[1'}", "${file_digest:/}", "${", "a${batch}",
]  # fmt: skip
SWEPT = [
    "1,2", "a,b", "range(1,3)", "choice(1,2)", "interval(0,1)", "glob(*)", "range(0)", "shuffle(1,2)", "sort(2,1)",
    "tag(a,1)", "[1],[2]", "{a:1},{b:2}", "1,1", "int(1.5)", "float(a)", "str(1)", "bool(2)", "json_str({a:1})",
    "extend_list(1)",
]  # fmt: skip
OF_HYDRA = [
    "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra/launcher", "hydra.job.name", "hydra.mode", "hydra",
    "hydra.searchpath", "hydra/sweeper",
]  # fmt: skip
SENSELESS = ["=", "=1", "a", "+", "~", "~bank", "~data.root", "-m", "a.b.c=1", ".a=1", "a.=1", "a..b=1", "[a]=1", "1=1"]
PREFIXES = ["", "", "", "", "", "", "+", "++", "~"]


@functools.cache  # one call per process is enough
def quicker() -> None:
    """Make Hydra read each file of conf/ only once; otherwise a third of the time would go into reading YAML."""
    source = file_config_source.FileConfigSource
    load = source.load_config
    read: dict = {}

    def load_config(self, config_path):
        if (self.path, config_path) not in read:
            read[self.path, config_path] = load(self, config_path)
        return copy.deepcopy(read[self.path, config_path])

    source.load_config = load_config  # type: ignore[method-assign]  # Hydra has no setting for it


@functools.cache
def keys(root: str) -> list[str]:
    """Every dotted name in the configuration of a command; for training also those that other options of its groups
    set.
    """
    line = (
        ["tracking=ledger"]
        if root == "config"
        else ["weights=x", "format=moco", "backbone=resnet18", "augmentation=caco"]
    )
    ConfigStore.instance().store("of_the_run", {})  # forgets the run of an earlier evaluation in this process
    leaves = list(flat(plain(composition.compose(line, root))))
    if root == "config":
        files = [
            (group, folders.option_file(group, option))
            for group, options in folders.groups().items()
            for option in options
        ]
        leaves += [key for group, file in files if file for key, _ in no_effect.settings_of(group, file)]
    parts = [leaf.split(".") for leaf in leaves]
    return sorted({".".join(names[:length]) for names in parts for length in range(1, len(names) + 1)})


def line(number: int) -> tuple[str, list[str]]:
    """A command, and a command line for it."""
    rng = random.Random(number)
    root = rng.choices(["config", "sweep", "evaluate", "export"], [70, 15, 10, 5])[0]
    known = keys("config" if root == "sweep" else root)
    options = folders.groups()
    words = (
        []
        if root in ("config", "sweep")
        else [rng.choice(["weights=/dev/null", "weights=setup.py", "run=runs", "run=tests/old_runs/old/tiny"])]
    )
    if root == "export":
        words.append("to=/tmp/x")
    words += rng.sample(["tracking=ledger", "data=digits", "preset=smoke", "backbone=small_resnet"], rng.randint(0, 3))
    for _ in range(rng.choices([1, 2, 3, 5, 8], [40, 30, 15, 10, 5])[0]):
        kind = rng.random()
        if kind < 0.2:
            group = rng.choice(list(options))
            existing = 3 * list(options[group])  # three times, so that many of the lines name an option that exists
            option = rng.choice([*existing, "nope", "null", LONG, "1", "[a]", "a/b", "", *rng.sample(TEXTS, 2)])
            words.append(f"{rng.choice(PREFIXES)}{group}={option}")
        elif kind < 0.25:
            words.append(rng.choice([*TEXTS, *OF_HYDRA, *SENSELESS]))
        else:
            key = rng.choice(known) if rng.random() < 0.92 else rng.choice(OF_HYDRA)
            if rng.random() < 0.05:
                key = rng.choice([key[:-1], key + "x", key.upper(), f"{key}.{key}", key.replace(".", "/")])
            pool = rng.choices(
                [NUMBERS, TEXTS, LISTS, GROUPS, MADE, SWEPT], [35, 25, 14, 10, 12, 30 if root == "sweep" else 4]
            )[0]
            value = rng.choice(pool)
            prefix = rng.choice(PREFIXES)
            words.append(f"{prefix}{key}" if prefix == "~" and rng.random() < 0.7 else f"{prefix}{key}={value}")
    return root, words


def outcome(root: str, words: list[str]) -> str | None:
    """The message with which a command line is refused, or None if it is accepted.

    Raises:
        Exception: anything other than a refusal, which is a bug.
    """
    try:
        if root in ("config", "sweep"):
            checking.check_command(words, multirun=root == "sweep" or checking.is_launched(words))
        else:
            pretrained.compose(root, words)
    except UserError as error:
        return redacted(str(error))  # as a user sees it
    finally:
        folders.use()
    return None


def fault(root: str, words: list[str]) -> str | None:
    """What is wrong with the treatment of a command line, or None."""
    try:
        refusal = outcome(root, words)
    except (Exception, SystemExit):  # noqa: BLE001 - these are the bugs that the fuzzer looks for
        return traceback.format_exc()
    if refusal is None:
        return None
    if not refusal.strip():
        return "refused without a word"
    return next((f"the refusal shows {mark!r}: {refusal}" for mark in MARKS if mark in refusal), None)


def fault_of_process(root: str, words: list[str]) -> str | None:
    """As `fault`, of a command of its own in a folder of its own. What is accepted runs until it is told to stop."""
    name = {"config": ["caco.train"], "sweep": ["caco.train", "-m"]}.get(root, [f"caco.{root}"])
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests" / "old_runs", Path(folder, "tests", "old_runs"))
        shutil.copy(ROOT / "setup.py", folder)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *name, *words],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            told, _ = process.communicate(timeout=RUNS_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                told, _ = process.communicate(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                return "hangs: does not end when it is told to stop"
        finally:
            for one in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
    if process.returncode not in (0, 1, 2, 128 + signal.SIGTERM, -signal.SIGTERM):
        return f"exit code {process.returncode}: {told[-2000:]}"
    return next((f"shows {mark!r}: {told[-3000:]}" for mark in MARKS if mark in told), None)


def faults(
    numbers: range, seconds: float = float("inf"), find: Callable[[str, list[str]], str | None] = fault
) -> Iterator[tuple[int, str, list[str], str | None]]:
    """Yield (number, command, line, fault or None) for each line until this many seconds of processor time are used."""
    quicker()
    keys("config"), keys("evaluate"), keys("export")
    end = time.process_time() + seconds
    for number in numbers:
        root, words = line(number)
        yield number, root, words, find(root, words)
        if time.process_time() > end:
            return


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.command_lines", description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="NUMBER", help="go on with this line")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most so long")
    parser.add_argument("--processes", action="store_true", help="start each line as a command")
    parser.add_argument("--line", help="this one alone, with what becomes of it")
    options = parser.parse_args()
    if options.line is not None:
        print(outcome("config", shlex.split(options.line)) or "accepted")
        return 0
    found: collections.Counter[str] = collections.Counter()
    find = fault_of_process if options.processes else fault
    number, began = options.first - 1, time.monotonic()
    for number, root, words, wrong in faults(range(options.first, options.lines), options.seconds, find):
        if wrong:
            found[wrong.strip().splitlines()[-1][:100]] += 1
            print(f"line {number}, {root}: {shlex.join(words)}\n{wrong}", flush=True)
        if number % 50 == 49:
            print(
                f"{number + 1} lines, {sum(found.values())} faults, {time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    print(f"{number + 1 - options.first} command lines, {sum(found.values())} faults of {len(found)} kinds")
    for kind, count in found.most_common():
        print(f"{count:6} {kind}")
    return min(1, len(found))


if __name__ == "__main__":
    sys.exit(main())
