"""Measures how long each part of a run's start takes, before its first step."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from caco.runs.files import read_json, write_json
from caco.saying import doing

LONG_S = 60.0  # after a start of this many seconds or more, a line says how long each part took


class Start:
    """The seconds that each part of a run's start took, by its name, in the order of the parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context that times one part. If the part takes long, a line says what is being done (`caco.saying.doing`).
        The seconds of several parts with the same name are added up.
        """
        began = time.monotonic()
        with doing(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def line(self) -> str:
        """A line with the seconds of the whole start and of each part, the longest part first."""
        parts = sorted(self.seconds.items(), key=lambda item: -item[1])
        return (
            f"caco: before the first step {sum(self.seconds.values()):.1f} s: "
            + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts)
        )  # fmt: skip

    def say(self, *, always: bool) -> None:
        """Print `line` to standard error if the start took at least `LONG_S` seconds, or in any case if `always`."""
        if always or sum(self.seconds.values()) >= LONG_S:
            print(self.line(), file=sys.stderr, flush=True)

    def add_to(self, shares: Path) -> None:
        """Add the seconds of each part to the file that preset=profile wrote about the steps. Does nothing if there is
        no such file.

        Args:
            shares: path of the file, shares.json in the run's directory.
        """
        if found := read_json(shares):
            write_json(shares, {**found, "before_the_first_step": self.seconds})
