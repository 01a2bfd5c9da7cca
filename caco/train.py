"""`python -m caco.train` and `caco-train`: compose, check, open the run's directory, train.

Everything that can be refused without torch is refused before torch is imported.
"""

import functools
import itertools
import os
import shlex
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra._internal.utils import (
    get_args_parser,
)  # private, but the one that hydra.main reads the same command line with
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from caco import errors, metrics
from caco.config import composition, continued, folders, refusals, signatures, validation
from caco.engine import fitting
from caco.engine.preemption import Stop, Stopped, leave
from caco.errors import SweepFailed, UserError
from caco.installed import command_to_install, is_installed, version
from caco.launch import labels
from caco.runs import directory
from caco.runs.identity import flat, key_of
from caco.runs.paths import require_writable, with_home
from caco.saying import doing
from caco.tracking import comparison, recorded

_trained: dict[
    Path, dict[str, Any]
] = {}  # by this process, one job of a sweep after the other: what is in each directory


EVALUATION_FAILED = 3  # the exit code of a run that came to its end and lacks an evaluation


def run(cfg: DictConfig, run_dir: Path) -> float | None:
    """Train in run_dir, which is ours, what cfg says, which is checked."""
    try:
        with Stop() as stop:
            with doing("loading PyTorch"):
                from caco.engine.assembly import run_training  # here and not above: it imports torch

            summary = run_training(cfg, run_dir, stop=stop, label=labels.label(HydraConfig.get()))
    except Stopped as stopped:
        leave(stopped, is_first_rank=directory.is_first_rank())
    if metrics.missing_at_the_end(summary) and HydraConfig.get().mode != RunMode.MULTIRUN:  # whose other runs go on
        sys.exit(EVALUATION_FAILED)
    return metrics.objective(summary, cfg.eval)


def job(cfg: DictConfig) -> float | None:
    """One run: what Hydra calls with the composed configuration. Returns what a search maximises."""
    hydra_cfg = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    opened = False
    is_new = not (run_dir / "config.yaml").exists()
    try:
        check(cfg, hydra_cfg)
        say_what_is_missing(cfg, hydra_cfg, run_dir)
        if hydra_cfg.mode == RunMode.MULTIRUN:  # again: what a search draws was not known before
            before, leaves = _trained.setdefault(run_dir, flat(cfg)), flat(cfg)
            if leaves != before:
                refuse_shared_directories([(run_dir, before), (run_dir, leaves)])
        if directory.is_first_rank():
            directory.open_run(run_dir, cfg, folders.record())
        opened = True
        return run(cfg, run_dir)
    except Exception as error:
        for_user = errors.is_for_user(error)
        if opened and for_user and is_new and hydra_cfg.mode != RunMode.MULTIRUN and directory.discard(run_dir):
            pass  # it was refused before anything came of it
        elif opened:  # else it is another process's
            directory.record_failure(run_dir, errors.message(error) if for_user else traceback.format_exc())
        if not for_user:
            raise
        errors.show(error)
        if hydra_cfg.mode == RunMode.MULTIRUN:
            raise  # the sweep's other runs go on
        sys.exit(2)


def check(cfg: DictConfig, hydra_cfg: HydraConf) -> None:
    """Refuse what cannot be run, as validation.check does."""
    overrides = list(hydra_cfg.overrides.task)
    validation.check(cfg, overrides=overrides, choices={**continued.choices(), **hydra_cfg.runtime.choices})


def say_what_is_missing(cfg: DictConfig, hydra_cfg: HydraConf, run_dir: Path) -> None:
    """Say it where MLflow is missing but was not asked for."""
    # Runs of one sweep, or of one table, lie side by side and go to MLflow together: one sentence for all of them.
    together = Path(hydra_cfg.sweep.dir).absolute()
    say_if_mlflow_is_missing(
        cfg, list(hydra_cfg.overrides.task), together if together in run_dir.absolute().parents else run_dir
    )


