"""Tracks a run in its ledger and in Weights & Biases (W&B), which a thread feeds from the ledger, online or offline."""

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any, Literal

from caco.errors import UserError
from caco.ranges import AboveZero, NonNegative, held
from caco.runs.files import read_json
from caco.tracking.fed import FedTracker, Feed
from caco.tracking.reader import Reader
from caco.tracking.watermark import OfWandb, is_finite, sending

# Defaults; variables that the user has set are kept. Without the first, W&B sends its own errors to its makers.
_ENVIRONMENT = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}


class WandbTracker(FedTracker):
    """Tracks a run in its ledger and in one run of Weights & Biases.

    Args:
        project: name of the W&B project. entity: its owner; null is the user's own account.
        mode: "online", or "offline", which needs neither network nor account: `wandb sync RUN_DIR/wandb/offline-run-*`
            sends it later.
        feed_seconds, finish_seconds, system_seconds, paper: see FedTracker.
    Raises:
        UserError: mode is "online", but there is no login to W&B on this machine.
    """

    package = "wandb"

    @held
    def __init__(
        self, *, project: str, entity: str | None = None, mode: Literal["online", "offline"] = "online",
        feed_seconds: AboveZero = 2.0,
        finish_seconds: NonNegative = 30.0, system_seconds: NonNegative = 10.0, paper: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            feed_seconds=feed_seconds, finish_seconds=finish_seconds, system_seconds=system_seconds, paper=paper
        )
        self.project, self.entity, self.mode = project, entity, mode
        if mode == "online":
            require_login()

    def feed_of(self, run_dir: Path) -> "WandbFeed":
        return WandbFeed(run_dir, project=self.project, entity=self.entity, mode=self.mode)

    def to_send_later(self, run_dir: Path) -> str:
        return f"python -m caco.tracking.export {run_dir} --wandb {self.project}" + " --offline" * (
            self.mode == "offline"
        )


def require_login() -> None:
    """Raise UserError if W&B would ask for a key."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if any("wandb" in host for host in netrc.netrc().hosts):
            return
    raise UserError(
        "tracking=wandb: there is no login to Weights & Biases on this machine; run wandb login, or set"
        " WANDB_API_KEY=KEY in the environment, or use tracking.mode=offline and send the run later"
    )


class WandbFeed(Feed):
    """Sends one run directory to W&B."""

    def __init__(
        self, run_dir: Path, *, project: str, entity: str | None = None, mode: Literal["online", "offline"] = "online"
    ) -> None:
        self.run_dir, self.project, self.entity, self.mode = Path(run_dir), project, entity, mode
        self.where, self.is_open = f"Weights & Biases ({mode})", False
        self.mark = OfWandb.load(self.run_dir)
        self._lock = contextlib.ExitStack()
        self._run: Any = None

    @property
    def ended(self) -> str:
        return self.mark.closed

    def open(self) -> None:
        """Begin this directory's W&B run, or continue it under the same id.

        Raises:
            BlockingIOError: another process is sending this run.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import wandb

        self._lock.enter_context(sending(self.run_dir, wait_s=0, kind=OfWandb))
        self.mark = OfWandb.load(self.run_dir)
        if self.mark.run_id and self.mark.experiment != self.project:
            self.mark.restart()  # the project has changed: everything is sent to the new one, as a new run
            self.mark.token = uuid.uuid4().hex
        self.mark.run_id, self.mark.experiment, self.mark.closed = self.mark.token, self.project, ""
        self.mark.save(self.run_dir)
        about = read_json(self.run_dir / "tracking.json")
        quiet = wandb.Settings(
            console="off", silent=True, x_disable_stats=True, disable_git=True, disable_code=True, init_timeout=30
        )
        self._run = wandb.init(
            project=self.project, entity=self.entity, mode=self.mode, id=self.mark.run_id, resume="allow",
            reinit="create_new",
            dir=str(self.run_dir), name=about.get("run_name"), group=(about.get("sweep") or {}).get("title"),
            config=about.get("params", {}),
            tags=[value for name, value in about.get("tags", {}).items() if name == "data" and len(value) <= 64],
            settings=quiet,
        )  # fmt: skip
        if about.get("paper"):
            self._run.summary.update({f"paper/{name}": float(value) for name, value in about["paper"].items()})
        self._kinds: set[str] = set()
        self._reader, self.is_open = Reader(self.run_dir, self.mark), True

    def send(self) -> int:
        """Send what is new; returns the number of points."""
        count = 0
        for part in self._reader.parts():
            rows: dict[tuple[str, int], dict[str, float]] = {}
            for point in part:
                rows.setdefault((point.kind, point.step), {})[f"{point.kind}/{point.name}"] = point.value
            for (kind, step), values in rows.items():
                if kind not in self._kinds:  # each kind has its own steps, because W&B's step counts rows of all kinds
                    self._kinds.add(kind)
                    self._run.define_metric(f"{kind}/step", hidden=True)
                    self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
                self._run.log({**values, f"{kind}/step": step})
            count += len(part)
        return count

    def end(self, status: str, summary: dict[str, Any]) -> None:
        """Send the final numbers, as final/NAME in the run's summary, and its status."""
        numbers = {
            f"final/{name}": float(value)
            for name, value in summary.items()
            if isinstance(value, int | float) and is_finite(value)
        }
        self._run.summary.update({**numbers, "status": status})
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)
        self._run, self.mark.closed = None, status
        self.mark.save(self.run_dir)

    def release(self) -> None:
        """Release the lock, so that others can send this run."""
        run, self._run, self.is_open = self._run, None, False
        with self._lock:
            if run is not None:
                run.finish(exit_code=1)
