"""Read results from records or an MLflow store, assign them to the rows of a table, and find what is missing.

A result belongs to a row only if the hashes of their configurations agree. A result that was run for a row but has
another hash comes from another version of the table, the scale or the code's defaults; it is refused.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats

from caco import metrics
from caco.config.schema import Root
from caco.errors import UserError
from caco.runs import renamed
from caco.runs.files import read_json
from caco.runs.identity import differences, identity, run_hash
from caco.sheets import Spread
from caco.tracking.store import first_line, import_mlflow, require_mlflow, resolve_uri
from experiments import record
from experiments.run import RECORDS
from experiments.tables import Experiment, Scale, Table, experiments

# The column headings of metrics in DERIVED.
HEADINGS = {"train_hours": "hours", "device_hours_per_epoch": "device hours per epoch"}


def heading(metric: str) -> str:
    return HEADINGS.get(metric) or metrics.title(metric)


@dataclass(frozen=True)
class Result:
    """One finished run.

    Args:
        config: the settings of its identity (caco/runs/identity.py).
        curve: the ledger's rows of kind epoch and eval.
        label: the table, row and scale that it was run for, or {}.
        source: the record file or MLflow store that it was read from.
        mlflow_run: (tracking URI, run id) in MLflow, or None.
    """

    name: str
    hash: str
    seed: int
    command: str
    config: dict[str, Any]
    environment: dict[str, str]
    summary: dict[str, Any]
    curve: list[dict[str, Any]]
    label: dict[str, str]
    source: str
    mlflow_run: tuple[str, str] | None = None

    def value(self, metric: str) -> float | None:
        """A final metric, or one of DERIVED that is computed from several; None if it was not measured."""
        if metric in DERIVED:
            try:
                return DERIVED[metric](self)
            except KeyError:
                return None
        found = self.summary.get(metric)
        return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def images_per_second(result: Result) -> float:
    """The mean training rate of the run; time spent in evaluations is not counted.

    Raises:
        KeyError: the rate is unknown: it was not measured, or it is 0, as older versions of caco recorded for a run
            that was resumed when no step was left.
    """
    if not result.summary["images_per_second"] > 0:
        raise KeyError("images_per_second")
    return result.summary["images_per_second"]


def train_hours(result: Result) -> float:
    """Hours of training without evaluations, from the measured rate. Raises: KeyError: the rate is unknown."""
    return result.summary["steps"] * result.config["batch"] / images_per_second(result) / 3600


def device_hours_per_epoch(result: Result) -> float:
    """Hours per epoch times the number of processes that trained together; the warm start is not counted."""
    steps = result.summary["steps"] - warm_start_steps(result.config)
    hours = train_hours(result) * steps / result.summary["steps"]
    return hours * result.summary["processes"] / result.summary["epochs"]


def warm_start_steps(config: Mapping[str, Any]) -> int:
    """How many steps a run with this flat configuration makes before epoch 0."""
    if (steps := config.get("method.warm_start_steps")) is not None:
        return steps
    passes = config.get("method.warm_start_passes")
    if passes is None:
        passes = 1 if config.get("bank.initialisation") == "keys" else 0
    return passes * math.ceil(config.get("bank.size", 0) / config["batch"])


DERIVED: dict[str, Callable[[Result], float]] = {
    "images_per_second": images_per_second,
    "train_hours": train_hours,
    "device_hours_per_epoch": device_hours_per_epoch,
}


def from_records(paths: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """Read the results of record files, each run once, and messages about runs that several files report differently.

    Raises:
        UserError: a file is not a record.
    """
    parts = [[run | {"source": str(path)} for run in record.read(path)] for path in paths]
    runs, messages = record.merge(parts)
    return [
        Result(
            name=run["name"],
            hash=run["config_hash"],
            seed=run["seed"],
            command=run["command"],
            config=run["config"],
            environment=run["environment"],
            summary=run["summary"],
            curve=run["curve"],
            label=run.get("experiment", {}),
            source=run["source"],
            mlflow_run=_place(run["name"], run.get("experiment", {})),
        )
        for run in runs
    ], messages


def _place(name: str, label: dict[str, str]) -> tuple[str, str] | None:
    """The MLflow run of a run whose directory is on this machine, else None."""
    mark = Path("runs") / label.get("scale", "") / name / "mlflow.json"
    known = read_json(mark) if label else {}
    return (known["uri"], known["run_id"]) if known.get("run_id") else None


def default_records(scale: str) -> list[Path]:
    """The scale's committed record, and the record of the runs in this folder; only those that exist."""
    return [path for path in (RECORDS / f"{scale}.json", Path("runs") / scale / "record.json") if path.is_file()]


def from_mlflow(uri: str, experiment: str, *, curves: bool = False) -> list[Result]:
    """The finished runs of an MLflow experiment.

    Args:
        experiment: its name, by default that of the scale.
        curves: also read the history of every metric, which takes one request per metric and run.
    Raises:
        UserError: the store does not answer, or has no such experiment.
    """
    require_mlflow()
    uri = resolve_uri(uri)
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.is_file():
        raise UserError(f"{uri}: there is no such file")
    import_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(uri)
    try:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            names = sorted(item.name for item in client.search_experiments())
            raise UserError(f"{uri}: no experiment {experiment}; there are: {', '.join(names)}")
        results, token = [], None
        while True:
            page = client.search_runs([found.experiment_id], "attributes.status = 'FINISHED'", page_token=token)
            results += [_of_mlflow(client, run, uri, curves) for run in page if "config_hash" in run.data.tags]
            token = page.token
            if not token:
                return results
    except MlflowException as error:
        raise UserError(f"{uri}: {first_line(error)}") from error


