"""Checks a command line before the first of its jobs starts: everything that can be refused without torch."""

import functools
import itertools
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from omegaconf import DictConfig, open_dict

from caco.config import composition, continued, refusals, signatures, validation
from caco.engine import fitting
from caco.errors import UserError
from caco.installed import command_to_install, is_installed
from caco.runs import directory
from caco.runs.identity import flat, key_of
from caco.runs.paths import as_typed, require_writable


@dataclass
class Checked:
    """What `check_command` found out about a command line that can be run.

    unfinished: number of its jobs that are not finished already. folders: the directory of each job; empty for a
    search, which draws its jobs later. derived: the overrides for values that were derived (caco/engine/fitting.py),
    including the override of `derived`, which records their names.
    """

    unfinished: int = 0
    folders: list[Path] = field(default_factory=list)
    derived: list[str] = field(default_factory=list)


def check_command(overrides: list[str], *, multirun: bool, look: bool = False) -> Checked:
    """Compose and check every job before the first one starts or a directory is made.

    Args:
        look: whether to look at the images in folders too. If jobs run elsewhere, the images may exist only there.
    Raises:
        UserError: one line for each problem of all jobs.
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
                cfg.hydra.job.num = number  # a directory's name may contain it; Hydra counts in the same order
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
    except (*refusals.COMPOSITION_ERRORS, ValueError) as error:  # Hydra raises ValueError too
        if isinstance(error, UserError):
            raise
        raise UserError(refusals.explain(error, overrides, root)) from error
    if multirun and not derivations and not problems:
        problems = problems_of_search(overrides, root)
    if any(derived != derivations[0] for derived in derivations):
        every = sorted(
            set(itertools.chain(*derivations))
            - {item for item in itertools.chain(*derivations) if item.startswith("derived=")}
        )
        problems.append(
            f"the jobs of this sweep would need different values of settings that are not set: {', '.join(every)}; set"
            " them, or start a command for each job"
        )
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    checked.folders, checked.derived = [folder for folder, _ in placed], derivations[0] if derivations else []
    if multirun:
        refuse_shared_directories(placed)
    return checked


def jobs(overrides: list[str], *, multirun: bool) -> list[list[str]]:
    """The command line of each job of a sweep; for a single run, its own.

    The values that a search (Optuna) draws are not known yet. The result is then empty, and each job checks itself when
    it starts.

    Raises:
        UserError: a key=glob(...) matches no option, so that there is no job.
    """
    if not multirun:
        return [overrides]
    with initialize_config_dir(str(composition.CONF), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides(overrides)
        if any(isinstance(item.value(), IntervalSweep) for item in parsed):
            return []
        choices = {}  # if a key is given twice, the last one counts, as in Hydra
        for item in parsed:
            key = item.get_key_element()
            values = item.sweep_string_iterator() if item.is_sweep_override() else [item.get_value_element_as_str()]
            choices[key] = [f"{key}={value}" for value in values]
            if not choices[key]:
                raise UserError(
                    f"{item.input_line}: expected a pattern that some options of a group match, such as"
                    " method=glob(moco*), got one that nothing matches; the sweep would have no job"
                )
        return [list(job) for job in itertools.product(*choices.values())]


def is_launched(overrides: list[str]) -> bool:
    """Whether a launcher runs the jobs in other processes: launcher=slurm or launcher=local."""
    chosen = [item.partition("=")[2] for item in overrides if item.startswith("launcher=")]
    return bool(chosen) and chosen[-1] != "none"


def problems_of_search(overrides: list[str], root: str) -> list[str]:
    """What is wrong with the command line of a search before any value is drawn, each in a line: what cannot be
    composed with the first value of each interval, and a sweeper that draws none.
    """
    words, drawn = [], []
    for item in OverridesParser.create().parse_overrides(overrides):
        word, value = str(item.input_line), item.value()
        if isinstance(value, IntervalSweep):
            drawn.append(word)
            word = f"{item.get_key_element()}={value.start}"
        words.append(word)
    problems: list[str] = []
    cfg, _ = compose_what_can_be(words, root, problems)
    if cfg is not None and cfg.hydra.runtime.choices["hydra/sweeper"] == "basic":
        problems.append(
            f"{', '.join(drawn)}: expected hydra/sweeper=optuna or another sweeper that draws values, got Hydra's own,"
            " which goes through a list of them: optimizer.lr=0.1,0.2 or range(0.1,0.5,0.1)"
        )
    return problems


def compose_what_can_be(overrides: list[str], root: str, problems: list[str]) -> tuple[DictConfig | None, list[str]]:
    """The configuration made from those overrides that can be composed, and these overrides. For each other override,
    an explanation is added to `problems`.
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


