"""`python -m caco.train` and `caco-train`: compose and check the configuration, open the run's directory, train.

Everything that can be refused without torch is refused before torch is imported.
"""

import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser  # private, but hydra.main reads the command line with this parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig

from caco import errors, metrics
from caco.checking import check, check_command, is_launched, refuse_shared_directories, say_what_is_missing
from caco.config import composition, continued, folders, refusals
from caco.engine.preemption import Stop, Stopped, leave
from caco.errors import SweepFailed, UserError
from caco.installed import is_installed, to_install, version
from caco.launch import labels
from caco.runs import directory
from caco.runs.identity import flat
from caco.runs.paths import as_typed, with_home
from caco.saying import amount, doing
from caco.tracking import comparison, recorded

# run directory -> flat configuration, of the runs that this process has trained, such as the jobs of a sweep.
_trained: dict[Path, dict[str, Any]] = {}


EVALUATION_FAILED = 3  # exit code of a run that reached its end but lacks an evaluation


def run(cfg: DictConfig, run_dir: Path) -> float | None:
    """Train a checked configuration in run_dir, which this process holds. Returns what a search maximises."""
    try:
        with Stop() as stop:
            with doing("loading PyTorch"):
                from caco.engine.training import run_training  # not at the top of the file, because it imports torch

            summary = run_training(cfg, run_dir, stop=stop, label=labels.label(HydraConfig.get()))
    except Stopped as stopped:
        if directory.is_first_rank():
            directory.record_stop(run_dir, str(stopped))
        leave(stopped, is_first_rank=directory.is_first_rank())
    # In a sweep the other runs must go on, so the process may not exit here.
    if metrics.missing_at_the_end(summary) and HydraConfig.get().mode != RunMode.MULTIRUN:
        sys.exit(EVALUATION_FAILED)
    return metrics.objective(summary, cfg.eval)


def job(cfg: DictConfig) -> float | None:
    """One run, called by Hydra with the composed configuration. Returns what a search maximises."""
    hydra_cfg = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    opened = False
    is_new = not (run_dir / "config.yaml").exists()
    try:
        check(cfg, hydra_cfg)
        say_what_is_missing(cfg, hydra_cfg, run_dir)
        if hydra_cfg.mode == RunMode.MULTIRUN:  # checked again, because values drawn by a search were not known before
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
            pass  # the run was refused before it wrote any result
        elif opened:  # otherwise the directory belongs to another process
            directory.record_failure(run_dir, errors.message(error) if for_user else traceback.format_exc())
        if not for_user:
            raise
        errors.show(error)
        if hydra_cfg.mode == RunMode.MULTIRUN:
            raise  # Hydra goes on with the sweep's other runs
        sys.exit(2)


def offer_launcher() -> None:
    """Register the launcher of caco/launch/sweep.py with Hydra, which does not find it in an editable install.

    Raises:
        UserError: submitit is not installed.
    """
    if not is_installed("submitit"):
        raise UserError(f"launcher: needs submitit, which is not installed{to_install('slurm')}")
    from hydra_plugins.caco_launcher import SubmititLauncher

    Plugins.instance().register(SubmititLauncher)


def name_sweep(overrides: list[str], num_jobs: int) -> None:
    """Tell the jobs of a sweep, through an environment variable, to which sweep they belong; a single job is no
    sweep.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    if varied := [item.get_key_element() for item in parsed if item.is_sweep_override()]:
        os.environ[labels.SWEEP] = labels.sweep_label(overrides, varied, num_jobs)


def show_sweep(folders: list[Path]) -> None:
    """Print the runs of a sweep side by side, whatever became of each; nothing if the sweep was refused before its
    first run.
    """
    runs = comparison.outlines(dict.fromkeys(folders), recorded.outline)
    if runs:
        print(
            comparison.table(
                runs,
                title=(
                    f"The {amount(len(runs), 'run')} of this sweep; for this table with more options: python -m"
                    f" caco.results {shlex.quote(as_typed(runs[0].run_dir.parent))}"
                ),
            )
        )


HELP = """\
caco: pre-train with cooperative-adversarial contrastive learning.

  python -m caco.train preset=demo                  learn from real images in minutes, no download
  python -m caco.train data.root=/path/to/imagenet  the paper's recipe: ResNet-50, 8M bank, batch 1024, 200 epochs
  python -m caco.train bank=12M batch=4096          the last row of Table VI
  python -m caco.train -m bank=4M,8M seed=0,1,2     a sweep of six runs

The same command again resumes its run. `--cfg job` prints every setting with its value and starts nothing. Settings are
given as key=value: batch=256, epochs=100, seed=1, bank.size=4096, optimizer.lr=0.1. `--config-dir DIR` adds your own
options and components (docs/own.md), `--hydra-help` lists Hydra's own flags. docs/options.md describes each group,
docs/glossary.md the words, docs/how_to.md how to do common things; `make docs` builds a web site from these pages.

Groups, chosen by group=option:

{groups}
"""


@errors.shown(interrupted="the same command goes on from the last checkpoint")
def main() -> None:
    """The console script: Hydra's command line, with refusals in plain words and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises errors instead of printing them in its own way
    if "--version" in sys.argv[1:]:  # otherwise Hydra would print its own version
        print(f"caco {version()}")
        return
    sys.argv[1:] = with_home(sys.argv[1:])  # in place, because Hydra reads sys.argv again
    args = get_args_parser().parse_args(folders.take(sys.argv[1:]))
    starts = not (args.hydra_help or args.cfg or args.info or args.shell_completion)
    elsewhere = args.config_name or args.config_path or args.experimental_rerun
    refusals.refuse_unwritable(args.overrides)  # even if the configuration is only shown
    of_sweep: list[Path] | None = None  # the directories of a sweep that has begun
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
            sys.argv += checked.derived  # Hydra reads these words
        if launched:
            if elsewhere:
                raise UserError("launcher: jobs compose the root conf/config.yaml; use launcher=none, or no other root")
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
            show_sweep(of_sweep or list(_trained))  # for a search, of_sweep is empty and _trained has its runs


if __name__ == "__main__":
    # Not main() of this module, which is called __main__: a job that a launcher pickles must belong to caco.train.
    from caco.train import main as importable_main

    importable_main()
