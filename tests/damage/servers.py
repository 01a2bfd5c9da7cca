"""MLflow servers that refuse, answer late, hang, lose answers and come back empty, at random instants of a run: the run
ends as if nothing had happened, and one sync later the server has each value once.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import forked
import numpy as np
from kills import stored, sync
from ports import unused_port
from processes import caco_train
from tiny import TINY
from wire import Wire

from caco.tracking import dashboard
from caco.tracking.store import connect, import_mlflow

RUN = [*(word for word in TINY if word != "tracking=ledger"),
       "bank.size=128", "max_steps=8", "data.limit=128", "hydra.run.dir=run", "tracking=mlflow",
       "tracking.feed_seconds=0.05", "tracking.finish_seconds=2", "tracking.model=false",
       "tracking.system_seconds=0"]  # fmt: skip
MODES = ("through", "slow", "hangs", "loses answers", "cut", "another")
PAUSE_S = 1.5  # at most, between two changes


class Prepared(NamedTuple):
    folder: Path
    servers: dict[int, Path]  # port: database


@contextlib.contextmanager
def prepare(folder: Path) -> Iterator[Prepared]:
    import_mlflow()
    # A request that is not answered is given up soon, so that a run of seconds meets many faults.
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
    empty = folder / "empty.db"
    connect(f"sqlite:///{empty}", "another")
    with contextlib.ExitStack() as stack:
        servers = {}
        for name in ("one", "two"):
            (folder / name).mkdir()
            database, port = Path(shutil.copy(empty, folder / name / "mlflow.db")), unused_port()
            stack.enter_context(dashboard.server(f"sqlite:///{database}", host="127.0.0.1", port=port))
            servers[port] = database
        yield Prepared(folder, servers)


def disturb(wire: Wire, ports: list[int], rng: np.random.Generator, over: threading.Event) -> None:
    """Change the mode at random instants until the run is over."""
    while not over.wait(rng.uniform(0, PAUSE_S)):
        mode = str(rng.choice(MODES))
        if mode == "another":
            wire.mode = "cut"  # connections to the first server end with it
            over.wait(0.1)
            wire.upstream, mode = int(rng.choice(ports)), "through"
        wire.mode = mode


def case(prepared: Prepared, rng: np.random.Generator) -> str:
    folder, ports = prepared.folder / "case", list(prepared.servers)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    experiment = f"case {rng.integers(1 << 60)}"
    wire, over = Wire(ports[0]), threading.Event()
    disturbing = threading.Thread(target=disturb, args=(wire, ports, rng, over))
    disturbing.start()
    settings = [f"tracking.uri={wire.uri}", f"tracking.experiment='{experiment}'"]
    code, told = forked.run(caco_train, *RUN, *settings, folder=folder)
    over.set()
    disturbing.join()
    assert code == 0 and "Traceback" not in told, f"exit code {code}: {told[-3000:]}"
    wire.mode = "through"
    shutil.copytree(folder / "run", folder / "undisturbed")
    code, told = forked.run(sync, "run", folder=folder)
    assert code == 0 and "Traceback" not in told, f"exit code {code}: {told[-3000:]}"
    found = stored(prepared.servers[wire.upstream], experiment)
    wire.close()
    # The same run is sent to a new store.
    (folder / "undisturbed" / "mlflow.json").unlink(missing_ok=True)
    shutil.copy(prepared.folder / "empty.db", folder / "mlflow.db")
    code, told = forked.run(sync, "undisturbed", "--uri", "sqlite:///mlflow.db", folder=folder)
    assert code == 0, told[-3000:]
    expected = stored(folder / "mlflow.db", experiment)
    wrong = {
        "missing": [row for row in expected if row not in found],
        "wrong": [row for row in found if row not in expected],
    }
    assert found == expected and len(expected) > 50, f"{wrong}, {len(found)} values of {len(expected)}: {told[-2000:]}"
    return "disturbed, and everything is there once after a sync"
