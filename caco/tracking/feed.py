"""Feeds a run's ledger to MLflow, once each row. The only module that talks to MLflow; imports it when used."""

import contextlib
import importlib.util
import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

from caco.tracking.files import locked, read_json
from caco.tracking.ledger import read_rows
from caco.tracking.watermark import Watermark, is_finite, milliseconds, points, sending

_log = logging.getLogger(__name__)

_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")
_ROWS_PER_BATCH = 200
# What MLflow takes: metrics and parameters a request, characters a value.
_MAX_METRICS, _MAX_PARAMS, _MAX_PARAM_CHARS, _MAX_TAG_CHARS = 1000, 100, 6000, 8000

# A dead server blocks a call for 247 s by default, and a hanging one for twice that.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def require_mlflow() -> None:
    """Raises ModuleNotFoundError, with what to do, where MLflow is not installed. Does not import it."""
    if importlib.util.find_spec("mlflow") is None:
        raise ModuleNotFoundError(
            "expected the package mlflow for tracking=mlflow, got none: "
            "`pip install 'caco[mlflow]'`, or choose tracking=ledger"
        )


def resolve_uri(uri: str | None) -> str:
    """Where to track: `uri`, else MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in the working directory.

    Raises:
        ValueError: neither a database nor a server (MLflow 3 refuses its old store of plain files).
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme.partition("+")[0] not in _SCHEMES or (scheme == "sqlite" and not _database(uri)):
        raise ValueError(
            f"tracking.uri (or MLFLOW_TRACKING_URI): expected a server, http(s)://HOST:PORT, or a database, "
            f"sqlite:///PATH/mlflow.db, postgresql://, mysql:// or mssql://, got {uri!r}; a directory is no store"
        )
    database = _database(uri)
    return f"sqlite:///{database}" if database else uri


def _database(uri: str) -> Path | None:
    """The file of an SQLite store, absolute: the working directory may change, the store may not."""
    return Path(uri.partition(":///")[2]).absolute() if uri.startswith("sqlite:///") else None


def import_mlflow() -> None:
    """Import MLflow with bounds for a server that does not answer; what the user has set is left alone.

    Call it in the main thread before any fork: a worker forked while another thread imports can wait for ever.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a new store tells of its every table
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations among MLflow's own dependencies
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
        import sqlalchemy.orm

        sqlalchemy.orm.configure_mappers()  # else at the first use, with its warnings


def connect(uri: str, experiment: str) -> tuple[Any, str]:
    """A client, and the id of the experiment, which is created where there is none.

    A fresh SQLite store is created under a lock: four processes that create one at once destroy it for good.
    """
    database = _database(uri)
    if database is None:
        # Behind a server, the server says where artifacts go; with a bare database nobody else does.
        return _connect(uri, experiment, None if uri.startswith("http") else Path.cwd() / "mlruns")
    database.parent.mkdir(parents=True, exist_ok=True)
    with locked(database.with_name(database.name + ".lock"), wait_s=120):
        return _connect(uri, experiment, database.parent / "mlruns")


def _connect(uri: str, experiment: str, artifacts: Path | None) -> tuple[Any, str]:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            return client, client.create_experiment(experiment, artifact_location=artifacts and artifacts.as_uri())
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(experiment)  # another job was faster
    return client, found.experiment_id


