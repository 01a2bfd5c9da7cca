"""Tracks a run in its ledger and in MLflow, which a thread feeds from the ledger."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caco.errors import UserError
from caco.ranges import AboveZero, NonNegative, held
from caco.redaction import redacted
from caco.runs.files import read_json
from caco.tracking.base import Row, Tracker
from caco.tracking.fed import Feeder
from caco.tracking.feed import Feed
from caco.tracking.ledger import Ledger, LedgerTracker
from caco.tracking.store import first_line, import_mlflow, own_uri, require_mlflow, resolve_uri
from caco.tracking.watermark import Watermark

if TYPE_CHECKING:
    from torch import nn

_log = logging.getLogger(__name__)


class MLflowTracker(Tracker):
    """Tracks a run in its ledger, and in one MLflow run that a thread feeds from the ledger.

    log() writes to the ledger and never waits for MLflow. A server that is down, slow or dies costs one warning;
    `python -m caco.tracking.sync RUN_DIR` later sends exactly what it missed.

    Args:
        uri: a database or a server. null: MLFLOW_TRACKING_URI or, without it, sqlite:///mlflow.db in the working
            directory, with the artifacts in mlruns/ beside it.
        experiment: the MLflow experiment, which is created if it does not exist.
        feed_seconds: time between two transfers of new rows.
        finish_seconds: finish() waits at most this long for the rest to be sent.
        model: whether to keep the final weights as an MLflow model, both in the run directory and in the store
            (ResNet-50: 94 MB each).
        system_seconds, paper: see LedgerTracker.

    Raises:
        UserError: mlflow is not installed.
        ValueError: `uri` is neither a database nor a server.
    """

    package = "mlflow"

    @held
    def __init__(
        self,
        *,
        uri: str | None,
        experiment: str,
        feed_seconds: AboveZero = 2.0,
        finish_seconds: NonNegative = 10.0,
        model: bool = True,
        system_seconds: NonNegative = 10.0,
        paper: dict[str, float] | None = None,
    ) -> None:
        require_mlflow()
        self.uri, self._is_chosen = resolve_uri(uri), uri is not None
        self.experiment = experiment
        self.feed_seconds = feed_seconds
        self.finish_seconds = finish_seconds
        self.model = model
        self._ledger = LedgerTracker(system_seconds=system_seconds, paper=paper)
        self._feeder: Feeder | None = None

    def start(
        self,
        run_dir: Path,
        *,
        params: dict[str, Any],
        tags: dict[str, str],
        run_name: str,
        state: dict[str, Any] | None,
        sweep: dict[str, Any] | None = None,
    ) -> None:
        """Like LedgerTracker.start(). The MLflow run of this directory, or of the checkpoint's `state`, is
        continued.
        """
        import_mlflow()
        run_dir = Path(run_dir)
        if not self._is_chosen:
            self._go_on_in_its_own_store(run_dir)
        # Recorded before the store is reached, because it may never be.
        self._ledger.store = {"uri": redacted(self.uri), "experiment": self.experiment}
        if state and state.get("mlflow_run_id") and not Watermark.load(run_dir).run_id:
            # mlflow.json is gone, so only the checkpoint knows the run; rows after the checkpoint may have been sent
            # too.
            num_rows = len(Ledger(run_dir / "ledger.jsonl"))
            Watermark(run_id=state["mlflow_run_id"], sent=state["sent"], attempted=num_rows).save(run_dir)
        self._ledger.start(run_dir, params=params, tags=tags, run_name=run_name, state=state, sweep=sweep)
        self._run_dir = run_dir
        self._feeder = Feeder(Feed(run_dir, uri=self.uri, experiment=self.experiment), self.feed_seconds)
        if self.uri.startswith("sqlite:"):
            # Creating a store takes seconds of computing, which must not run beside the training loop.
            self._feeder.attempt()
        self._feeder.start()

    def _go_on_in_its_own_store(self, run_dir: Path) -> None:
        """Use the run's own store, so that it stays one run even if this shell has another MLFLOW_TRACKING_URI or
        none.
        """
        try:
            own = own_uri(run_dir)
        except UserError as error:
            _log.warning("MLflow: for this run, %s; until then the ledger keeps everything", error)
            own = str(Watermark.load(run_dir).uri or read_json(run_dir / "tracking.json").get("store", {}).get("uri"))
        if own != self.uri and os.environ.get("MLFLOW_TRACKING_URI"):
            _log.warning(
                "MLflow: this run goes on in its own store, %s, and not in %s, which MLFLOW_TRACKING_URI names; to move"
                " it: python -m caco.tracking.sync %s --uri ADDRESS",
                redacted(own),
                redacted(self.uri),
                run_dir,
            )
        self.uri = own

    def log(self, step: int, values: Row, kind: str = "train") -> None:
        """Add one row to the ledger; raises OSError, naming the file, if the disk is full, but no error of MLflow."""
        self._ledger.log(step, values, kind)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the number of rows in the ledger, the MLflow run, the number of rows sent to it."""
        state = self._ledger.state_dict()
        assert self._feeder is not None, "start() first"
        mark = self._feeder.feed.mark
        return {**state, "mlflow_run_id": mark.run_id, "sent": min(mark.sent, state["rows"])}

    def log_model(self, make_backbone: "Callable[[], nn.Module]") -> None:
        """Keep the torch module that make_backbone returns, in eval mode, as the run's model; finish() sends it. A
        failure costs one warning.
        """
        if not self.model:
            return
        from caco.tracking.model import save_model

        try:
            save_model(make_backbone(), self._run_dir)
        except Exception as error:  # noqa: BLE001 - MLflow raises anything; the checkpoints have the weights
            _log.warning("no model for MLflow: %s; the weights are in the checkpoints", first_line(error))

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """End the run with FINISHED, FAILED or KILLED; waits no longer than `finish_seconds` for MLflow.

        summary.json must be written before: sync reads from the run directory what does not arrive in time.
        """
        self._ledger.finish(status, summary)
        feeder, self._feeder = self._feeder, None
        if feeder is not None and not feeder.finish(status, summary, self.finish_seconds):
            command = f"python -m caco.tracking.sync {feeder.feed.run_dir}"
            _log.warning("MLflow lacks a part of this run; to send it: %s", command)
