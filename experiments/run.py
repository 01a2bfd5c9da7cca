"""`python -m experiments.run table7 scale=mini`: train and evaluate all runs that a table needs, at a scale.

Runs that are finished, in this folder or in a committed record, are skipped; interrupted runs continue from their
checkpoint; failed runs are repeated only with --retry. Run directories are in runs/SCALE/, and runs/SCALE/record.json
collects the results so far. Send that file to others, and merge theirs with
`python -m experiments.record --merge MINE THEIRS --into FILE`.
"""

import argparse
import importlib.util
import inspect
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from caco import checking, errors, metrics, train
from caco.config import composition, folders
from caco.config.refusals import nearest
from caco.errors import SweepFailed, UserError
from caco.launch.jobs import Job
from caco.runs.files import last_line, read_json, write_json
from caco.runs.paths import expanded
from caco.saying import amount, clock
from experiments import record
from experiments.tables import HERE, Experiment, experiments, load_scale, load_table, scales, tables

RECORDS = HERE / "records"
OWN_KEYS = ("scale", "seed", "rows")
# Refused on the command line. `weights` and `bank_learning` can change results, although a run's identity does not
# list them (it lists the settings that they resolve to); `hydra` and `name` are set by this command.
NOT_PASSED_ON = ("weights", "bank_learning", "hydra", "name")


@dataclass(frozen=True)
class Run:
    """One row of a table with one seed, and its directory."""

    experiment: Experiment
    seed: int
    recorded: bool

    @property
    def name(self) -> str:
        return f"{self.experiment.name} seed {self.seed}"

    @cached_property
    def directory(self) -> Path:
        """runs/SCALE/...-HASH. A directory that another table's row made for the same hash is used as it is."""
        folder, hash = Path("runs") / self.experiment.scale.id, self.experiment.hash(self.seed)
        made = sorted(folder.glob(f"*-{hash}"))
        return made[0] if made else folder / f"{self.experiment.name.replace('/', '-')}-seed{self.seed}-{hash}"

    @property
    def state(self) -> str:
        """One of "recorded", "done", "failed", "begun" and "to do"."""
        if (self.directory / "summary.json").exists():
            return "done"
        if self.recorded:
            return "recorded"
        if (self.directory / "failure.txt").exists():
            return "failed"
        return "begun" if any(self.directory.glob("checkpoints/step_*.pt")) else "to do"

    @property
    def overrides(self) -> list[str]:
        return [*self.experiment.overrides(self.seed), f"hydra.run.dir={self.directory}"]

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", "caco.train", *folders.flag(), *self.overrides])

    def label(self) -> None:
        """Create the directory and record the run's table row there, unless it was started for another row."""
        path = self.directory / record.LABEL
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            table, row, scale = self.experiment.table.id, self.experiment.row_id, self.experiment.scale.id
            write_json(path, {"table": table, "row": row, "scale": scale})


def runs_of(chosen: Sequence[Experiment], seeds: Sequence[int] | None, *, here: bool = False) -> list[Run]:
    """The runs that these rows need, each once: all rows of the first seed first, so that a table is complete early.

    Args:
        here: ignore the results in experiments/records, so that runs recorded there are trained again.
    """
    records = [] if here else sorted(RECORDS.glob("*.json"))
    recorded = {run["config_hash"] for path in records for run in record.read(path)}
    # Directories made by an earlier version of caco carry an older hash; record.read translates it to today's.
    scale_dir = Path("runs") / chosen[0].scale.id
    known = record.read(scale_dir / "record.json") if (scale_dir / "record.json").is_file() else []
    recorded |= {run["config_hash"] for run in known if (scale_dir / run["name"] / "summary.json").is_file()}
    runs: dict[str, Run] = {}
    for seed in sorted({seed for experiment in chosen for seed in seeds or experiment.seeds}):
        for experiment in chosen:
            if seed in (seeds or experiment.seeds):
                hash = experiment.hash(seed)
                runs.setdefault(hash, Run(experiment, seed, hash in recorded))
    return list(runs.values())


def estimate(experiment: Experiment, *, world: int) -> str:
    """A line with the cost of a run as caco.plan estimates it, or with the reason why there is no estimate.

    Args:
        world: the number of processes that would share the run.
    """
    if importlib.util.find_spec("caco.plan") is None:
        return "no estimate"
    from caco.plan import plan

    try:
        cost: dict[str, Any] = plan(experiment.cfg, world=world)
    except UserError as error:
        return f"no estimate: {error}"
    return (
        f"estimate: {amount(round(cost['steps']), 'step')}, {cost['flops_per_step'] * cost['steps']:.2g} operations, "
        f"{cost['device_bytes'] / 2**30:.2g} GiB a device, {cost['run_hours']:.2g} h on {world} of an assumed "
        f"{inspect.signature(plan).parameters['tflops'].default:g} TFLOP/s"
    )


