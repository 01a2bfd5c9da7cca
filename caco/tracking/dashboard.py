"""python -m caco.tracking.dashboard [RUNS] : see all runs in a browser. Also `make dashboard`.

Brings MLflow up to date with the run directories: sends what it missed, and ends runs whose process is gone. Then
starts MLflow's server on the store that runs are tracked in, prints its address, and keeps server and store up to date
until Ctrl-C. Runs do not depend on it.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caco.errors import UserError, shown
from caco.redaction import redacted
from caco.runs.paths import expanded
from caco.tracking.names import OF_SWEEPS, colours
from caco.tracking.store import connect, first_line, import_mlflow, require_mlflow, resolve_uri
from caco.tracking.sync import find_runs, sync

# Parameters in the table of runs, in this order, if they differ between runs; then any others that differ.
_FIRST = ("method", "pn", "negatives", "bank", "backbone", "data", "batch", "epochs", "seed")
_MAX_PARAMS = 8
# Sections of the charts from top to bottom, and whether they are unfolded at first.
_SECTIONS = {
    "eval": True,
    "train": True,
    "epoch": True,
    "paper": False,
    "final": False,
    "warm_start": False,
    "warning": False,
    "filling": False,
    "System metrics": False,
}
_VIEW = "caco"  # the name of our view of an experiment in the page's address


def columns(runs: list[Any]) -> list[str]:
    """The columns of the table of runs: parameters that differ, the newest results beside the paper's, and the machine.

    Args:
        runs: MLflow's runs of one experiment.
    """
    runs = [run for run in runs if run.data.params]  # the run of a sweep itself has no parameters
    typed = {item.partition("=")[0] for run in runs for item in run.info.run_name.split()}
    # An option stands for all that it sets: pn=both sets pull, push and more.
    names = {name for run in runs for name in run.data.params if "." not in name or name in typed}
    differ = [name for name in names if len({run.data.params.get(name) for run in runs}) > 1]
    params = sorted(differ, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))[
        :_MAX_PARAMS
    ]
    metrics = {name for run in runs for name in run.data.metrics}
    results = sorted(name for name in metrics if name.startswith("eval/") and name != "eval/epochs")
    beside = [name for result in results for name in (result, result.replace("eval/", "paper/", 1)) if name in metrics]
    beside += sorted(name for name in metrics if name.startswith("paper/") and name not in beside)
    # Tags of the machine only if they differ: at 1280 pixels the page shows the names and some ten columns.
    tags = {name for run in runs for name in run.data.tags if len({other.data.tags.get(name) for other in runs}) > 1}
    data_sets = {run.data.params.get("data") for run in runs}
    return [
        *(f"params.`{name}`" for name in params),
        *(f"metrics.`{name}`" for name in beside),
        *(f"metrics.`{name}`" for name in ("train/loss", "train/images_per_second") if name in metrics),
        *(f"tags.`{name}`" for name in ("slurm_job_id", "host", "gpus") if name in tags),
        *(["attributes.`Dataset`"] if len(data_sets) > 1 else []),
    ]


def view(runs: list[Any]) -> dict[str, Any]:
    """How MLflow's page of an experiment opens: its columns, and the best run first. The format is what `Share`
    saves.
    """
    chosen = columns(runs)
    ranked = next((name for name in chosen if name.startswith("metrics.`eval/")), "attributes.start_time")
    counters = {name for run in runs for name in run.data.metrics if name.rpartition("/")[2] in ("epoch", "epochs")}
    return {
        # Sorted by a result instead of time, runs are listed one by one; otherwise the jobs of a sweep are folded in
        # and have no charts.
        "orderByKey": ranked,
        "orderByAsc": False,
        "selectedColumns": chosen,
        "columnOrder": chosen,
        "runsHiddenMode": "FIRST_20_RUNS",
        # For any other metric MLflow would add a chart, and for any other first part of a name a section.
        "compareRunSections": [
            {
                "uuid": name,
                "name": name,
                "display": is_open,
                "isReordered": False,
                "deleted": False,
                "isGenerated": True,
            }
            for name, is_open in _SECTIONS.items()
        ],
        "compareRunCharts": [
            {
                "type": "LINE",
                "uuid": name,
                "metricKey": name,
                "metricSectionId": name.partition("/")[0],
                "deleted": True,
                "isGenerated": True,
            }
            for name in sorted(counters)
        ],
        "isAccordionReordered": True,
    }


def recoloured(runs: list[Any]) -> dict[str, str]:
    """Run id -> a new colour, for runs that have no colour or share that of an older run, so that a colour in a chart
    means one row of the table. The runs of sweeps, which have no curves, are all black."""
    others = [run for run in runs if run.data.tags.get("mlflow.runColor") != OF_SWEEPS]
    taken, without = set[str](), list[str]()
    for run in others:
        colour = run.data.tags.get("mlflow.runColor")
        if colour is None or colour in taken:
            without.append(run.info.run_id)
        else:
            taken.add(colour)
    free = (colour for colour in colours() if colour not in taken)
    return dict(zip(without, free, strict=False))


def prepare(client: Any, experiment: Any) -> None:
    """Save our view of an experiment if it has changed, and give each of its runs its own colour."""
    runs = client.search_runs([experiment.experiment_id], max_results=1000, order_by=["attributes.start_time ASC"])
    for run_id, colour in recoloured(runs).items():
        client.set_tag(run_id, "mlflow.runColor", colour)
    tags = {
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{_VIEW}": json.dumps(view(runs)),
    }
    for name, value in tags.items():
        if experiment.tags.get(name) != value:
            client.set_experiment_tag(experiment.experiment_id, name, value)


def address(base: str, experiment_id: str) -> str:
    """The address of an experiment's page with our view; without it the page opens as one for language models."""
    return (
        f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?viewStateShareKey={_VIEW}&workflowType=machine_learning"
    )


