"""The MLflow store: which addresses are accepted, that it is created only once even if many processes start, and limits
on how long caco waits for it.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from caco.errors import UserError
from caco.installed import command_to_install
from caco.tracking.mlflow import MLflowTracker
from caco.tracking.store import import_mlflow, resolve_uri

ROOT = Path(__file__).parents[2]

FRESH = """
import logging, os
from pathlib import Path
from caco.tracking.store import import_mlflow
from caco.tracking.mlflow import MLflowTracker
logging.basicConfig(level=logging.WARNING)
import_mlflow()  # once for all four, so that they meet at the store and nowhere before
children = []
for name in ("a", "b", "c", "d"):
    child = os.fork()
    if child == 0:
        tracker = MLflowTracker(uri=None, experiment="sweep", finish_seconds=240)
        tracker.start(Path(name), params={"seed": name}, tags={}, run_name=name, state=None)
        tracker.log(1, {"loss": 0.5})
        tracker.finish("FINISHED", {"loss": 0.5})
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
"""


def test_four_processes_at_once_on_a_fresh_default_store_each_log_their_run(tmp_path, store):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + FRESH]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    assert sorted(run.data.params["seed"] for run in runs) == ["a", "b", "c", "d"]
    assert {(run.info.status, run.data.metrics["train/loss"]) for run in runs} == {("FINISHED", 0.5)}
    assert all(run.info.artifact_uri.startswith(f"file://{tmp_path}/mlruns/") for run in runs)


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "mlruns", "/tmp/mlruns", "sqlite://", "databricks", "ftp://x"])
def test_what_is_no_database_and_no_server_is_refused_at_once(uri, store):
    with pytest.raises(ValueError, match=f"expected a server, .*got '{uri}'"):
        MLflowTracker(uri=uri, experiment="x")


def test_the_store_is_the_users_or_else_lies_in_the_working_directory(tmp_path, monkeypatch):
    assert resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri("sqlite:///some/x.db") == f"sqlite:///{tmp_path}/some/x.db"
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve_uri("sqlite:///~/x.db") == "sqlite:////home/me/x.db"
    assert resolve_uri("postgresql+psycopg2://h/db") == "postgresql+psycopg2://h/db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve_uri(None) == "http://host:5000"


def test_without_mlflow_one_is_told_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(
        UserError, match=f"^MLflow is not installed; to install it: {re.escape(command_to_install('mlflow'))}$"
    ):
        MLflowTracker(uri=None, experiment="x")


def test_the_users_own_limits_for_requests_hold(monkeypatch, store):
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR as factor
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as retries

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", raising=False)
    import_mlflow()
    assert (retries.get(), factor.get()) == (5, 1)


def test_the_trackers_modules_import_mlflow_only_when_it_is_used():
    code = "import sys, caco.tracking.mlflow, caco.tracking.sync; sys.exit(bool({'mlflow', 'torch'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
