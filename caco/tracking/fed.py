"""What all trackers share that a thread feeds from the ledger."""

import logging
import threading
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from caco.ranges import AboveZero, NonNegative, held
from caco.tracking.base import Row, Tracker
from caco.tracking.ledger import LedgerTracker
from caco.tracking.store import first_line

if TYPE_CHECKING:
    from torch import nn

_log = logging.getLogger(__name__)


class Feed(Protocol):
    """Sends one run directory to another place: open(), send() as often as needed, end(), release(). Each may raise any
    error; after an error, release() and open() again, and nothing is lost or duplicated.

    where: the name of the place, for messages. is_open: whether open() was called and release() was not.
    """

    where: str
    is_open: bool

    @property
    @abstractmethod
    def ended(self) -> str:
        """The final status that has arrived there, or ""."""

    @abstractmethod
    def open(self) -> None: ...

    @abstractmethod
    def send(self) -> int: ...

    @abstractmethod
    def end(self, status: str, summary: dict[str, Any]) -> None: ...

    @abstractmethod
    def release(self) -> None: ...


class Feeder(threading.Thread):
    """A thread that sends new rows of the ledger until told to stop, and then the end. As a daemon it never delays an
    exit.
    """

    def __init__(self, feed: Any, seconds: float) -> None:
        super().__init__(name="caco-feeder", daemon=True)
        self.feed = feed
        self.stopping = threading.Event()
        self.closing: tuple[str, dict[str, Any]] | None = None
        self._seconds = seconds
        self._failures = 0
        self._warned = False

    def run(self) -> None:
        while not self.stopping.wait(min(self._seconds * 2**self._failures, 60.0)):
            self.attempt()
        self.attempt()

    def attempt(self) -> None:
        """Bring the other place up to date; only the first failure is logged."""
        try:
            if not self.feed.is_open:
                self.feed.open()
            self.feed.send()
            if self.closing is not None:
                self.feed.end(*self.closing)
                self.feed.release()
            self._failures = 0
        except Exception as error:  # noqa: BLE001 - databases, HTTP and libraries raise anything; training goes on
            self.feed.release()
            self._failures = min(self._failures + 1, 10)
            if not self._warned:
                self._warned = True
                _log.warning("%s: %s; training goes on, the ledger keeps all", self.feed.where, first_line(error))

    def finish(self, status: str, summary: dict[str, Any], seconds: float) -> bool:
        """Send the rest and the end, waiting at most `seconds`; returns whether they arrived."""
        self.closing = (status, summary)
        self.stopping.set()
        self.join(seconds)
        return self.feed.ended == status


class FedTracker(Tracker):
    """Tracks a run in its ledger and in another place that a thread feeds from the ledger; a subclass names the place.
    log() waits for nothing but the ledger.

    Args:
        feed_seconds: time between two transfers of new rows.
        finish_seconds: finish() waits at most this long for the rest to be sent.
        system_seconds, paper: see LedgerTracker.
    """

    @held
    def __init__(
        self, *, feed_seconds: AboveZero = 2.0, finish_seconds: NonNegative = 10.0, system_seconds: NonNegative = 10.0,
        paper: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.feed_seconds, self.finish_seconds = feed_seconds, finish_seconds
        self._ledger = LedgerTracker(system_seconds=system_seconds, paper=paper)
        self._feeder: Feeder | None = None

    @abstractmethod
    def feed_of(self, run_dir: Path) -> Feed:
        """The Feed for this run."""

    @abstractmethod
    def to_send_later(self, run_dir: Path) -> str:
        """The command that sends what did not arrive in time."""

    def start(
        self, run_dir: Path, *, params: dict[str, Any], tags: dict[str, str], run_name: str,
        state: dict[str, Any] | None,
        sweep: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._ledger.start(run_dir, params=params, tags=tags, run_name=run_name, state=state, sweep=sweep)
        self._run_dir = Path(run_dir)
        self._feeder = Feeder(self.feed_of(self._run_dir), self.feed_seconds)
        self._feeder.attempt()  # imports and opens now, so that this does not slow down the training loop
        self._feeder.start()

    def log(self, step: int, values: Row, kind: str = "train") -> None:
        self._ledger.log(step, values, kind)

    def state_dict(self) -> dict[str, Any]:
        return self._ledger.state_dict()

    def log_model(self, make_backbone: "Callable[[], nn.Module]") -> None:
        """Does nothing: the weights are in the checkpoints."""

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        self._ledger.finish(status, summary)
        feeder, self._feeder = self._feeder, None
        if feeder is not None and not feeder.finish(status, summary, self.finish_seconds):
            _log.warning(
                "%s lacks a part of this run; to send it: %s", feeder.feed.where, self.to_send_later(self._run_dir)
            )