def say_if_mlflow_is_missing(cfg: DictConfig, overrides: list[str], folder: Path) -> None:
    """That the ledger does instead of MLflow, unless the command line chooses the tracking itself.

    Args:
        folder: the run's directory, or one that holds it.
    """
    named = any(item.lstrip("+~").partition("=")[0] == "tracking" for item in overrides)
    falls_back = not is_installed("mlflow") and signatures.declared(cfg.tracking._target_, "package") is None
    if falls_back and not named and directory.is_first_rank():
        say_once(
            f"MLflow is not installed: the ledger keeps everything, and `python -m caco.tracking.sync {_shown(folder)}`"
            f" sends it later, once MLflow is there ({command_to_install('mlflow')})"
        )


@functools.cache
def say_once(message: str) -> None:
    print(f"caco: {message}", file=sys.stderr)


def _shown(folder: Path) -> str:
    current = Path.cwd()
    return shlex.quote(str(folder.relative_to(current) if folder.is_relative_to(current) else folder))


def jobs(overrides: list[str], *, multirun: bool) -> list[list[str]]:
    """The command line of each job of a sweep; of a single run, its own.

    What only a search (Optuna) draws is not known yet: then none, and each job checks itself as it starts.
    """
    if not multirun:
        return [overrides]
    with initialize_config_dir(str(composition.CONF), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides(overrides)
        if any(item.is_sweep_override() and not item.is_discrete_sweep() for item in parsed):
            return []
        choices = {}  # of a key that is given twice the last ones, as in Hydra
        for item in parsed:
            key = item.get_key_element()
            values = item.sweep_string_iterator() if item.is_sweep_override() else [item.get_value_element_as_str()]
            choices[key] = [f"{key}={value}" for value in values]
        return [list(job) for job in itertools.product(*choices.values())]


def is_launched(overrides: list[str]) -> bool:
    """Whether the jobs run elsewhere: launcher=slurm, launcher=local."""
    chosen = [item.partition("=")[2] for item in overrides if item.startswith("launcher=")]
    return bool(chosen) and chosen[-1] != "none"


def offer_launcher() -> None:
    """Tell Hydra of caco/launch/sweep.py, which it does not find in an editable install.

    Raises:
        UserError: submitit is not installed.
    """
    if not is_installed("submitit"):
        raise UserError(f"launcher: needs submitit, which is not installed; {command_to_install('slurm')}")
    from hydra_plugins.caco_launcher import SubmititLauncher

    Plugins.instance().register(SubmititLauncher)


@dataclass
class Checked:
    """A command line that can be run.

    unfinished: how many of its jobs are not done already. folders: the directory of each; of a search, which draws its
    jobs later, none. derived: the overrides that were made to fit, `derived`, which records that, among them.
    """

    unfinished: int = 0
    folders: list[Path] = field(default_factory=list)
    derived: list[str] = field(default_factory=list)


def check_command(overrides: list[str], *, multirun: bool, look: bool = False) -> Checked:
    """Compose and check every job before the first one starts or a directory is made.

    Args:
        look: at the images, too, where these lie in folders. Those of jobs that run elsewhere may lie there alone.
    Raises:
        UserError: one line per problem, of all of them.
    """
    refusals.refuse_unwritable(overrides)
    root = continued.root(overrides)
    checked, problems = Checked(), list[str]()
    placed: list[tuple[Path, dict[str, Any]]] = []
    derivations: list[list[str]] = []
    images = fitting.remembered(look)
    try:
        for number, job_overrides in enumerate(jobs(overrides, multirun=multirun)):
            cfg, words = compose_what_can_be(job_overrides, root, problems)
            if cfg is None:
                continue
            with open_dict(cfg.hydra.job):
                cfg.hydra.job.num = number  # a directory may be named by it; Hydra counts in the same order
            before = len(problems)
            try:
                check(cfg, cfg.hydra)
            except UserError as error:
                problems += str(error).splitlines()
            # Of images whose folder was not understood nothing is known, and "got none" would be untrue.
            lost = any(key_of(item).partition(".")[0] == "data" for item in set(job_overrides) - set(words))
            derived = fitting.overrides_that_fit(
                cfg,
                words,
                problems,
                fitting.remembered(False) if lost else images,
                recorded=root != "config",
                is_sound=before == len(problems),
            )
            derivations.append(derived)
            if derived:
                cfg = composition.compose([*words, *derived], root)
                with open_dict(cfg.hydra.job):
                    cfg.hydra.job.num = number
            if not problems:
                run_dir = run_directory(cfg, multirun)
                say_what_is_missing(cfg, cfg.hydra, run_dir)
                require_writable(run_dir, "hydra.sweep.dir" if multirun else "hydra.run.dir")
                checked.unfinished += not (run_dir / "summary.json").exists()
                placed.append((run_dir, flat(cfg)))
    except (*refusals.COMPOSITION_ERRORS, ValueError) as error:  # Hydra raises ValueErrors, too
        if isinstance(error, UserError):
            raise
        raise UserError(refusals.explain(error, overrides, root)) from error
    if any(derived != derivations[0] for derived in derivations):
        every = sorted(
            set(itertools.chain(*derivations))
            - {item for item in itertools.chain(*derivations) if item.startswith("derived=")}
        )
        problems.append(
            f"the jobs of this sweep would need different values of what nobody gave: {', '.join(every)}; give them, or"
            " a command for each"
        )
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    checked.folders, checked.derived = [folder for folder, _ in placed], derivations[0] if derivations else []
    if multirun:
        refuse_shared_directories(placed)
    return checked


def run_directory(cfg: DictConfig, multirun: bool) -> Path:
    return Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir if multirun else Path(cfg.hydra.run.dir)


def compose_what_can_be(overrides: list[str], root: str, problems: list[str]) -> tuple[DictConfig | None, list[str]]:
    """The configuration of those overrides that compose, and these; what is wrong with each other one is added to the
    problems.
    """
    words = list(overrides)
    while True:
        try:
            return composition.compose(words, root), words
        except (*refusals.COMPOSITION_ERRORS, ValueError) as error:
            said = str(error) if isinstance(error, UserError) else refusals.explain(error, words, root)
            problems.append(said)
            wrong = refusals.culprit(said, words)
            if wrong is None:
                return None, words
            words.remove(wrong)


def refuse_shared_directories(placed: list[tuple[Path, dict[str, Any]]]) -> None:
    """Of a sweep's jobs, the directory and the flat configuration of each: the second one that writes into a directory
    would be refused, or taken for done already, and its numbers would be those of the first.

    Raises:
        UserError: names the directory, in what the jobs differ, and what gives each its own.
    """
    together: dict[Path, list[dict[str, Any]]] = {}
    for folder, leaves in placed:
        together.setdefault(folder, []).append(leaves)
    for folder, those in together.items():
        if len(those) == 1:
            continue
        differ = sorted(key for key in set().union(*those) if len({repr(leaves.get(key)) for leaves in those}) > 1)
        if not differ:
            raise UserError(f"{len(those)} jobs of this sweep are the same run, {_shown(folder)}: name each value once")
        # A path's slashes would make folders of their own.
        words = [f"${{{key}}}" for key in differ if all("/" not in str(leaves.get(key)) for leaves in those)]
        own = "-".join(words) if len(words) == len(differ) else "${hydra.job.num}"
        raise UserError(
            f"{len(those)} jobs of this sweep have one directory, {_shown(folder)}: they differ in {', '.join(differ)}"
            " alone, which is no part of what makes a run itself, so only the first would be trained. Leave that out"
            f" of the sweep, or give each a directory of its own: hydra.sweep.subdir='${{run_name:}}-{own}'"
        )


def name_sweep(overrides: list[str], num_jobs: int) -> None:
    """Tell the jobs of a sweep, through their environment, which one they are of; one job alone is no sweep."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    if varied := [item.get_key_element() for item in parsed if item.is_sweep_override()]:
        os.environ[labels.SWEEP] = labels.sweep_label(overrides, varied, num_jobs)


def show_sweep(folders: list[Path]) -> None:
    """The runs of a sweep side by side, whatever became of each; nothing of one that was refused before its first
    run.
    """
    runs = comparison.outlines(dict.fromkeys(folders), recorded.outline)
    if runs:
        print(
            comparison.table(
                runs,
                title=(
                    f"The {len(runs)} runs of this sweep; again, with more to choose: python -m caco.results"
                    f" {_shown(runs[0].run_dir.parent)}"
                ),
            )
        )


HELP = """\
caco: pre-train with cooperative-adversarial contrastive learning.

  python -m caco.train preset=demo                  learn from real images in minutes, no download
  python -m caco.train data.root=/path/to/imagenet  the paper's recipe: ResNet-50, 8M bank, batch 1024, 200 epochs
  python -m caco.train bank=12M batch=4096          the last row of Table VI
  python -m caco.train -m bank=4M,8M seed=0,1,2     a sweep of six runs

The same command again resumes its run. `--cfg job` prints every setting with its value and starts nothing; each is
set by key=value, as batch=256, epochs=100, seed=1, bank.size=4096, optimizer.lr=0.1. `--config-dir DIR` adds options
and components of your own (docs/own.md), `--hydra-help` lists Hydra's own flags. docs/options.md says what each group
is, docs/glossary.md what the words mean, docs/how_to.md how to do what is often asked; `make docs` makes a site of it.

Groups, chosen by group=option:

{groups}
"""


@errors.shown(interrupted="the same command goes on from the last checkpoint")
def main() -> None:
    """The console script: Hydra's command line, with refusals in plain words and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing them its own way
    if "--version" in sys.argv[1:]:  # of which Hydra would give its own
        print(f"caco {version()}")
        return
    sys.argv[1:] = with_home(sys.argv[1:])  # which Hydra reads again
    args = get_args_parser().parse_args(folders.take(sys.argv[1:]))
    starts = not (args.hydra_help or args.cfg or args.info or args.shell_completion)
    elsewhere = args.config_name or args.config_path or args.experimental_rerun
    refusals.refuse_unwritable(args.overrides)  # also where the configuration is but shown
    of_sweep: list[Path] | None = None  # the runs of one that has begun
    try:
        if args.help:
            print(HELP.format(groups=folders.listed()), end="")
            return
        launched = is_launched(args.overrides)
        if starts and not elsewhere:
            checked = check_command(args.overrides, multirun=args.multirun or launched, look=not launched)
            if args.multirun or launched:
                of_sweep = checked.folders
                name_sweep(args.overrides, checked.unfinished)
            sys.argv += checked.derived  # which Hydra reads
        if launched:
            if elsewhere:
                raise UserError(
                    "launcher: a job composes the root conf/config.yaml; take launcher=none or no other root"
                )
            offer_launcher()
        root = "config" if elsewhere else continued.root(args.overrides)
        hydra.main(config_path=str(composition.CONF), config_name=root, version_base="1.3")(job)()
    except refusals.COMPOSITION_ERRORS as error:
        if starts and not elsewhere:
            raise
        raise UserError(refusals.explain(error, args.overrides)) from error
    except SweepFailed as error:
        errors.show(error)
        sys.exit(1)
    finally:
        if of_sweep is not None and directory.is_first_rank():
            show_sweep(of_sweep or list(_trained))  # a search draws its runs one after the other


if __name__ == "__main__":
    # Not main() as it stands here: a job that a launcher pickles must belong to caco.train, not to __main__.
    from caco.train import main as importable_main

    importable_main()
