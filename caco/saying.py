"""How far something is that takes its time, in words: for reading, evaluations and training alike."""

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
_under_way: list[object] = []  # what `doing` is around, the innermost last


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


class Sometimes:
    """A `say` for a person at standard error, past a bar that is there: a passing line only if none was said for some
    seconds.

    Args:
        enabled: of several processes that work together the first one alone speaks.
        bars: on a terminal, what is `counted` is a bar; not beside a training, which has its own.
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
    """`counting` for what is done inside, or, where `say` draws bars, a bar that goes away at the end."""
    if not (isinstance(say, Sometimes) and say.draws):
        yield counting(say, what, total, done)
        return
    from tqdm import tqdm  # here and not above: refusals do not wait for it

    settings: dict[str, Any] = {"unit": "", "delay": _BAR_AFTER_SECONDS, "leave": False, "dynamic_ncols": True}
    with tqdm(total=total, initial=done, desc=f"caco: {what}", **settings) as bar:

        def count(more: int, note: str = "") -> None:
            bar.set_postfix_str(note.removeprefix(", "), refresh=False)
            bar.update(more)

        yield count


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Around what may take its time and says nothing: after five seconds a line says what it is, and ever more rarely
    for how long already.

    What is over before says nothing, and so does what something inside it speaks for. Of several processes that work
    together the first one alone speaks.
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
    """Whether `doing` is around what is done now."""
    return bool(_under_way)


def _write(line: str) -> None:
    """Past a bar that is there."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)  # None, too, while the main thread still imports it
    if bars is None:
        print(line, file=sys.stderr, flush=True)
    else:
        bars.write(line, file=sys.stderr)
