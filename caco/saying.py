"""How far something is that takes its time, in words: for reading, evaluations and training alike."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

Say = Callable[..., None]  # say(text, passing=False): a passing line may be left out
_SECONDS = 5.0


def silent(text: str, passing: bool = False) -> None:
    """Says nothing; in the place of a `say` that nobody gave."""


def clock(seconds: float) -> str:
    """3725 -> 1:02:05."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class Count(Protocol):
    """What `counting` gives."""

    def __call__(self, more: int, note: str = "") -> None:
        """So many more are done; the note ends the line, if there is one now."""


def counting(say: Say, what: str, total: int, done: int = 0) -> Count:
    """A function that is told how many more are done, and says now and then how many that makes, how fast, and the time
    left.

    What is over within seconds says nothing.

    Args:
        done: of `total`, before it began.
    """
    began = told = time.monotonic()
    before, now_done = done, done

    def count(more: int, note: str = "") -> None:
        nonlocal told, now_done
        now_done += more
        now = time.monotonic()
        if now - told >= _SECONDS:
            told = now
            rate = (now_done - before) / (now - began)
            pace = f"{rate:,.0f} a second" if rate >= 10 else f"{1 / rate:.2g} s each"
            say(
                f"{what}: {now_done:,} of {total:,}, {pace}, {clock((total - now_done) / rate)} left{note}",
                passing=True,
            )

    return count


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Around what may take its time and says nothing: after five seconds a line says what it is, and ever more rarely
    for how long already.

    What is over before says nothing. Of several processes that work together the first one alone speaks.
    """
    over = threading.Event()
    began = time.monotonic()

    def tell() -> None:
        wait = _SECONDS
        while not over.wait(wait):
            passed = time.monotonic() - began
            _write(f"caco: {what}: {clock(passed)} so far")
            wait = max(_SECONDS, passed / 2)

    thread = threading.Thread(target=tell, name="caco-doing", daemon=True)
    if int(os.environ.get("RANK", "0")) == 0:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


def _write(line: str) -> None:
    """Past a bar that is there."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(line, file=sys.stderr, flush=True)
    else:
        tqdm.tqdm.write(line, file=sys.stderr)