class Feed:
    """One run directory on its way to MLflow: open(), send() as often as one likes, end(), release().

    All of them raise whatever MLflow raises. After that release() and open() again; nothing is lost or doubled.
    """

    def __init__(self, run_dir: Path, *, uri: str, experiment: str) -> None:
        self.run_dir = Path(run_dir)
        self.uri = uri
        self.experiment = experiment
        self.mark = Watermark.load(self.run_dir)
        self.is_open = False
        self._lock = contextlib.ExitStack()
        self._offset = 0  # bytes of the ledger that are read
        self._skip = 0  # of the rows behind them, how many MLflow has
        self._non_finite: set[str] = set()

    def open(self) -> None:
        """Find this directory's MLflow run, or create it, and say what it is and that it runs.

        Raises:
            BlockingIOError: another process is sending this run.
        """
        from mlflow.entities import Param, RunTag

        self._lock.enter_context(sending(self.run_dir, wait_s=0))
        self.mark = Watermark.load(self.run_dir)
        about = read_json(self.run_dir / "tracking.json")
        self._client, experiment_id = connect(self.uri, self.experiment)
        run = self._find(experiment_id)
        if run is None:
            if self.mark.run_id:
                self.mark.restart()  # another server, or a deleted run: it gets everything
            self.mark.save(self.run_dir)  # the token first: a kill after the next line must not make a second run
            tags = {"caco.token": self.mark.token}
            run = self._client.create_run(experiment_id, run_name=about.get("run_name"), tags=tags)
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        self.mark.run_id, self.mark.closed = run.info.run_id, ""
        self.mark.uri, self.mark.experiment = self.uri, self.experiment
        self.mark.save(self.run_dir)
        # A parameter is logged once: MLflow refuses another value, and cadence or paths may differ after a resume.
        params = {_name(k): v[:_MAX_PARAM_CHARS] for k, v in about.get("params", {}).items()}
        params = [Param(k, v) for k, v in params.items() if k not in run.data.params]
        for part in _chunks(params, _MAX_PARAMS):
            self._client.log_batch(self.mark.run_id, params=part, synchronous=True)
        tags = dict(about.get("tags", {}))
        if "git_sha" in tags:
            tags["mlflow.source.git.commit"] = tags["git_sha"]  # the dashboard has a place for it
        tags = [RunTag(_name(k), v[:_MAX_TAG_CHARS]) for k, v in tags.items()]
        for part in _chunks(tags, _MAX_PARAMS):
            self._client.log_batch(self.mark.run_id, tags=part, synchronous=True)
        self._artifact(self.run_dir / "config.yaml")
        self._offset, self._skip = 0, self.mark.sent
        self.is_open = True

    def release(self) -> None:
        """Let others send this run."""
        self.is_open = False
        self._lock.close()

    def _find(self, experiment_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        if not self.mark.run_id:
            same = f"tags.`caco.token` = '{self.mark.token}'"
            return next(iter(self._client.search_runs([experiment_id], filter_string=same, max_results=1)), None)
        try:
            run = self._client.get_run(self.mark.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def send(self) -> int:
        """Send the ledger's rows that MLflow does not have; returns how many there were."""
        rows, end = read_rows(self.run_dir / "ledger.jsonl", self._offset)
        rows, self._skip = rows[self._skip :], 0
        for part in _chunks(rows, _ROWS_PER_BATCH):
            self.mark.attempted = self.mark.sent + len(part)
            self.mark.save(self.run_dir)
            self._log(self._metrics(part))
            self.mark.sent += len(part)
            self.mark.save(self.run_dir)
        self._offset = end
        return len(rows)

    def _metrics(self, rows: list[dict[str, Any]]) -> list[Any]:
        """The rows' numbers as KIND/NAME: the loss of a step and that of an epoch are two series."""
        from mlflow.entities import Metric

        metrics = []
        for row in rows:
            for (kind, step, name), value in points(row):
                old = self.mark.rolled_back.get((kind, step, name), (milliseconds(row), value))
                if not is_finite(value):
                    self._non_finite.add(f"{kind}/{name}")
                elif old is not None:
                    metrics.append(Metric(_name(f"{kind}/{name}"), float(old[1]), old[0], step))
        return metrics

    def _log(self, metrics: list[Any]) -> None:
        for part in _chunks(metrics, _MAX_METRICS):
            self._client.log_batch(self.mark.run_id, metrics=part, synchronous=True)
        if self._non_finite:
            # MLflow stores inf as 1.797e308, which ruins a chart: they stay in the ledger, and the run says so.
            names = ", ".join(sorted(self._non_finite))
            self._client.set_tag(self.mark.run_id, "caco.non_finite", names[:_MAX_TAG_CHARS])

    def end(self, status: str, summary: dict[str, Any]) -> None:
        """Send the final metrics, as final/NAME, and summary.json; set the run's last status."""
        from mlflow.entities import Metric

        rows = read_rows(self.run_dir / "ledger.jsonl")[0]
        # The last row's time, so that ending twice sends the same points.
        step, time = (rows[-1]["step"], milliseconds(rows[-1])) if rows else (0, 0)
        numbers = {k: v for k, v in summary.items() if isinstance(v, int | float) and is_finite(v)}
        self._log([Metric(_name(f"final/{k}"), float(v), time, step) for k, v in numbers.items()])
        if summary:
            self._artifact(self.run_dir / "summary.json", summary)
        self._client.set_terminated(self.mark.run_id, status, end_time=time or None)
        self.mark.closed = status
        self.mark.save(self.run_dir)

    def _artifact(self, path: Path, content: dict[str, Any] | None = None) -> None:
        try:
            if content is not None:
                self._client.log_dict(self.mark.run_id, content, path.name)
            elif path.exists():
                self._client.log_artifact(self.mark.run_id, str(path))
        except Exception as error:  # noqa: BLE001 - each artifact store has its own; metrics must go on without it
            _log.warning("MLflow did not take %s (%s); it is in the run directory", path.name, first_line(error))


def first_line(error: Exception) -> str:
    """An error in one line of a bearable length."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _name(name: str) -> str:
    """`name` with what MLflow does not take in a name replaced."""
    return re.sub(r"[^\w.\-/ :]", "_", name)[:250]


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
