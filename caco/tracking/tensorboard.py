"""Tracks a run in its ledger and, fed from it, in TensorBoard event files in the run directory. To see them:
tensorboard --logdir runs
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from caco.runs.files import locked, read_json
from caco.tracking.fed import FedTracker, Feed
from caco.tracking.ledger import read_rows
from caco.tracking.reader import Reader
from caco.tracking.watermark import OfNobody, is_finite

FOLDER = "tensorboard"  # within a run directory


class TensorBoardTracker(FedTracker):
    """Tracks a run in its ledger and in event files. Whenever a run begins or goes on, these are rewritten from the
    whole ledger, because TensorBoard would show a point that was rolled back for ever. What is missed, `python -m
    caco.tracking.export RUN_DIR --tensorboard` writes later.

    Args:
        feed_seconds, finish_seconds, system_seconds, paper: see FedTracker.
    """

    package = "tensorboard"

    def feed_of(self, run_dir: Path) -> "TensorBoardFeed":
        return TensorBoardFeed(run_dir)

    def to_send_later(self, run_dir: Path) -> str:
        return f"python -m caco.tracking.export {run_dir} --tensorboard"


class TensorBoardFeed(Feed):
    """Writes one run directory into its folder of event files."""

    where = "TensorBoard"

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.is_open, self._ended = Path(run_dir), False, ""
        self._lock = contextlib.ExitStack()
        self._writer: Any = None

    @property
    def ended(self) -> str:
        return self._ended

    def open(self) -> None:
        """Start the event files anew.

        Raises:
            BlockingIOError: another process is writing them.
        """
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._lock.enter_context(locked(self.run_dir / f"{FOLDER}.lock", wait_s=0))
        shutil.rmtree(self.run_dir / FOLDER, ignore_errors=True)
        self._writer = EventFileWriter(str(self.run_dir / FOLDER))
        about = read_json(self.run_dir / "tracking.json")
        self._add(_parameters(about.get("params", {}), str(about.get("run_name"))), 0, 0.0)
        self._scalars([(f"paper/{name}", float(value)) for name, value in about.get("paper", {}).items()], 0, 0.0)
        self._reader, self.is_open = Reader(self.run_dir, OfNobody()), True

    def send(self) -> int:
        """Write what is new; returns the number of points."""
        count = 0
        for part in self._reader.parts():
            count += len(part)
            for point in part:
                self._scalars([(f"{point.kind}/{point.name}", point.value)], point.step, point.time_ms / 1000)
        self._writer.flush()
        return count

    def end(self, status: str, summary: dict[str, Any]) -> None:
        """Write the final numbers, as final/NAME."""
        rows = read_rows(self.run_dir / "ledger.jsonl")[0]
        step, time = (rows[-1]["step"], rows[-1]["time"]) if rows else (0, 0.0)
        numbers = [
            (f"final/{name}", float(value))
            for name, value in summary.items()
            if isinstance(value, int | float) and is_finite(value)
        ]
        self._scalars(numbers, step, time)
        self._writer.flush()
        self._ended = status

    def release(self) -> None:
        """Close the files."""
        writer, self._writer, self.is_open = self._writer, None, False
        with self._lock:
            if writer is not None:
                writer.close()

    def _scalars(self, numbers: list[tuple[str, float]], step: int, time: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        if numbers:
            self._add(
                Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers]), step, time
            )

    def _add(self, summary: Any, step: int, time: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time, step=step, summary=summary))


def _parameters(params: dict[str, str], name: str) -> Any:
    """The parameters for TensorBoard's page HPARAMS, which compares runs. They are made here because TensorBoard's own
    function for them needs TensorFlow.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    begun = SessionStartInfo(group_name=name)
    for key, value in params.items():
        begun.hparams[key].string_value = value
    about = HParamsPluginData(session_start_info=begun, version=metadata.PLUGIN_DATA_VERSION)
    described = metadata.create_summary_metadata(about)
    return Summary(
        value=[Summary.Value(tag=metadata.SESSION_START_INFO_TAG, metadata=described, tensor=metadata.NULL_TENSOR)]
    )