def train_here(runs: Sequence[Run]) -> list[Run]:
    """Train the runs one after another in this process; return those that did not finish."""
    unfinished = []
    for number, run in enumerate(runs, start=1):
        say(f"{run.name}, run {number} of {len(runs)}, in {run.directory}")
        run.label()
        started = time.monotonic()
        code = _train(run.overrides)
        if code in (130, 143):  # Ctrl-C or SIGTERM: the run has saved itself, and no other run must start
            sys.exit(code)
        if code == 0:
            summary = read_json(run.directory / "summary.json")
            result = metrics.objective(summary, run.experiment.cfg.eval)
            shown = f": {result:.2f}" if result is not None else ""
            say(f"{run.name} is done in {clock(time.monotonic() - started)}{shown}")
            write_record(run.experiment.scale.id)
        else:
            unfinished.append(run)
    return unfinished


def _train(overrides: list[str]) -> int | str | None:
    """Run caco.train as if typed with these overrides, and return its exit code; any other exception gives 1."""
    before = sys.argv
    sys.argv = [train.__file__, *folders.flag(), *overrides]
    try:
        train.main()
    except SystemExit as end:
        return end.code
    except Exception:  # noqa: BLE001 - a bug in one run must not stop the others; the run's failure.txt has it, too
        traceback.print_exc()
        return 1
    finally:
        sys.argv = before
    return 0


def train_elsewhere(runs: Sequence[Run], words: Sequence[str]) -> list[Run]:
    """Train the runs as jobs of launcher=local or launcher=slurm; return those that did not finish."""
    from caco.launch.sweep import follow

    launcher = build_launcher(runs[0].experiment, words)
    jobs = []
    for run in runs:
        launcher.check(run.experiment.cfg)
        run.label()
        jobs.append(Job(tuple(run.experiment.overrides(run.seed)), run.directory.absolute()))
    try:
        follow(launcher, jobs, (Path("runs") / runs[0].experiment.scale.id).absolute())
    except SweepFailed as error:
        say(str(error))
    return [run for run in runs if run.state != "done"]


def build_launcher(experiment: Experiment, words: Sequence[str]) -> Any:
    """The launcher that `launcher=...` and `launcher.KEY=...` choose; None if neither was given.

    Raises:
        UserError: there is no such launcher, or submitit is not installed.
    """
    if not checking.is_launched(list(words)):
        return None
    train.offer_launcher()
    overrides = [*experiment.overrides(experiment.seeds[0]), *words]
    checking.check_command(overrides, multirun=False)
    return composition.instantiate(composition.compose(overrides).launcher)


def write_record(scale: str) -> Path:
    """Write runs/SCALE/record.json, the record of all finished runs in runs/SCALE; return its path."""
    folder = Path("runs") / scale
    path = folder / "record.json"
    write_json(path, record.gather(summary.parent for summary in sorted(folder.glob("*/summary.json"))))
    return path


def say(text: str) -> None:
    print(f"caco: {text}", file=sys.stderr, flush=True)