def _of_mlflow(client: Any, run: Any, uri: str, curves: bool) -> Result:
    values, tags = run.data.metrics, run.data.tags
    summary = {name.removeprefix("final/"): value for name, value in values.items() if name.startswith("final/")}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for name in values if curves else ():
        kind, _, value_name = name.partition("/")
        if kind in ("epoch", "eval"):
            for point in client.get_metric_history(run.info.run_id, name):
                row = rows.setdefault((kind, point.step), {"kind": kind, "step": point.step})
                row[value_name] = point.value
    curve = [rows[key] for key in sorted(rows, key=lambda key: (key[1], key[0]))]
    # Besides the settings, MLflow's parameters name the option that was chosen for each group. Those of groups that are
    # no setting of the configuration, as pn and preset, are dropped here, the others by renamed.nested.
    params = {
        key: _typed(value)
        for key, value in run.data.params.items()
        if key.partition(".")[0] in Root.__dataclass_fields__
    }
    recorded = renamed.nested(params)
    names = renamed.Names(recorded)
    hash = tags["config_hash"]
    return Result(
        name=run.info.run_name,
        # Recompute the hash only if the configuration is complete; MLflow truncates long values.
        hash=run_hash(names.config) if names.is_old and run_hash(recorded) == hash else hash,
        seed=int(params["seed"]),
        command=tags.get("command", ""),
        config=identity(names.config),
        environment={key: tags[key] for key in record.MACHINE if key in tags},
        summary=names.summary(summary, curve) | {key: tags[key] for key in ("data", "data_digest") if key in tags},
        curve=[names.row(row) for row in curve],
        label={},
        source=uri,
        mlflow_run=(uri, run.info.run_id),
    )


def _typed(text: str) -> Any:
    """The value of a parameter, which MLflow stores as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass
class Found:
    """The results of a table row at a scale.

    Args:
        by_seed: results with the row's configuration, by seed; also seeds that the table does not ask for.
        refused: a message for each result that was run for the row with another configuration.
        missing: seeds that the table or the scale asks for and that have no result.
    """

    experiment: Experiment
    by_seed: dict[int, Result] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)

    def has(self, column: str) -> bool:
        """Whether the row's runs are evaluated for a column of the table."""
        return column in (self.experiment.row.columns or self.experiment.table.columns)

    def values(self, metric: str) -> dict[int, float]:
        """{seed: value of the metric}, sorted by seed, without seeds that have no such value."""
        values = {seed: result.value(metric) for seed, result in sorted(self.by_seed.items())}
        return {seed: value for seed, value in values.items() if value is not None}


def find(table: Table, scale: Scale, results: Sequence[Result], rows: Sequence[str] | None = None) -> list[Found]:
    """Assign results to the rows of a table at a scale, in the table's order. `rows`: only these; None for all."""
    by_hash = {result.hash: result for result in results}
    found = []
    for experiment in experiments(table, scale, rows=rows):
        row = Found(experiment)
        found.append(row)
        if experiment.why_not is not None:
            continue
        for seed in sorted({*experiment.seeds, *(result.seed for result in results)}):
            if experiment.hash(seed) in by_hash:
                row.by_seed[seed] = by_hash[experiment.hash(seed)]
        row.missing = [seed for seed in experiment.seeds if seed not in row.by_seed]
        label = {"table": table.id, "row": experiment.row_id, "scale": scale.id}
        for result in results:
            if (
                result.label == label
                and row.by_seed.get(result.seed) is not result
                and result.hash != experiment.hash(result.seed)
            ):
                changed = differences(result.config, identity(experiment.with_seed(result.seed)))
                more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                row.refused.append(
                    f"{result.source}: {experiment.name} seed {result.seed} was run with another configuration"
                    f" ({result.hash}, here {experiment.hash(result.seed)}) and is not counted:"
                    f" {'; '.join(changed[:3])}{more}"
                )
    return found


@dataclass(frozen=True)
class Gain:
    """The gain of a row over the reference row, paired by seed.

    Args:
        spread: mean and standard deviation of the gains.
        p: p value of Student's paired t test, two-sided; None for ratios, for fewer than two common seeds, and if all
            gains are equal.
    """

    spread: Spread
    p: float | None

    @classmethod
    def of(cls, ours: dict[int, float], reference: dict[int, float], *, ratio: bool = False) -> "Gain | None":
        """Compute the gain over the seeds that both rows have; None if they have none in common.

        Args:
            ours, reference: {seed: value}.
            ratio: whether a gain is ours / reference instead of ours - reference.
        """
        common = [seed for seed in ours if seed in reference]
        pairs = [(ours[seed], reference[seed]) for seed in common]
        spread = Spread.of(a / b if ratio else a - b for a, b in pairs)
        if spread is None:
            return None
        tested = not ratio and spread.sd is not None and spread.sd > 1e-9 * max(1.0, abs(spread.mean))
        return cls(spread, float(stats.ttest_1samp([a - b for a, b in pairs], 0.0).pvalue) if tested else None)
