"""Gather finished runs into one record: what was run, on what, and what came out.

    python experiments/record.py runs/study/* > experiments/records/NAME.json
    python experiments/record.py --table experiments/records/NAME.json

A record holds each run's command line, configuration (what differs, and the hash), seed, data, hardware, versions, final
metrics, and its curve: the ledger's rows of kind epoch and eval.
"""

import argparse
import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

from caco.runs import identity, run_hash
from caco.tracking.ledger import read_rows

MACHINE = ("cpu", "cores", "memory_gib", "gpu", "python", "torch", "torchvision", "timm", "git_sha", "git_dirty")


def gather(run_dirs: list[Path]) -> dict:
    """The record of finished runs.

    Raises:
        ValueError: a directory holds no finished run.
    """
    runs = []
    for run_dir in run_dirs:
        if not (run_dir / "summary.json").is_file():
            raise ValueError(f"expected a finished run, with summary.json, in {run_dir}; start its command again to finish it")
        environment = json.loads((run_dir / "environment.json").read_text())
        cfg = OmegaConf.load(run_dir / "config.yaml")
        rows, _ = read_rows(run_dir / "ledger.jsonl")
        runs.append(
            {
                "name": run_dir.name,
                "command": environment["command"],
                "config_hash": run_hash(cfg),
                "seed": cfg.seed,
                "config": identity(cfg),
                "environment": {k: v for k, v in environment.items() if k in MACHINE},
                "summary": json.loads((run_dir / "summary.json").read_text()),
                "curve": [
                    {k: v for k, v in row.items() if k != "time"} for row in rows if row["kind"] in ("epoch", "eval")
                ],
            }
        )
    shared = {k: v for k, v in runs[0]["config"].items() if all(run["config"].get(k, ()) == v for run in runs)}
    for run in runs:
        run["config"] = {k: v for k, v in run["config"].items() if k not in shared}
    machine = {k: v for k, v in runs[0]["environment"].items() if all(run["environment"].get(k) == v for run in runs)}
    for run in runs:
        run["environment"] = {k: v for k, v in run["environment"].items() if k not in machine}
    return {"config": shared, "environment": machine, "runs": runs}


def table(record: dict) -> str:
    """A Markdown table: a line a run."""
    columns = ["knn_top1", "probe_top1", "loss", "max_probability", "bank/rows_used", "bank/near_duplicates", "bank/row_norm_mean"]
    words = [run["command"].split()[3:] for run in record["runs"]]
    everywhere = set.intersection(*map(set, words)) if len(words) > 1 else set()
    lines = ["| what differs | seed | k-NN before | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    for run, overrides in zip(record["runs"], words, strict=True):
        differs = [word for word in overrides if word not in everywhere and not word.startswith("seed=")]
        first = next((row["knn_top1"] for row in run["curve"] if "knn_top1" in row), None)
        numbers = [first, *(run["summary"].get(name) for name in columns)]
        shown = ["" if n is None else f"{n:.3f}" if abs(n) < 1 else f"{n:.1f}" for n in numbers]
        lines.append(f"| `{' '.join(differs) or 'as all'}` | {run['seed']} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories; with --table, one record")
    parser.add_argument("--table", action="store_true", help="print a record as a Markdown table")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.runs[0].read_text())))
    else:
        json.dump(gather(arguments.runs), sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
