"""Run the cases with one commit's code in child processes (experiments/compare/worker.py). The cases with the same
number of ranks share their processes, because importing torch takes seconds.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from experiments.compare.cases import Case, cut_settings, translated
from experiments.compare.trees import Side

WORKER = Path(__file__).resolve().with_name("worker.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(tree: Path) -> dict[str, str]:
    """The environment of a child process: the commit's code comes first on the path, one thread is used, and variables
    are removed that would make the child part of a SLURM job, a torchrun group or a sweep.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_")) and k != "CACO_SWEEP"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        kept.pop(name, None)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return kept | threads | {"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}


def run_side(
    side: Side, cases: list[Case], folder: Path, steps: int, stop: threading.Event
) -> dict[str, dict[str, Any]]:
    """Run all cases with one commit; returns {case name: {"error": message or None, "cpu_seconds": ...}}.

    Each case's run directory is `folder`/NUMBER/run.
    """
    folder.mkdir(parents=True)
    folders = {case.name: folder / f"{number:02}" for number, case in enumerate(cases)}
    outcomes: dict[str, dict[str, Any]] = {}
    for ranks in sorted({case.ranks for case in cases}):
        todo = [case for case in cases if case.ranks == ranks]
        while todo:  # if a process crashes, start again with the cases after the one that crashed
            codes = run_children(side, todo, folders, folder / "job.json", ranks, steps, stop)
            if stop.is_set():
                return outcomes
            for case in list(todo):
                found = [folders[case.name] / f"outcome-{rank}.json" for rank in range(ranks)]
                if not all(path.is_file() for path in found):
                    outcomes[case.name] = {"error": f"the process ended with {codes}", "cpu_seconds": 0.0}
                    todo = todo[todo.index(case) + 1 :]
                    break
                outcome_of_rank = [json.loads(path.read_text()) for path in found]
                errors = [outcome["error"] for outcome in outcome_of_rank if outcome["error"]]
                outcomes[case.name] = {**outcome_of_rank[0], "error": errors[0] if errors else None}
            else:
                todo = []
    return outcomes


def run_children(
    side: Side, cases: list[Case], folders: dict[str, Path], job: Path, ranks: int, steps: int, stop: threading.Event
) -> list[int]:
    """Start one process per rank, each of which runs all cases; wait for their end and return their exit codes."""
    content = [
        {
            "name": case.name,
            "overrides": translated([*case.overrides, *cut_settings(case, steps)], side.changes),
            "folder": str(folders[case.name].resolve()),
            "cut_at": steps // 2 if case.cut else None,
            "port": free_port(),
        }
        for case in cases
    ]
    job.write_text(json.dumps({"side": side.label, "tree": str(side.tree.resolve()), "cases": content}))
    command = [sys.executable, "-P", str(WORKER), str(job.resolve())]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"} if ranks > 1 else {}
    children = []
    try:
        for rank in range(ranks):
            of_rank = group | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            # With its own session a child does not receive Ctrl-C; this process does, and then kills the children.
            child = subprocess.Popen(
                command, env=environment(side.tree) | of_rank, cwd=job.parent, start_new_session=True
            )
            children.append(child)
        while any(child.poll() is None for child in children) and not stop.is_set():
            if any(child.poll() for child in children):  # one died, so the others would wait for it for ever
                time.sleep(2)
                break
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [child.returncode for child in children]
