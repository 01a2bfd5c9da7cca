"""The store in which MLflow keeps runs, a database or a server: how it is named, reached and created. Imports MLflow
only when used.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from caco.errors import FileError, UserError
from caco.installed import is_installed, to_install
from caco.redaction import completed, redacted
from caco.runs.files import locked, read_json
from caco.runs.identity import flat, read_recorded
from caco.runs.paths import expanded

_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")

# A dead server blocks a call for 247 s by default, and a hanging one for twice that.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def require_mlflow() -> None:
    """Raise UserError, with the command to install it, if MLflow is not installed. Does not import it."""
    if not is_installed("mlflow"):
        raise UserError(f"MLflow is not installed{to_install('mlflow')}")


def resolve_uri(uri: str | None) -> str:
    """The store to use: `uri`, else MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in the working directory.

    Raises:
        UserError: `uri` is neither a database nor a server (MLflow 3 refuses its old store of plain files).
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme.partition("+")[0] not in _SCHEMES or (scheme == "sqlite" and not _database(uri)):
        raise UserError(
            "tracking.uri (or MLFLOW_TRACKING_URI): expected a server, http(s)://HOST:PORT, or a database,"
            f" sqlite:///PATH/mlflow.db, postgresql://, mysql:// or mssql://, got {redacted(uri)!r}; a directory cannot"
            " be a store"
        )
    database = _database(uri)
    return f"sqlite:///{database}" if database else uri


def own_uri(run_dir: Path, chosen: str | None = None) -> str:
    """The store of a run, independent of the shell: `chosen`; else where it was sent; else where it was to be sent when
    it started; else what its configuration says; and what resolve_uri returns only for a run that names no store.

    Addresses are recorded without passwords. The password is taken from MLFLOW_TRACKING_URI if that names the same
    place.

    Raises:
        UserError: the password is not known here, or a database's folder does not exist.
    """
    if chosen:
        return resolve_uri(chosen)
    about = read_json(run_dir / "tracking.json")
    settings = about.get("params", {}).get("tracking.uri")
    config = run_dir / "config.yaml"
    if settings is None and config.is_file():
        settings = flat(read_recorded(config)).get("tracking.uri")
    named = read_json(run_dir / "mlflow.json").get("uri") or about.get("store", {}).get("uri") or settings
    if named in (None, "", "null", "None"):
        return resolve_uri(None)
    known = completed(str(named), os.environ.get("MLFLOW_TRACKING_URI"))
    if known is None:
        raise UserError(
            f"its store is {named}, whose password is not recorded anywhere: set MLFLOW_TRACKING_URI to this store with"
            " its password, or choose another store with --uri"
        )
    uri = resolve_uri(known)
    if (database := _database(uri)) and not database.parent.is_dir():
        raise FileError(
            f"its store {database} is in a folder that does not exist here: make the folder for a new store, or choose"
            " another store with --uri"
        )
    return uri


def _database(uri: str) -> Path | None:
    """The file of an SQLite store, as an absolute path, because the working directory may change."""
    return expanded(uri.partition(":///")[2]).absolute() if uri.startswith("sqlite:///") else None


def import_mlflow() -> None:
    """Import MLflow, with time limits for a server that does not answer; environment variables that the user has set
    are kept.

    Call it in the main thread before any fork: a worker that is forked while another thread imports can hang for ever.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # otherwise a new store logs each of its tables
    for name in ("urllib3.connectionpool", "urllib3.util.retry"):
        # Otherwise every attempt to reach a dead server is logged; the feeder reports it once.
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within MLflow's dependencies
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
        import sqlalchemy.orm

        sqlalchemy.orm.configure_mappers()  # now, because it would otherwise warn at the first use


def connect(uri: str, experiment: str) -> tuple[Any, str]:
    """A client, and the id of the experiment, which is created if it does not exist.

    A new SQLite store is created under a lock: if four processes create one at once, it is destroyed for good.
    """
    database = _database(uri)
    if database is None:
        # A server decides itself where artifacts go; a bare database needs to be told.
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
            # Without this tag the experiment's page opens as one for language models.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            where = artifacts and artifacts.as_uri()
            return client, client.create_experiment(experiment, artifact_location=where, tags=tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(experiment)  # another job has just created it
    return client, found.experiment_id


def first_line(error: Exception) -> str:
    """An error in one line of limited length, with secrets removed."""
    if isinstance(error, UserError):
        return str(error).splitlines()[0]
    return redacted(f"{type(error).__name__}: {error}".splitlines()[0])[:200]