def update(folder: Path, uri: str, *, named: bool, check: bool = False) -> list[str]:
    """Run sync() for the runs below `folder`, then prepare() for each experiment that has runs; lines on what happened.

    Args:
        named: whether the user chose the store. If so, all runs go there, else each run goes where it went before.
        check: see sync().
    """
    try:
        run_dirs = find_runs([folder])
    except UserError:
        run_dirs = []  # there is no run yet
    messages, _ = sync(run_dirs, uri=uri if named else None, check=check)
    lines = [line for line in messages if ": complete (" not in line and ": skipped: " not in line]
    client, _ = connect(uri, "caco")
    for experiment in client.search_experiments():
        if client.search_runs([experiment.experiment_id], max_results=1):
            prepare(client, experiment)
    return lines


def addresses(uri: str, base: str) -> list[str]:
    """A line with the address of each experiment that has runs, newest first."""
    client, _ = connect(uri, "caco")
    found = [e for e in client.search_experiments() if client.search_runs([e.experiment_id], max_results=1)]
    found.sort(key=lambda experiment: experiment.last_update_time or 0, reverse=True)
    return [f"{experiment.name}: {address(base, experiment.experiment_id)}" for experiment in found] or [base]


@contextlib.contextmanager
def server(uri: str, *, host: str, port: int, wait_s: float = 120.0) -> Iterator[subprocess.Popen]:
    """Run MLflow's server on a database while the body runs; all of its processes end with the body.

    Raises:
        UserError: the server ends or does not answer within wait_s; with the end of its output.
    """
    # One worker, because each is a process of 300 MB. No job execution: it is for language models and adds two
    # processes and a growing log.
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", host, "--port", str(port)]
    # Not as arguments, which every user of the machine can see: a database's address may hold its password.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": uri}
    if uri.startswith("sqlite:///"):  # for artifacts that arrive over HTTP; local runs write into mlruns/ themselves
        environment["MLFLOW_ARTIFACTS_DESTINATION"] = str(Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts"))
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + wait_s
            while not _answers(f"http://{host}:{port}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise UserError(f"mlflow server does not start; its last output: {redacted(log.read()[-1500:])}")
                time.sleep(0.3)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # safe: the server has no files that a kill could tear
            process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def free_port(host: str, wanted: int) -> int:
    """The port `wanted`, or any free one if another program listens there already."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server((host, port)) as listener:
            return listener.getsockname()[1]
    raise UserError(f"--host: expected an address of this machine, got {host}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m caco.tracking.dashboard", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="?", type=expanded, default=Path("runs"), help="the folder of run directories; default runs"
    )
    parser.add_argument("--uri", help="MLflow server or database; default: the store of tracking=mlflow")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, without a password")
    parser.add_argument("--port", type=int, default=5000, help="default 5000; if it is taken, a free one")
    parser.add_argument("--every", type=float, default=30.0, metavar="SECONDS", help="time between updates; default 30")
    options = parser.parse_args(arguments)
    with shown():
        if not 0 <= options.port <= 65535:
            raise UserError(f"--port: expected 0 (any) to 65535, got {options.port}")
        if not 1 <= options.every <= 86400:  # a store that is asked without a pause has time for nothing else
            raise UserError(f"--every: expected 1 to 86400 seconds, got {options.every:g}")
        require_mlflow()
        return _show(options, resolve_uri(options.uri))


def _show(options: argparse.Namespace, uri: str) -> int:
    """Bring the store up to date and serve it until Ctrl-C."""
    import_mlflow()
    named = options.uri is not None
    try:
        _say(update(options.runs, uri, named=named, check=True))
        if uri.startswith("http"):
            _say(addresses(uri, uri))
            return 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        port = free_port(options.host, options.port)
        with server(uri, host=options.host, port=port) as process:
            base = f"http://{options.host}:{port}"
            _say([*addresses(uri, base), f"the store is {redacted(uri)}; Ctrl-C ends this server but no runs"])
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=options.every)
                    raise UserError(f"mlflow server has ended with code {process.returncode}")
                try:
                    _say(update(options.runs, uri, named=named))
                except Exception as error:  # noqa: BLE001 - such as a busy database; the server must stay up
                    _say([f"not brought up to date: {first_line(error)}"])
    except KeyboardInterrupt:
        return 0


def _say(lines: list[str]) -> None:
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
