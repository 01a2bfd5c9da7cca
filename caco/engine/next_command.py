"""Chooses what the command of caco.evaluate names that a run suggests at its end: which of its evaluators, and which of
their settings.
"""

from omegaconf import DictConfig

from caco.config import folders, signatures
from caco.config.no_effect import settings_of
from caco.launch import labels
from caco.runs.identity import flat, plain


def evaluators_again(label: labels.Label, cfg: DictConfig) -> list[str]:
    """The run's options of `eval` that caco.evaluate can repeat; it has only the backbone, not the method."""
    return [
        option
        for option in label.evaluators
        if option not in cfg.eval or not signatures.declared(cfg.eval[option]["_target_"], "needs_method")
    ]


def set_otherwise(cfg: DictConfig, options: list[str]) -> list[str]:
    """The settings of these options of `eval` that this run has not as their files say, as overrides: a command that
    names the options alone would ask for another evaluation, or for one that does not go with the images.
    """
    leaves = flat({"eval": plain(cfg)["eval"]})
    of_files = {
        key: value
        for option in options
        if (file := folders.option_file("eval", option)) is not None
        for key, value in settings_of("eval", file)
    }
    return [
        f"{key}={leaves[key]}"
        for key, wanted in of_files.items()
        if isinstance(wanted, int | float) and isinstance(leaves.get(key), int | float) and leaves[key] != wanted
    ]
