"""Damage files, disks, servers or processes at random, with a seed. Damaged files must be read or refused with a
message; runs must end with the results of undisturbed ones, at the latest when the same command is given again.

Each kind is a module with `prepare(folder)` and `case(prepared, rng)`; of the kind kills-train, `kills` is the module
and `train` a second argument of `prepare`. A case returns a word for its outcome. It must not raise anything but a
UserError, crash the process, or hang.
"""

import collections
import contextlib
import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import numpy as np

from caco.errors import UserError

KINDS = ("jpegs", "betons", "checkpoints", "weights", "disks", "servers",
         "kills-train", "kills-evaluate", "kills-export", "kills-sync", "kills-sweep", "kills-jobs")  # fmt: skip
PATIENCE_S = 300.0  # for one case, on a machine with ten times as much work as cores
_fork = multiprocessing.get_context("fork")


def outcomes(kind: str, count: int, *, first: int = 0) -> tuple[collections.Counter, list[str]]:
    """Run the cases from `first` to `first + count - 1` of a kind in child processes; returns how often each outcome
    occurred, and a description of each bad one.
    """
    found: collections.Counter = collections.Counter()
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        number, end = first, first + count
        while number < end:
            theirs, ours = _fork.Pipe(duplex=False)
            process = _fork.Process(target=_work, args=(kind, number, end, Path(folder), ours))
            process.start()
            ours.close()
            try:
                told = theirs.recv()
                assert told == "ready", told
                while number < end:
                    if not theirs.poll(PATIENCE_S):
                        word, detail = "hang", f"not ended after {PATIENCE_S} s"
                        process.kill()
                    else:
                        word, detail = theirs.recv()
                    found[word] += 1
                    if word in ("hang", "traceback"):
                        bad.append(f"{kind} {number}: {word}: {detail}")
                    number += 1
                    if (number - first) % 50 == 0:
                        print(f"{number - first} of {count} cases, {len(bad)} bad", file=sys.stderr, flush=True)
                    if word == "hang":
                        break
            except EOFError:
                process.join(PATIENCE_S)
                found["crash"] += 1
                bad.append(f"{kind} {number}: crash: exit code {process.exitcode}")
                number += 1
            process.join(PATIENCE_S)
    return found, bad


def _work(kind: str, first: int, end: int, folder: Path, pipe) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # hides what libraries print about damaged files
    warnings.simplefilter("ignore")  # hides torch's warnings about deprecated kinds of tensors
    name, *what = kind.split("-")
    module = importlib.import_module(name)
    own = Path(tempfile.mkdtemp(dir=folder))
    with contextlib.ExitStack() as stack:
        try:
            prepared = module.prepare(own, *what)
            if isinstance(prepared, contextlib.AbstractContextManager):
                prepared = stack.enter_context(prepared)  # servers, say, which end with the cases
        except BaseException:
            pipe.send(f"{kind} could not be prepared: {traceback.format_exc()}")
            raise
        pipe.send("ready")
        for number in range(first, end):
            try:
                pipe.send((module.case(prepared, np.random.default_rng([KINDS.index(kind), number])), ""))
            except UserError as error:
                assert str(error)
                pipe.send(("refused", str(error)))
            except BaseException:
                pipe.send(("traceback", traceback.format_exc()))
    os._exit(0)


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage some of a file's bytes: flip them, overwrite them with large numbers, cut, double, exchange or insert
    some.
    """
    made = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        if not made:
            break
        # Most fields are in headers, so half of all damage is done to the first or last bytes.
        where = rng.integers(0, 4)
        span = len(made) if where < 2 else min(len(made), 1500)
        at = int(rng.integers(0, span)) if where < 3 else len(made) - 1 - int(rng.integers(0, span))
        size = int(rng.integers(1, 9))
        match int(rng.integers(0, 7)):
            case 0:
                made[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                made[at : at + size] = rng.integers(0, 256, size, np.uint8).tobytes()
            case 2:
                made[at : at + size] = bytes([int(rng.choice([0, 255, 127, 128]))]) * size
            case 3 if rng.integers(0, 4) == 0:
                del made[at:]
            case 4:
                other = int(rng.integers(0, len(made)))
                made[at : at + size] = made[other : other + size]
            case 5:
                made[at:at] = rng.integers(0, 256, size, np.uint8).tobytes()
            case 6:
                del made[at : at + size]
    return bytes(made)
