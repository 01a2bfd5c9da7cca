"""A tracker that makes its run wait at a step until the run is told to stop, so that a test can interrupt it on a
machine of any speed.
"""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

from caco.engine.preemption import Stop
from caco.tracking.ledger import LedgerTracker

STEP, PATIENCE_S = 6, 300


class HeldTracker(LedgerTracker):
    """A LedgerTracker. A run whose directory's name contains a name of $HELD waits once, after step 6; it writes a file
    `held` when it starts to wait.
    """

    def __init__(self, *, system_seconds: float = 10.0, paper: dict[str, float] | None = None) -> None:
        super().__init__(system_seconds=system_seconds, paper=paper)

    def start(self, run_dir: Path, **about: Any) -> None:
        super().start(run_dir, **about)
        self._held = Path(run_dir) / "held"

    def log(self, step: int, values: Mapping[str, float | int | str], kind: str = "train") -> None:
        super().log(step, values, kind)
        wanted = os.environ["HELD"].split(",")
        if step != STEP or self._held.exists() or not any(name in str(self._held) for name in wanted):
            return
        handler = signal.getsignal(signal.SIGTERM)
        assert isinstance(handler, MethodType) and isinstance(handler.__self__, Stop)
        stop = handler.__self__
        self._held.touch()
        deadline = time.monotonic() + PATIENCE_S
        while not stop.requested():
            assert time.monotonic() < deadline, "the test has not interrupted the run in time"
            time.sleep(0.02)
