"""Every refusal that needs neither torch nor data; it comes before either is loaded.

The root's types come from its schema. Plain values are checked against each other (plain_values.py). Each component's
keys are checked against the signature of its `_target_` (components.py). A choice on the command line that something
later undoes is refused, not ignored (no_effect.py).
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from caco.config import channels_needed, components, no_effect, plain_values, signatures, views_needed
from caco.config.annotations import mismatches
from caco.config.schema import COMPONENTS, AnyRoot, Root
from caco.errors import UserError
from caco.redaction import OF_SECRETS, holds_secret, names_secret, shortened
from caco.runs.identity import flat, plain


def check(
    cfg: DictConfig, *, overrides: Sequence[str] = (), choices: Mapping[str, Any] | None = None, root: AnyRoot = Root
) -> None:
    """Refuse a configuration that cannot be run.

    Args:
        cfg: the composed configuration; Hydra's own settings are ignored.
        overrides: the command line, to report which of its words would have no effect.
        choices: group -> option, from Hydra.
        root: the schema that cfg was composed with.

    Raises:
        UserError: one line per problem, with the key, the expected value and the given one.
    """
    try:
        tree = plain(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise UserError("a setting refers to itself through a circle of ${...}; write its value out") from error
    if missing := sorted(key for key, value in flat(tree).items() if value == "???"):
        raise UserError("\n".join(f"{key}: must be given, as {key}=..." for key in missing))
    problems = _shape(tree, root) + _senseless(tree)
    if not problems:
        of_values = plain_values.of_a_training if root is Root else plain_values.of_the_pretrained
        problems = of_values(tree) + components.problems(tree) + components.not_installed(tree)
        problems += no_effect.problems(tree, overrides, choices or {})
        problems = problems or components.of_one_name(tree.get("eval", {})) + (
            views_needed.early_problems(tree) if root is Root else []
        )
        problems = problems or channels_needed.problems(tree, overrides)
    if problems:
        raise UserError("\n".join(problems))


def _senseless(tree: dict[str, Any]) -> list[str]:
    """Values that make no sense in any setting. Also covers the user's own components, whose arguments declare no
    range.
    """
    problems = []
    for key, value in flat(tree).items():
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{key}: expected a finite number, got {value}")
        elif isinstance(value, int) and not -(2**32) < value < 2**32:
            problems.append(f"{key}: expected a number below 2**32, got {shortened(value, 40)}")
        elif not isinstance(value, str):
            continue
        elif not value and not key.startswith("launcher.sbatch."):
            problems.append(
                f"{key}: expected a value, got an empty text. Is a shell variable unset? To set nothing, write null"
            )
        elif "\0" in value:
            problems.append(f"{key}: expected text without NUL characters, got {shortened(value, 60)}")
        elif names_secret(key.rpartition(".")[2]) or holds_secret(value):
            problems.append(f"{key}: {OF_SECRETS}")
    return problems


def _shape(tree: dict[str, Any], root: AnyRoot) -> list[str]:
    """Checks that the root has exactly its own keys, and a component wherever one belongs."""
    known = list(root.__dataclass_fields__)
    problems = []
    for key in tree.keys() - set(known):
        near = difflib.get_close_matches(key, known, n=1)
        problems.append(f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else ""))
    problems += [f"{key}: is missing" for key in known if key not in tree]
    for key, field in root.__dataclass_fields__.items():
        inner = getattr(field.default_factory, "__dataclass_fields__", {})  # schedule, warm_start, checkpoint
        if isinstance(tree.get(key), dict):
            problems += [f"{key}.{name}: is missing" for name in inner if name not in tree[key]]
    taken = signatures.find(f"{root.__module__}.{root.__name__}")
    assert taken is not None
    # OmegaConf checks types when it composes, but not those of items of lists, nor of a list that ${...} stands for.
    problems += [
        line
        for key, parameter in taken.parameters.items()
        if key in tree
        for line in mismatches(tree[key], parameter.annotation, taken.module, key)
    ]
    for key in COMPONENTS:
        structured = key in known and hasattr(root.__dataclass_fields__[key].default_factory, "__dataclass_fields__")
        if key in known and not structured and key in tree and not _is_component(tree[key]):
            problems.append(f"{key}: expected a component with a _target_, got {shortened(tree[key], 60)}")
    for key, expected, remedy in (
        (
            "bank",
            "a component with a _target_, or null",
            "; the file of a method without a bank says bank: null, as conf/method/simclr.yaml does",
        ),
        ("negatives", "a treatment of negatives with a _target_, or null for plain ones", ""),
        ("launcher", "none, local or slurm", ""),
    ):
        if tree.get(key) is not None and not _is_component(tree[key]):
            problems.append(f"{key}: expected {expected}, got {shortened(tree[key], 60)}{remedy}")
    evaluators = tree.get("eval", {} if "eval" not in known else None)
    if not isinstance(evaluators, dict):
        problems.append(f"eval: expected evaluators by name, as eval=[knn,probe], got {shortened(evaluators, 60)}")
    else:
        for name, part in evaluators.items():
            if not _is_component(part):
                problems.append(f"eval.{name}: expected an evaluator with a _target_, got {shortened(part, 60)}")
    return problems


def _is_component(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value