def parse(words: Sequence[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Split the command line into settings of this command (scale, seed, rows), launcher overrides, and overrides that
    are passed on to caco.train.

    Raises:
        UserError: a word is not key=value, or is a setting that only the table and the scale may choose.
    """
    own, launcher, further = {}, [], []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word}: expected key=value{nearest(word, OWN_KEYS)}")
        root = key.lstrip("+~").partition(".")[0]
        if key in OWN_KEYS:
            own[key] = value
        elif root == "launcher":
            launcher.append(word)
        elif root in NOT_PASSED_ON:
            raise UserError(f"{word}: cannot be given here, because the table and the scale choose it")
        else:
            further.append(word)
    return own, launcher, further


def numbers(text: str) -> list[int]:
    if not all(part.isdigit() for part in text.split(",")):
        raise UserError(f"seed={text}: expected whole numbers, as seed=0,1,2")
    return [int(part) for part in text.split(",")]


def need_data(chosen: Sequence[Experiment]) -> None:
    """Check, before anything starts, that the images of every row can be found or downloaded.

    Raises:
        UserError: data.root is not given, or does not exist.
    """
    for experiment in chosen:
        data = experiment.cfg.data
        if "root" in data and (data.root is None or not (expanded(data.root).exists() or data.get("download"))):
            where = "data.root=PATH must be given" if data.root is None else f"data.root={data.root}: does not exist"
            raise UserError(f"{where}: scale {experiment.scale.id} reads {data._target_.rpartition('.')[2]}")


def show(runs: Sequence[Run], world: int) -> None:
    """Print every run's state; for those that are not done also the expected cost and the command.

    The cost is measured if another seed of the row was trained here, and else estimated for `world` processes.
    """
    costs: dict[str, str] = {}
    for run in runs:
        if run.state == "done":
            summary = read_json(run.directory / "summary.json")
            if rate := summary.get("images_per_second"):  # missing or 0 if the rate is unknown
                hours = summary["steps"] * run.experiment.cfg.batch / rate / 3600
                costs[run.experiment.name] = f"took {hours:.2g} h here with seed {run.seed}, evaluation not counted"
    for run in runs:
        print(f"# {run.name}: {run.state}")
        if run.state in ("done", "recorded"):
            continue
        if run.experiment.name not in costs:
            costs[run.experiment.name] = estimate(run.experiment, world=world)
        print(f"# {costs[run.experiment.name]}\n{run.command}")


@errors.shown()
def main() -> None:
    words = folders.take(sys.argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            f"scales: {', '.join(scales())}. They are described in experiments/scale/*.yaml, the tables in"
            " experiments/*.yaml. --config-dir DIR adds options and components of your own, and the tables and scales"
            " in DIR/experiments."
        ),
    )
    parser.add_argument("table", help=", ".join(tables()))
    parser.add_argument(
        "words",
        nargs="*",
        metavar="key=value",
        help=(
            "scale=NAME (required); seed=0,1 and rows=a,b select some of the runs; launcher=slurm, launcher.KEY=...;"
            " and any setting that cannot change a result: data.root=PATH, tracking=..., loader.num_workers=..."
        ),
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list every run's state, command and cost; start nothing"
    )
    parser.add_argument("--retry", action="store_true", help="also repeat runs that failed before")
    parser.add_argument(
        "--here", action="store_true", help="also train runs whose results are already in experiments/records"
    )
    sys.exit(_main(parser.parse_intermixed_args(words)))


def _main(arguments: argparse.Namespace) -> int:
    table = load_table(arguments.table)
    own, launcher_words, further = parse(arguments.words)
    if "scale" not in own:
        raise UserError(f"scale=NAME must be given. There are: {', '.join(scales())}")
    scale = load_scale(own["scale"])
    rows = own["rows"].split(",") if "rows" in own else None
    chosen = []
    for experiment in experiments(table, scale, rows=rows, further=further):
        if experiment.why_not is None:
            chosen.append(experiment)
        elif rows or arguments.dry_run:
            print(f"# {experiment.name}: not run: {experiment.why_not}")
    if not chosen:
        raise UserError(f"{table.id} has no row that can be run at scale {scale.id}")
    if not any(scale.metrics.get(column) for column in table.columns):
        raise UserError(
            f"{table.id}: scale {scale.id} measures nothing of it ({', '.join(table.columns)}); scale=paper does"
        )
    runs = runs_of(chosen, numbers(own["seed"]) if "seed" in own else None, here=arguments.here)
    if arguments.dry_run:
        launcher = build_launcher(chosen[0], launcher_words)
        show(runs, launcher.ranks if launcher else 1)
        return 0
    done = [run for run in runs if run.state in ("done", "recorded")]
    failed = [run for run in runs if run.state == "failed" and not arguments.retry]
    left = [run for run in runs if run not in done and run not in failed]
    recorded = sum(run.state == "recorded" for run in done)
    say(
        f"{table.id} at scale {scale.id}: {amount(len(runs), 'run')}, {len(done) - recorded} done already, {len(left)}"
        " to do" + f", {recorded} in the records of experiments/records (--here trains them here, too)" * (recorded > 0)
    )
    if left:
        if scale.toy_sets is not None and any(
            word.endswith(f".root={scale.toy_sets}") for run in left for word in run.overrides
        ):
            from experiments.toy_sets.whole import draw  # not at the top: the import loads torch

            draw(Path(scale.toy_sets))
        need_data(chosen)
        try:
            launched = checking.is_launched(launcher_words)
            unfinished = train_elsewhere(left, launcher_words) if launched else train_here(left)
        finally:
            write_record(scale.id)
        failed += unfinished
    for run in failed:
        reason = run.directory / "failure.txt"
        why = (last_line(reason) if reason.exists() else "") or "did not finish"
        say(f"{run.name} has failed: {why}\n  {run.directory}; the same command with --retry tries it again")
    number = table.id.removeprefix("table")
    words = shlex.join([number if number.isdigit() else table.id, "--scale", scale.id, *folders.flag()])
    say(f"{len(runs) - len(failed)} of {len(runs)} done; python -m analysis.table {words} shows them")
    return 1 if failed else 0


if __name__ == "__main__":
    main()
