"""Gather finished runs into one record file, merge records, or print a record as a table.

    python -m experiments.record runs/mini/* > experiments/records/mini.json
    python -m experiments.record --merge experiments/records/mini.json theirs.json --into experiments/records/mini.json
    python -m experiments.record --table experiments/records/mini.json

A record holds for each run: the command line, configuration and its hash, seed, data, hardware, versions, final
metrics, curve (the ledger's rows of kind epoch and eval), and the table row that it was run for. Settings that all runs
share are stored once. Two runs with the same configuration hash count as the same run; the hash includes the seed.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from caco import errors, metrics
from caco.errors import UserError
from caco.runs import renamed
from caco.runs.files import read_json, write_json
from caco.runs.identity import identity, run_hash
from caco.runs.paths import expanded
from caco.tracking import recorded

MACHINE = (
    "cpu", "cores", "instructions", "instructions_bank", "instructions_views", "instructions_torch", "memory_gib",
    "gpus", "platform",
    "python", "torch", "torchvision", "timm", "numpy", "git_sha", "git_dirty",
)  # fmt: skip
LABEL = "experiment.json"  # a file in a run's directory that names the table, row and scale that it was run for


def gather(run_dirs: Iterable[Path]) -> dict[str, Any]:
    """Make the record of finished runs.

    Raises:
        UserError: a directory does not hold a finished run.
    """
    return pack([_run(Path(run_dir)) for run_dir in run_dirs])


def _run(run_dir: Path) -> dict[str, Any]:
    if not (run_dir / "summary.json").is_file():
        raise UserError(
            f"expected a finished run, with summary.json, in {run_dir}; start its command again to finish it"
        )
    environment = read_json(run_dir / "environment.json")
    run = recorded.read(run_dir)
    label = read_json(run_dir / LABEL)
    return {
        "name": run_dir.name,
        "command": environment["command"],
        **({"experiment": label} if label else {}),
        "config_hash": run_hash(run.config),
        "seed": run.config["seed"],
        "config": identity(run.config),
        "environment": {k: v for k, v in environment.items() if k in MACHINE},
        "summary": run.summary,
        "curve": [
            {k: v for k, v in row.items() if k != "time"} for row in run.rows if row["kind"] in ("epoch", "eval")
        ],
    }


def pack(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Pack runs into one record; configuration and environment entries that all runs share are stored once."""
    record: dict[str, Any] = {}
    for part in ("config", "environment"):
        everywhere = [set(map(json.dumps, run[part].items())) for run in runs]
        shared = set.intersection(*everywhere) if runs else set()
        record[part] = {k: v for k, v in (runs[0][part] if runs else {}).items() if json.dumps((k, v)) in shared}
    return {**record, "runs": [run | {part: _without(run[part], record[part]) for part in record} for run in runs]}


def _without(mapping: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in shared}


def unpack(record: dict[str, Any], source: str) -> list[dict[str, Any]]:
    """The runs of a record, each with its full configuration and with the names that caco uses today.

    Args:
        source: how messages call the record.
    Raises:
        UserError: this is not a record, or a run's configuration does not match its hash.
    """
    try:
        parts = ("config", "environment")
        runs = [
            run | {part: dict(sorted({**record[part], **run[part]}.items())) for part in parts}
            for run in record["runs"]
        ]
        for run in runs:
            found = run_hash(run["config"])
            if found != run["config_hash"]:
                raise UserError(
                    f"{source}: run {run['name']}: expected the configuration {run['config_hash']}, got {found}: the"
                    " record was changed by hand"
                )
            run["seed"]  # noqa: B018 - raises KeyError if the record lacks it
            names = renamed.Names(renamed.nested(run["config"]))
            run["config"], run["config_hash"] = identity(names.config), run_hash(names.config)
            run["summary"] = names.summary(run["summary"], run["curve"])
            run["curve"] = [names.row(row) for row in run["curve"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source}: expected a record, as python -m experiments.record makes it; got none ({error!r})"
        ) from error
    return runs


def read(path: Path) -> list[dict[str, Any]]:
    """Read the runs of a record file.

    Raises:
        UserError: the file does not exist, or is not a record.
    """
    try:
        return unpack(json.loads(path.read_text()), str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such record") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: expected a record, got something that is not JSON ({error})") from error


def merge(parts: Iterable[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Merge lists of runs; returns each run once, and a message for every run that occurs with different results.

    Runs with the same configuration hash (which includes the seed) are the same run, whatever table row they were run
    for. Of two with different results the first is kept.
    """
    kept: dict[str, dict[str, Any]] = {}
    messages = []
    for runs in parts:
        for run in runs:
            first = kept.setdefault(run["config_hash"], run)
            if first is run:
                continue
            differing = [
                key for key in numbers(first) if run["summary"].get(key, first["summary"][key]) != first["summary"][key]
            ]
            if differing:
                messages.append(
                    f"{run['name']}: recorded twice, with different values of {differing[0]}; {first['name']} of the"
                    " first record is kept"
                )
            else:  # one of the two may have been evaluated again after training, so keep the metrics of both
                longer = max(first, run, key=lambda run: len(run["curve"]))
                summary = {**run["summary"], **first["summary"]}
                kept[run["config_hash"]] = first | {"summary": summary, "curve": longer["curve"]}
    return list(kept.values()), messages


def numbers(run: dict[str, Any]) -> dict[str, Any]:
    """The final metrics that must agree between two equal runs: all but images per second."""
    return {key: value for key, value in run["summary"].items() if key != "images_per_second"}


def table(record: dict[str, Any]) -> str:
    """Show a record as a Markdown table with one line per run."""
    columns = metrics.accuracies(name for run in record["runs"] for name in run["summary"])
    columns += ["loss", "max_probability", "bank/rows_used", "bank/near_duplicates", "bank/row_norm_mean"]
    words = [run["command"].split()[3:] for run in record["runs"]]
    everywhere = set.intersection(*map(set, words)) if len(words) > 1 else set()
    lines = ["| what differs | seed | k-NN before | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    for run, overrides in zip(record["runs"], words, strict=True):
        differs = [word for word in overrides if word not in everywhere and not word.startswith("seed=")]
        knn = metrics.knn_metric(renamed.nested({**record["config"], **run["config"]})["eval"])
        first = next((row[knn] for row in run["curve"] if knn in row), None)
        shown = [
            "" if n is None else f"{n:.3f}" if abs(n) < 1 else f"{n:.1f}"
            for n in (first, *map(run["summary"].get, columns))
        ]
        lines.append(f"| `{' '.join(differs) or 'as all'}` | {run['seed']} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="+", type=expanded, help="run directories; with --merge: records; with --table: one record"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--merge", action="store_true", help="merge records into one")
    kind.add_argument("--table", action="store_true", help="print a record as a Markdown table")
    parser.add_argument("--into", type=expanded, help="write the record to this file instead of the standard output")
    arguments = parser.parse_args()
    with errors.shown():
        if arguments.table:
            print(table(pack(read(arguments.paths[0]))))
            return
        if arguments.merge:
            runs, messages = merge(map(read, arguments.paths))
            for line in messages:
                print(f"caco: {line}", file=sys.stderr)
            record = pack(runs)
        else:
            record = gather(path for path in arguments.paths if not path.is_file())
    if arguments.into:
        write_json(arguments.into, record)
    else:
        json.dump(record, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
