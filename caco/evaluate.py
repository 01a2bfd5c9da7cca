"""`python -m caco.evaluate` and `caco-evaluate`: evaluate a run's backbone, or released weights.

Everything that can be refused without torch is refused before torch is imported.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from caco import errors
from caco.checking import say_if_mlflow_is_missing
from caco.config import folders, pretrained
from caco.errors import UserError
from caco.installed import version
from caco.runs import directory
from caco.runs.identity import plain
from caco.runs.paths import expanded, make_folder, require_writable
from caco.saying import doing

HELP = """\
caco: evaluate a trained backbone.

  python -m caco.evaluate run=RUN eval=[knn,probe]        RUN: its directory, a checkpoint file or an MLflow run id
  python -m caco.evaluate run=RUN eval=[transfer] eval.transfer.root=PATH
  python -m caco.evaluate run=RUN eval=[linear]           needs 4,096 labelled images, or eval.linear.batch=256
  python -m caco.evaluate run=RUN eval=[knn,semi] baselines=true
  python -m caco.evaluate weights=FILE format=moco backbone=resnet50 data=imagenet data.root=PATH

Results go into the run's ledger, summary.json, MLflow run and folder evaluations/; with weights=, into their own folder
(to=FOLDER). The same command again goes on where it stopped, and repeats nothing.
`--cfg` prints the whole configuration and starts nothing. A run's own components are looked for where the run had
them, or in the folder that `--config-dir DIR` names.
docs/evaluation.md has the protocols; docs/weights.md says what weights= can read; docs/glossary.md explains the words.

Groups, chosen by group=option:

{groups}
"""
OF_EVALUATION = ("backbone", "augmentation", "data", "loader", "eval", "tracking")


def main() -> None:
    """The console script."""
    run_command("evaluate", HELP, OF_EVALUATION, _evaluate)


def run_command(name: str, help_text: str, of_command: tuple[str, ...], act: Callable[[DictConfig], None]) -> None:
    """Run the command line of a root in conf/: show help or the configuration, or compose it, check it and call `act`.
    Exit code 2 on a refusal."""
    with errors.shown(interrupted="the same command goes on with what is left to do"):
        overrides = folders.take(sys.argv[1:])
        flags = [item for item in overrides if item.startswith("-")]
        if "--version" in flags:
            print(f"caco {version()}")
            return
        if {"-h", "--help"} & set(flags) or not overrides:
            print(help_text.format(groups=folders.listed(of_command)), end="")
            return
        if set(flags) - {"--cfg"}:
            raise UserError(f"{', '.join(flags)}: expected key=value, --config-dir DIR, --cfg or --help")
        cfg = pretrained.compose(name, [item for item in overrides if item not in ("--cfg", "job")])
        if flags:
            print(OmegaConf.to_yaml(OmegaConf.create(plain(cfg))), end="")
            return
        act(cfg)


def _evaluate(cfg: DictConfig) -> None:
    location = None if cfg.run is None else pretrained.locate(cfg.run)
    results_dir = _results_dir(cfg, location)
    say_if_mlflow_is_missing(cfg, sys.argv[1:], results_dir)
    if directory.is_first_rank():
        require_writable(results_dir, "to")
        make_folder(results_dir, "to")
        directory.hold(results_dir)
    with doing("loading PyTorch"):
        from caco.engine.evaluating import run_evaluation  # not at the top of the file, because it imports torch

    run_evaluation(cfg, location, results_dir)


def _results_dir(cfg: DictConfig, location: pretrained.Location | None) -> Path:
    if cfg.to is not None:
        return expanded(cfg.to)
    if location is not None:
        return location.run_dir
    return Path("evaluations") / f"{Path(cfg.weights).stem}-{cfg.weights_digest}"


if __name__ == "__main__":
    main()
