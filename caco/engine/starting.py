"""What a run does before its first step, and how long each part takes."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from caco.runs.files import read_json, write_json
from caco.saying import doing

LONG_S = 60.0  # a start that takes longer says what it took


class Start:
    """Seconds of each part, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part, which says what it is where it takes long; several of one name add up."""
        began = time.monotonic()
        with doing(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def line(self) -> str:
        """All of it, in words, the longest part first."""
        parts = sorted(self.seconds.items(), key=lambda item: -item[1])
        return (
            f"caco: before the first step {sum(self.seconds.values()):.1f} s: "
            + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts)
        )  # fmt: skip

    def say(self, *, always: bool) -> None:
        """Where it took long, or always."""
        if always or sum(self.seconds.values()) >= LONG_S:
            print(self.line(), file=sys.stderr, flush=True)

    def add_to(self, shares: Path) -> None:
        """What preset=profile found of the steps has this beside it, in seconds."""
        if found := read_json(shares):
            write_json(shares, {**found, "before_the_first_step": self.seconds})
