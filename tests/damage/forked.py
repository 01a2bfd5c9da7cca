"""Commands that run in a fork of this process, which has imported everything, and may be killed at any instant."""

import contextlib
import functools
import importlib
import multiprocessing
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from processes import IMPORTED

_fork = multiprocessing.get_context("fork")
PATIENCE_S = 250.0  # damaging.py waits a little longer for a whole case


def run(
    function: Callable, *arguments: object, folder: Path, killed_after_s: float | None = None
) -> tuple[int | None, str]:
    """Call `function(*arguments)` in a process whose working directory is `folder`.

    Args:
        killed_after_s: after so many seconds the process and all that it has started are killed, as by a power cut.
    Returns:
        the exit code, None if it did not end in time, and what was printed to both streams.
    """
    _import_everything()
    read, write = os.pipe()
    process = _fork.Process(target=_begin, args=(function, arguments, folder, write))
    process.start()
    os.close(write)
    end = time.monotonic() + (PATIENCE_S if killed_after_s is None else killed_after_s)
    told, killed = b"", False
    while True:
        if not killed and not select.select([read], [], [], max(0.0, end - time.monotonic()))[0]:
            _kill(process.pid)
            killed = True
        part = os.read(read, 65536)
        if not part:
            break
        told += part
    os.close(read)
    process.join()
    hangs = killed and killed_after_s is None
    return None if hangs else process.exitcode, told.decode(errors="replace")


@functools.cache
def _import_everything() -> None:
    """Once, for all forks."""
    for name in IMPORTED:
        importlib.import_module(name)


def _kill(pid: int | None) -> None:
    root = psutil.Process(pid)
    every = [root]
    root.suspend()  # so that it starts nothing while the others are listed
    every += root.children(recursive=True)
    for one in every:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def _begin(function: Callable, arguments: tuple, folder: Path, told: int) -> None:
    os.dup2(told, 1)
    os.dup2(told, 2)
    # pytest's streams write to files; these write to the pipe.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(folder)
    function(*arguments)
