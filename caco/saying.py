"""Prints the progress of slow work in words: for reading data, evaluations and training alike."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

Say = Callable[..., None]  # say(text, passing=False): a passing line may be left out
_SECONDS = 5.0
_BAR_AFTER_SECONDS = 1.0
_under_way: list[object] = []  # one entry for each `doing` that is open, the innermost last


def silent(text: str, passing: bool = False) -> None:
    """Print nothing; the default where no `say` is given."""


def clock(seconds: float) -> str:
    """3725 -> 1:02:05."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def amount(number: float, noun: str) -> str:
    """A number with its noun, in the singular or the plural: 1 epoch, 0 images, 12,000 rows, 2 processes."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    shown = f"{number:,.0f}" if number == int(number) else f"{number:,g}"
    return f"{shown} {noun if number == 1 else plural}"


def per_second(number: float) -> str:
    """A number of things a second, with at least three digits: 0.83, 1.20, 14.2, 256, 1,234."""
    return f"{number:,.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f}"


class Count(Protocol):
    """The function that `counting` returns."""

    def __call__(self, more: int, note: str = "") -> None:
        """Count `more` items as done; the note is appended to the line, if one is printed now."""


def counting(say: Say, what: str, total: int, done: int = 0) -> Count:
    """A function to be called with the number of items done since the last call. Now and then it prints the count, the
    speed and the time left; nothing if the work is over within seconds.

    Args:
        done: number of items of `total` that were done before.
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


class Sometimes:
    """A `say` that prints to standard error, above a progress bar if there is one. A passing line is left out if
    another line was printed within the last seconds.

    Args:
        enabled: whether this process prints; of several that work together only the first does.
        bars: whether `counted` shows a bar on a terminal; not beside a training, which has its own.
    """

    def __init__(self, enabled: bool, *, bars: bool = False, seconds: float = _SECONDS) -> None:
        self._enabled, self._seconds, self._last = enabled, seconds, 0.0
        self.draws = bars and enabled and sys.stderr.isatty()

    def __call__(self, text: str, passing: bool = False) -> None:
        now = time.monotonic()
        if self._enabled and not (passing and now - self._last < self._seconds):
            self._last = now
            _write(f"caco: {text}")


@contextlib.contextmanager
def counted(say: Say, what: str, total: int, done: int = 0) -> Iterator[Count]:
    """`counting` for the work inside or, if `say` draws bars, a bar that is removed at the end."""
    if not (isinstance(say, Sometimes) and say.draws):
        yield counting(say, what, total, done)
        return
    from tqdm import tqdm  # not at the top of the file, because refusals must not wait for it

    settings: dict[str, Any] = {"unit": "", "delay": _BAR_AFTER_SECONDS, "leave": False, "dynamic_ncols": True}
    with tqdm(total=total, initial=done, desc=f"caco: {what}", **settings) as bar:

        def count(more: int, note: str = "") -> None:
            bar.set_postfix_str(note.removeprefix(", "), refresh=False)
            bar.update(more)

        yield count


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """A context for slow work that prints nothing itself: after five seconds a line says what is being done, and then,
    ever more rarely, for how long it has been going on.

    Shorter work prints nothing. While an inner `doing` is open, only that one prints. Of several processes that work
    together only the first prints.
    """
    over = threading.Event()
    _under_way.append(over)
    began = time.monotonic()

    def tell() -> None:
        wait = _SECONDS
        while not over.wait(wait):
            passed = time.monotonic() - began
            if _under_way[-1:] == [over]:
                _write(f"caco: {what}: {clock(passed)} so far")
            wait = max(_SECONDS, passed / 2)

    thread = threading.Thread(target=tell, name="caco-doing", daemon=True)
    if int(os.environ.get("RANK", "0")) == 0:
        thread.start()
    try:
        yield
    finally:
        over.set()
        _under_way.remove(over)
        if thread.is_alive():
            thread.join()


def is_under_way() -> bool:
    """Whether a `doing` is open now."""
    return bool(_under_way)


def _write(line: str) -> None:
    """Print a line to standard error, above a progress bar if there is one."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)  # also None while the main thread is importing it
    if bars is None:
        print(line, file=sys.stderr, flush=True)
    else:
        bars.write(line, file=sys.stderr)
