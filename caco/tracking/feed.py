"""Feeds a run's ledger to MLflow, each row once, and maintains the run that stands for a sweep. Imports MLflow only
when used.
"""

import contextlib
import getpass
import itertools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caco.redaction import redacted
from caco.runs.files import locked, read_json
from caco.tracking.ledger import read_rows
from caco.tracking.names import OF_SWEEPS, colours, short, short_sweep
from caco.tracking.reader import Point, Reader
from caco.tracking.store import connect, first_line
from caco.tracking.watermark import Watermark, is_finite, milliseconds, points, sending

_log = logging.getLogger(__name__)

_ROWS_PER_BATCH = 200
# MLflow's limits: metrics and parameters in a request, characters in a value.
_MAX_METRICS, _MAX_PARAMS, _MAX_PARAM_CHARS, _MAX_TAG_CHARS = 1000, 100, 6000, 8000


class Feed:
    """Sends one run directory to MLflow: open(), send() as often as needed, end(), release().

    Each raises whatever MLflow raises. After an error, release() and open() again; nothing is lost or duplicated.
    """

    def __init__(self, run_dir: Path, *, uri: str, experiment: str) -> None:
        self.run_dir = Path(run_dir)
        self.uri = uri
        self.experiment = experiment
        self.mark = Watermark.load(self.run_dir)
        self.is_open = False
        self._client: Any = None
        self._lock = contextlib.ExitStack()
        # Bytes of system.jsonl that have been read, and how many of the rows after them MLflow has already.
        self._system_offset, self._system_skip = 0, 0

    @property
    def where(self) -> str:
        return f"MLflow at {redacted(self.uri)}"

    @property
    def ended(self) -> str:
        return self.mark.closed

    def open(self) -> None:
        """Find or create this directory's MLflow run, send its description and mark it as running.

        Raises:
            BlockingIOError: another process is sending this run.
        """
        from mlflow.entities import Param, RunTag

        self._connect()
        about = read_json(self.run_dir / "tracking.json")
        name = short(about.get("run_name") or "")
        run = self._find()
        if run is None and self.mark.run_id:
            self.mark.restart()  # another server, or a deleted run: everything is sent again
            run = self._find()  # a server that had this run before another one did still has it
        if run is None:
            self.mark.save(self.run_dir)  # with the token, so a kill after create_run makes no second run
            # Set at creation, because MLflow does not allow the user to be changed later.
            tags = {"caco.token": self.mark.token, "mlflow.user": _user()}
            run = self._client.create_run(self._experiment_id, run_name=name, tags=tags)
        else:
            self._client.update_run(run.info.run_id, status="RUNNING", name=name)
        self.mark.run_id, self.mark.closed = run.info.run_id, ""
        self.mark.uri, self.mark.experiment = redacted(self.uri), self.experiment
        self._names = self.mark.todays_names(self.run_dir)
        self._reader = Reader(self.run_dir, self.mark)
        self.mark.parent_id = run.data.tags.get("mlflow.parentRunId", "")
        self.mark.save(self.run_dir)
        # Each parameter is logged once: MLflow refuses a second value, but intervals or paths may change on resuming.
        named = {_name(k): v[:_MAX_PARAM_CHARS] for k, v in self._names.params(about.get("params", {})).items()}
        params = [Param(k, v) for k, v in named.items() if k not in run.data.params]
        for part in _chunks(params, _MAX_PARAMS):
            self._client.log_batch(self.mark.run_id, params=part, synchronous=True)
        tags = self._names.with_hash(about.get("tags", {}))
        if name != about.get("run_name"):
            tags["mlflow.note.content"] = about.get("run_name") or ""
        tags["caco.run_dir"] = str(self.run_dir.absolute())
        tags["mlflow.source.name"] = "caco.train"
        if "git_sha" in tags:
            tags["mlflow.source.git.commit"] = tags["git_sha"]  # the dashboard shows this tag
        run_tags = [RunTag(_name(k), v[:_MAX_TAG_CHARS]) for k, v in tags.items()]
        for part in _chunks(run_tags, _MAX_PARAMS):
            self._client.log_batch(self.mark.run_id, tags=part, synchronous=True)
        self._data_set(run, about)
        self._published(run, about)
        if about.get("sweep"):
            self._enter_sweep(about["sweep"])
        self._files()
        self._system_offset, self._system_skip = 0, self.mark.system_sent
        self.is_open = True

    def _connect(self) -> None:
        """Take the lock for sending this run, and connect to its store."""
        if self._client is None:
            self._lock.enter_context(sending(self.run_dir, wait_s=0))
            self.mark = Watermark.load(self.run_dir)
            self._client, self._experiment_id = connect(self.uri, self.experiment)

    def missing(self) -> int:
        """The number of points that were sent but that the store lacks, by run, key and step, according to its answer
        now. Changes nothing.

        Raises:
            BlockingIOError: another process is sending this run.
        """
        self._connect()
        names = self.mark.todays_names(self.run_dir)
        rows = [names.row(row) for row in read_rows(self.run_dir / "ledger.jsonl")[0][: self.mark.sent]]
        rows += read_rows(self.run_dir / "system.jsonl")[0][: self.mark.system_sent]
        steps: dict[str, set[int]] = {}
        for row in rows:
            for (kind, step, name), value in points(row):
                if is_finite(value):
                    steps.setdefault(_name(f"{kind}/{name}"), set()).add(step)
        run = self._find() if self.mark.run_id else None
        if run is None:
            return sum(map(len, steps.values())) or 1
        there = {
            key: {point.step for point in self._client.get_metric_history(self.mark.run_id, key)}
            for key in steps
            if key in run.data.metrics
        }
        return sum(len(known - there.get(key, set())) for key, known in steps.items())

    def forget_what_was_sent(self) -> None:
        """After `missing`: make send() send everything again. MLflow keeps only one of two equal points."""
        self.mark.sent = self.mark.attempted = self.mark.system_sent = 0
        self.mark.files, self.mark.model_id, self.mark.closed = {}, "", ""
        self.mark.rolled_back = {point: old for point, old in self.mark.rolled_back.items() if old is not None}
        self.mark.save(self.run_dir)

    def _data_set(self, run: Any, about: dict[str, Any]) -> None:
        """Send name and digest of the training images, for MLflow's column of data sets."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        name, digest = (about.get("tags", {}).get(key, "") for key in ("data", "data_digest"))
        if name and digest and not run.inputs.dataset_inputs:
            source = about["params"].get("data.root", "null")
            found = Dataset(
                name=name, digest=digest, source_type="local", source="the package" if source == "null" else source
            )
            context = InputTag("mlflow.data.context", "training")
            self._client.log_inputs(self.mark.run_id, [DatasetInput(dataset=found, tags=[context])])

    def _published(self, run: Any, about: dict[str, Any]) -> None:
        """Send the paper's values as paper/NAME, beside our eval/NAME and final/NAME."""
        from mlflow.entities import Metric

        paper = {_name(f"paper/{name}"): float(value) for name, value in about.get("paper", {}).items()}
        new = [Metric(name, value, 0, 0) for name, value in paper.items() if run.data.metrics.get(name) != value]
        if new:
            self._log(new)

    def _enter_sweep(self, sweep: dict[str, Any]) -> None:
        """Become a child of the sweep's run, which the first child creates. A run that is already in a sweep stays
        there.
        """
        with _sweep_lock(self.run_dir):
            if not self.mark.parent_id:
                name = sweep["name"].replace("'", "_")[:_MAX_TAG_CHARS]  # MLflow's filters have no escape for quotes
                same = f"tags.`caco.sweep` = '{name}'"
                parent = next(
                    iter(self._client.search_runs([self._experiment_id], filter_string=same, max_results=1)), None
                )
                if parent is None:
                    tags = {"caco.sweep": name, "caco.jobs": str(sweep["jobs"]), "mlflow.user": _user()}
                    tags |= {
                        "mlflow.source.name": "caco.train -m",
                        "mlflow.runColor": OF_SWEEPS,
                        "mlflow.note.content": sweep["title"],
                    }
                    parent = self._client.create_run(
                        self._experiment_id, run_name=short_sweep(sweep["title"], sweep.get("keys", ())), tags=tags
                    )
                self._client.set_tag(self.mark.run_id, "mlflow.parentRunId", parent.info.run_id)
                self.mark.parent_id = parent.info.run_id
                self.mark.save(self.run_dir)
            siblings = refresh_sweep(self._client, self._experiment_id, self.mark.parent_id)
            # MLflow's own colours, made from the id, can be the same for neighbours. Between sweeps the dashboard
            # changes equal colours.
            colour = next(itertools.islice(colours(), siblings.index(self.mark.run_id), None))
            self._client.set_tag(self.mark.run_id, "mlflow.runColor", colour)

    def release(self) -> None:
        """Release the lock, so that others can send this run."""
        self.is_open, self._client = False, None
        self._lock.close()

    def _find(self) -> Any:
        from mlflow.exceptions import MlflowException

        if not self.mark.run_id:
            same = f"tags.`caco.token` = '{self.mark.token}'"
            return next(iter(self._client.search_runs([self._experiment_id], filter_string=same, max_results=1)), None)
        try:
            run = self._client.get_run(self.mark.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def send(self) -> int:
        """Send the ledger's rows that MLflow does not have; returns how many there were."""
        before = self.mark.sent
        for part in self._reader.parts():
            self._log(self._metrics(part))
        self._send_system()
        return self.mark.sent - before

    def _send_system(self) -> None:
        """Send new rows of system.jsonl. They are never rolled back, so a row sent twice is the same point."""
        rows, end = read_rows(self.run_dir / "system.jsonl", self._system_offset)
        rows, self._system_skip = rows[self._system_skip :], 0
        for part in _chunks(rows, _ROWS_PER_BATCH):
            self._log(self._metrics(self._reader.points_of(part)))
            self.mark.system_sent += len(part)
            self.mark.save(self.run_dir)
        self._system_offset = end

    def _metrics(self, points: list[Point]) -> list[Any]:
        from mlflow.entities import Metric

        return [Metric(_name(f"{point.kind}/{point.name}"), point.value, point.time_ms, point.step) for point in points]

    def _log(self, metrics: list[Any]) -> None:
        for part in _chunks(metrics, _MAX_METRICS):
            self._client.log_batch(self.mark.run_id, metrics=part, synchronous=True)
        if self._reader.non_finite:
            # MLflow stores inf as 1.797e308, which ruins a chart. So they stay in the ledger, and a tag names them.
            names = ", ".join(sorted(self._reader.non_finite))
            self._client.set_tag(self.mark.run_id, "caco.non_finite", names[:_MAX_TAG_CHARS])

    def end(self, status: str, summary: dict[str, Any]) -> None:
        """Send the final metrics, as final/NAME, and summary.json; set the run's final status."""
        from mlflow.entities import Metric

        rows = read_rows(self.run_dir / "ledger.jsonl")[0]
        # The time of the last row, so that ending twice sends the same points.
        step, time = (rows[-1]["step"], milliseconds(rows[-1])) if rows else (0, 0)
        summary = self._names.summary(summary, rows)
        numbers = {k: v for k, v in summary.items() if isinstance(v, int | float) and is_finite(v)}
        self._log([Metric(_name(f"final/{k}"), float(v), time, step) for k, v in numbers.items()])
        if summary:
            with _artifact("summary.json"):
                self._client.log_dict(self.mark.run_id, summary, "summary.json")
        self._files()
        with _artifact("the model"):
            self._model()
        self._client.set_terminated(self.mark.run_id, status, end_time=time or None)
        self.mark.closed = status
        self.mark.save(self.run_dir)
        if self.mark.parent_id:
            with _sweep_lock(self.run_dir):
                refresh_sweep(self._client, self._experiment_id, self.mark.parent_id)

    def _files(self) -> None:
        """Send the artifacts that are new or have changed."""
        for name, state in new_files(self.run_dir, self.mark).items():
            with _artifact(name):
                folder = str(Path(name).parent)
                self._client.log_artifact(self.mark.run_id, str(self.run_dir / name), None if folder == "." else folder)
                self.mark.files[name] = state
                self.mark.save(self.run_dir)

    def _model(self) -> None:
        """Send run_dir/model, once, as an MLflow model that this run has made."""
        from mlflow.entities import LoggedModelOutput

        if not has_new_model(self.run_dir, self.mark):
            return
        same = f"source_run_id = '{self.mark.run_id}'"
        model = next(iter(self._client.search_logged_models([self._experiment_id], filter_string=same)), None)
        if model is None:
            made = {"name": "backbone", "source_run_id": self.mark.run_id, "model_type": "encoder"}
            model = self._client.create_logged_model(self._experiment_id, **made)
        self._client.log_model_artifacts(model.model_id, str(self.run_dir / "model"))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(self.mark.run_id, [LoggedModelOutput(model.model_id, step=0)])
        self.mark.model_id = model.model_id
        self.mark.save(self.run_dir)


def new_files(run_dir: Path, mark: Watermark) -> dict[str, str]:
    """The artifacts of a run directory that MLflow lacks, each with its state: configuration, environment, figures."""
    paths = [run_dir / "config.yaml", run_dir / "environment.json", *sorted((run_dir / "figures").glob("[!.]*"))]
    found = {p.relative_to(run_dir).as_posix(): p.stat() for p in paths if p.is_file()}
    states = {name: f"{status.st_size} bytes of {status.st_mtime_ns}" for name, status in found.items()}
    return {name: state for name, state in states.items() if mark.files.get(name) != state}


def has_new_model(run_dir: Path, mark: Watermark) -> bool:
    return not mark.model_id and (run_dir / "model" / "MLmodel").exists()


def refresh_sweep(client: Any, experiment_id: str, parent_id: str) -> list[str]:
    """Set the status of a sweep's run from its jobs': RUNNING while one runs, SCHEDULED while some have yet to start.

    Returns:
        The ids of its jobs' runs, oldest first.
    """
    same, order = f"tags.`mlflow.parentRunId` = '{parent_id}'", ["attributes.start_time ASC"]
    children = client.search_runs([experiment_id], same, max_results=50_000, order_by=order)
    states = [child.info.status for child in children]
    parent = client.get_run(parent_id)
    still = max(int(parent.data.tags.get("caco.jobs", 0)), len(states)) - states.count("FINISHED")
    outcome = "SCHEDULED" if still else "FINISHED"
    outcome = next((state for state in ("RUNNING", "FAILED", "KILLED") if state in states), outcome)
    if outcome != parent.info.status:
        ended = outcome not in ("RUNNING", "SCHEDULED")
        client.set_terminated(parent_id, outcome) if ended else client.update_run(parent_id, status=outcome)
    return [child.info.run_id for child in children]


def _sweep_lock(run_dir: Path) -> contextlib.AbstractContextManager:
    """The lock that the jobs of a sweep share, whose run directories are side by side: they make one parent run, and
    the last one to end closes it."""
    return locked(run_dir.absolute().parent / ".mlflow-sweep.lock", wait_s=60)


@contextlib.contextmanager
def _artifact(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - each artifact store raises its own; metrics must be sent all the same
        _log.warning("MLflow did not take %s (%s); it is in the run directory", name, first_line(error))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container the user may have no name
        return str(os.getuid())


def _name(name: str) -> str:
    """`name` with the characters replaced that MLflow does not allow in names."""
    return re.sub(r"[^\w.\-/ :]", "_", name)[:250]


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