def check(cfg: DictConfig, hydra_cfg: HydraConf) -> None:
    """Refuse a configuration that cannot be run, as validation.check does."""
    overrides = list(hydra_cfg.overrides.task)
    validation.check(cfg, overrides=overrides, choices={**continued.choices(), **hydra_cfg.runtime.choices})


def run_directory(cfg: DictConfig, multirun: bool) -> Path:
    return Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir if multirun else Path(cfg.hydra.run.dir)


def refuse_shared_directories(placed: list[tuple[Path, dict[str, Any]]]) -> None:
    """Refuse a sweep in which several jobs would write into the same directory. The second of them would be refused or
    taken for finished, and the numbers shown for it would be those of the first.

    Args:
        placed: the directory and the flat configuration of each job.
    Raises:
        UserError: names the directory, the settings in which the jobs differ, and how to give each its own directory.
    """
    together: dict[Path, list[dict[str, Any]]] = {}
    for folder, leaves in placed:
        together.setdefault(folder, []).append(leaves)
    for folder, those in together.items():
        if len(those) == 1:
            continue
        differ = sorted(key for key in set().union(*those) if len({repr(leaves.get(key)) for leaves in those}) > 1)
        if not differ:
            raise UserError(f"{len(those)} jobs of this sweep are the same run, {_word(folder)}: name each value once")
        # A value with slashes would make subfolders.
        words = [f"${{{key}}}" for key in differ if all("/" not in str(leaves.get(key)) for leaves in those)]
        own = "-".join(words) if len(words) == len(differ) else "${hydra.job.num}"
        raise UserError(
            f"{len(those)} jobs of this sweep have the same directory, {_word(folder)}: they differ only in"
            f" {', '.join(differ)}, which is not part of a run's identity, so only the first would be trained. Leave it"
            f" out of the sweep, or give each job its own directory: hydra.sweep.subdir='${{run_name:}}-{own}'"
        )


def say_what_is_missing(cfg: DictConfig, hydra_cfg: HydraConf, run_dir: Path) -> None:
    """Tell the user if MLflow is missing and nobody chose the tracking."""
    # Runs of one sweep or table are side by side and are sent to MLflow together, so one message covers all of them.
    together = Path(hydra_cfg.sweep.dir).absolute()
    say_if_mlflow_is_missing(
        cfg, list(hydra_cfg.overrides.task), together if together in run_dir.absolute().parents else run_dir
    )


def say_if_mlflow_is_missing(cfg: DictConfig, overrides: list[str], folder: Path) -> None:
    """Tell the user that the ledger is used instead of MLflow, unless the command line chooses the tracking itself.

    Args:
        folder: the run's directory, or one that holds it.
    """
    named = any(item.lstrip("+~").partition("=")[0] == "tracking" for item in overrides)
    falls_back = not is_installed("mlflow") and signatures.declared(cfg.tracking._target_, "package") is None
    if falls_back and not named and directory.is_first_rank():
        say_once(
            f"MLflow is not installed: the ledger keeps everything, and `python -m caco.tracking.sync {_word(folder)}`"
            f" sends it later, once MLflow is installed ({command_to_install('mlflow')})"
        )


@functools.cache
def say_once(message: str) -> None:
    print(f"caco: {message}", file=sys.stderr)


def _word(folder: Path) -> str:
    """The folder as a word of a command in a shell."""
    return shlex.quote(as_typed(folder))
