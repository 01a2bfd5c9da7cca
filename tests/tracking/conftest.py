"""A real SQLite store of MLflow for all tracking tests, and helpers to read it."""

import os
import shutil
import time
from pathlib import Path

import pytest

from caco.runs.files import locked


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def new_store(tmp_path_factory):
    """`new_store(folder)` makes a new SQLite store and returns its URI. It copies an empty store, which takes seconds
    to create.
    """
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from caco.tracking.store import connect, import_mlflow

    import_mlflow()
    base = tmp_path_factory.getbasetemp()
    empty = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "empty.db"  # xdist's workers share one
    with locked(empty.with_suffix(".lock"), wait_s=240):
        if not empty.exists():
            connect(f"sqlite:///{empty}.making", "caco")
            Path(f"{empty}.making").rename(empty)

    def copy(folder: Path) -> str:
        return f"sqlite:///{shutil.copy(empty, folder / 'mlflow.db')}"

    return copy


@pytest.fixture(scope="session")
def store(new_store, tmp_path_factory):
    """The URI of an SQLite store, in which each test uses a different experiment."""
    return new_store(tmp_path_factory.mktemp("store"))


class Look:
    """Reads an experiment with MLflow's own client."""

    def __init__(self, uri, experiment):
        self.uri, self.experiment = uri, experiment

    @property
    def client(self):
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def runs(self, filter_string=""):
        experiment = self.client.get_experiment_by_name(self.experiment)
        return list(self.client.search_runs([experiment.experiment_id], filter_string)) if experiment else []

    def run(self):
        (run,) = self.runs()
        return run

    def points(self, name):
        """(step, value) of all points of a series, sorted by step; a point that was sent twice occurs twice."""
        history = self.client.get_metric_history(self.run().info.run_id, name)
        return sorted((metric.step, metric.value) for metric in history)

    def artifacts(self):
        return sorted(file.path for file in self.client.list_artifacts(self.run().info.run_id))


@pytest.fixture
def look(store, request):
    return Look(store, request.node.name)


@pytest.fixture
def eventually():
    def wait(condition):
        deadline = time.monotonic() + 240  # enough for a busy machine; usually it is much faster
        while not condition():
            assert time.monotonic() < deadline, "the condition did not become true in time"
            time.sleep(0.02)

    return wait
