"""Checks that the settings and a folder of images fit together, before torch is imported or a directory is made. All
problems are reported at once.

A value that the user did not set is derived if its default does not fit and a sensible one follows from the images or
the length of the run.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from omegaconf import DictConfig

from caco.config import composition, folders, signatures
from caco.config.no_effect import settings_of
from caco.data.sets import walking
from caco.data.sets.sources import Splits
from caco.errors import UserError
from caco.runs.directory import is_first_rank
from caco.runs.identity import plain
from caco.saying import amount

FOLDERS = "caco.data.sets.folders"  # sets in this module can be counted without opening their files
IN_WHEELS = ("digits", "photo_tiles")  # sets in that module which come with scikit-learn and are small
WARMUP_SHARE, HELD_OUT = 0.1, 0.1


@dataclass
class Fit:
    """What `fit` found.

    problems: one line for each thing that does not fit. derived: override -> reason, for each derived value.
    """

    problems: list[str] = field(default_factory=list)
    derived: dict[str, str] = field(default_factory=dict)


class Given:
    """Whether the user has set a key, so that its value must not be derived: by the command line or by a preset.

    Args:
        overrides: the command line. presets: the chosen options of `preset`.
        recorded: the configuration is that of a continued run, so all settings but the schedule count as set.
    """

    def __init__(self, overrides: Sequence[str], presets: Sequence[str] = (), recorded: bool = False):
        keys = [item.lstrip("+~").partition("=")[0].replace("/", ".") for item in overrides]
        for name in presets:
            if (file := folders.option_file("preset", name)) is not None:
                keys += [key for key, _ in settings_of("preset", file)] + folders.groups_chosen_by(file)
        self._keys, self._recorded = set(keys), recorded

    def __call__(self, key: str) -> bool:
        options = folders.groups().keys()  # choosing an option of a group sets no single value in it
        return (self._recorded and not key.startswith("schedule.")) or any(
            key == one or one.startswith(f"{key}.") or (key.startswith(f"{one}.") and one not in options)
            for one in self._keys
        )


def fit(
    tree: Mapping[str, Any], given: Given, read: Callable[[Mapping[str, Any]], Splits | None], *, world: int = 1
) -> Fit:
    """What does not fit in an otherwise valid configuration, and the values derived so that the rest fits.

    Args:
        tree: the configuration as dicts and lists.
        read: returns the images of its `data`, or None if they are not known yet; raises UserError.
        world: the number of processes that share a batch.
    """
    found = Fit()
    _warmup(tree, given, found)
    try:
        splits = read(tree["data"])
    except UserError as error:
        found.problems.append(str(error))
        return found
    if splits is None:
        return found
    num_train, batch = len(splits.pretrain), tree["batch"]
    evaluators = dict(tree["eval"])
    needing = [name for name, node in evaluators.items() if signatures.declared(node["_target_"], "needs_labels")]
    labels = None if splits.train is None else splits.train.labels
    if needing and labels is not None and splits.test is None:
        if (
            not given("data.validation_fraction")
            and not given("data.labelled_root")
            and tree["data"].get("validation_fraction") is None
        ):
            found.derived[f"data.validation_fraction={HELD_OUT}"] = (
                "there are no test images, so a tenth of the training images is held out for testing"
            )
            held_out = round(HELD_OUT * num_train)
            # Enough for counting; which images are held out is drawn later.
            num_train, labels = num_train - held_out, labels[held_out:]
        else:
            found.problems.append(_missing("no test images", splits, needing))
            needing = []
    elif needing and (labels is None or splits.test is None or splits.test.labels is None):
        if given("eval"):
            found.problems.append(
                _missing("no labels" if labels is None else "no labelled test images", splits, needing)
            )
        else:
            found.derived["eval=[geometry]"] = (
                f"the images have no labels, which {' and '.join(needing)} need; geometry needs no labels"
            )
        needing = []
    if num_train < batch:
        largest = 2 ** int(np.log2(max(num_train, 1)))
        found.problems.append(
            f"batch: expected at most {num_train:,}, the number of training images of {splits.pretrain.name}, got"
            f" {batch:,}"
            + (
                f"; batch={largest} leaves {amount(num_train // largest, 'step')} an epoch"
                if largest >= 2
                else "; give more images"
            )
        )
    if labels is not None:
        for name in needing:
            _evaluator(name, evaluators[name], labels, given, found, world)
    return found


def _warmup(tree: Mapping[str, Any], given: Given, found: Fit) -> None:
    key, length = "schedule.warmup_epochs", tree["schedule"]["warmup_epochs"]
    epochs = tree["epochs"] - (tree["continued_epochs"] if tree["continued_schedule"] == "restart" else 0)
    if length < epochs:
        return
    if given(key):
        found.problems.append(
            f"{key}: expected less than the {amount(epochs, 'epoch')} of the schedule, got {length:g}; 0 means no"
            " warm-up"
        )
    else:
        found.derived[f"{key}={WARMUP_SHARE * epochs:g}"] = (
            f"a warm-up of {amount(length, 'epoch')} does not fit into {amount(epochs, 'epoch')}; this is a tenth of"
            " that"
        )


def _missing(what: str, splits: Splits, needing: Sequence[str]) -> str:
    return (
        f"eval=[{','.join(needing)}]: expected labelled training and test images, got {splits.pretrain.name} with"
        f" {what}; give data.labelled_root=PATH (train/ and test/ of class"
        f" folders){', hold some out with data.validation_fraction=0.1' * (splits.train is not None)}, or use"
        " eval=[geometry], which needs no labels"
    )


def _evaluator(name: str, node: Mapping[str, Any], labels: np.ndarray, given: Given, found: Fit, world: int) -> None:
    """Check settings of an evaluator that the number of labelled images limits (caco/evals/base.py: bounded)."""
    counts, total = np.unique(labels, return_counts=True)[1].tolist(), len(labels)
    for setting, share in (signatures.declared(node["_target_"], "bounded") or {}).items():
        key, part = f"eval.{name}.{setting}", node[share] if share else 1
        there = total if part == 1 else sum(max(1, round(part * count)) for count in counts)
        if node[setting] <= there:
            continue
        fits = total // world * world
        if given(key) or (share and given(f"eval.{name}.{share}")) or fits < 2:
            found.problems.append(
                f"{key}: expected at most {there:,}, the number of labelled training images used, got {node[setting]:,}"
            )
            continue
        if part != 1:
            found.derived[f"eval.{name}.{share}=1"] = (
                f"{part:g} of the labelled training images are {there:,}, fewer than {setting}, {node[setting]:,}"
            )
        if total < node[setting]:
            found.derived[f"{key}={fits}"] = f"there are {total:,} labelled training images"


def images_of(data: Mapping[str, Any]) -> Splits | None:
    """The images of a `data` that is read from a folder, without opening any of them; None for any other `data`. The
    list of the folder's files is kept, so that a run in this process does not walk over the folder again.

    Raises:
        UserError: the folder does not exist, or its layout is not the expected one.
    """
    module, _, name = data["_target_"].rpartition(".")
    if module != FOLDERS or name in IN_WHEELS:
        return None
    with walking.kept():
        return composition.instantiate({**data, **({"in_memory_mb": 0} if "in_memory_mb" in data else {})})


def remembered(look: bool) -> Callable[[Mapping[str, Any]], Splits | None]:
    """A function like `images_of` that reads each `data` once, for the jobs of a sweep.

    Args:
        look: False gives a function that always returns None, for images that cannot be looked at yet.
    """
    known: dict[str, Splits | UserError | None] = {}

    def read(data: Mapping[str, Any]) -> Splits | None:
        if not look:
            return None
        if (key := repr(data)) not in known:
            try:
                known[key] = images_of(data)
            except UserError as error:
                known[key] = error
        found = known[key]
        if isinstance(found, UserError):
            raise found
        return found

    return read


def overrides_that_fit(
    cfg: DictConfig, overrides: Sequence[str], problems: list[str], read: Callable[[Mapping[str, Any]], Splits | None],
    *, recorded: bool,
    is_sound: bool,
) -> list[str]:  # fmt: skip
    """Derive missing values for this command line, print them, and return them as overrides. Anything that does not fit
    is added to `problems` instead.

    Args:
        recorded: whether this is the configuration of a run that is continued.
        is_sound: whether the configuration has no other errors; if it has, checks that fail on them are skipped.
    """
    presets = [item.partition("=")[2].strip("[]").split(",") for item in overrides if item.startswith("preset=")]
    given = Given(overrides, [name.strip() for names in presets for name in names], recorded)
    try:
        found = fit(plain(cfg), given, read, world=int(os.environ.get("WORLD_SIZE", "1")))
    except Exception:  # noqa: BLE001 - a configuration that is refused anyway may fail here in any way
        if is_sound:
            raise
        return []
    problems += [line for line in found.problems if line not in problems]
    if problems or not found.derived:
        return []
    if is_first_rank():
        for override, why in found.derived.items():
            print(
                f"caco: {override.partition('=')[0]} is not set; it becomes {override.partition('=')[2]}, because"
                f" {why}",
                file=sys.stderr,
            )
    names = ",".join(override.partition("=")[0] for override in found.derived)
    return [*found.derived, f"derived=[{names}]"]
