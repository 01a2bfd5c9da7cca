"""Refuses components, the parts of a configuration with a `_target_`, that cannot be made: each `_target_` must exist
and take the arguments beside it, and the package of the chosen tracker must be installed. Nothing is imported for this.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from caco import metrics
from caco.config import folders, signatures
from caco.config.annotations import argument_mismatches
from caco.installed import is_installed, to_install
from caco.runs import renamed

# Plain values that are never set in YAML, because another component or the data determine them.
SUPPLIED = {"projector": ("in_dim",), "method": ("num_images",), "backbone": ("in_channels",)}


def problems(node: Any, path: str = "") -> list[str]:
    """Checks that every `_target_` in the tree exists and takes the arguments that stand beside it."""
    if isinstance(node, list):
        return [line for number, item in enumerate(node) for line in problems(item, f"{path}.{number}")]
    if not isinstance(node, dict):
        return []
    lines = _component(node, path) if "_target_" in node else []
    for key, value in node.items():
        lines += problems(value, f"{path}.{key}" if path else str(key))
    return lines


def _component(part: dict[str, Any], path: str) -> list[str]:
    target = part["_target_"]
    if not isinstance(target, str) or "." not in target:
        return [f"{path}._target_: expected a dotted path to a class or function, got {target!r}"]
    if (new := renamed.target(target)) != target:
        return [f"{path}._target_: {target} is now called {new}; use that name"]
    module_name, _, name = target.rpartition(".")
    module = signatures.load(module_name)
    if module is None:
        if signatures.load(module_name.partition(".")[0]) is None:
            return [f"{path}._target_: {target} is not installed here{folders.lacks(module_name)}"]
        return [f"{path}._target_: cannot find or read the module {module_name} of {target}"]
    if signatures.lookup(module, name) is None:
        near = difflib.get_close_matches(name, [*module.nodes, *module.imports], n=1)
        return [f"{path}._target_: no {name} in {module_name}" + (f"; did you mean {near[0]}?" if near else "")]
    taken = signatures.find(target)
    given = {key: value for key, value in part.items() if key != "_target_"}
    return argument_mismatches(given, taken, path, name, SUPPLIED.get(path, ())) if taken else []


def of_one_name(evaluators: dict[str, Any]) -> list[str]:
    """One line for each evaluator whose results would get the same name as another one's."""
    first: dict[str, str] = {}
    given = [(name, protocol) for name, node in evaluators.items() for protocol in metrics.protocols(node)]
    return [
        f"eval.{name}: its results would be called {protocol}, the same as those of eval.{first[protocol]}: leave one"
        " of them out, or give it other settings"
        for name, protocol in given
        if first.setdefault(protocol, name) != name
    ]


def missing_package(tracking: Mapping[str, Any]) -> str | None:
    """The package that the chosen tracker needs (caco/tracking/base.py: `package`) and that is not installed; None if
    nothing is missing.
    """
    package = signatures.declared(str(tracking.get("_target_")), "package")
    return None if package is None or is_installed(package) else package


def not_installed(tree: dict[str, Any]) -> list[str]:
    """One line if the tracker's package is missing. Without MLflow, mlflow is chosen only by a user who names it
    (composition.py: installed_tracking).
    """
    package = missing_package(tree.get("tracking", {}))
    if package is None:
        return []
    name, how = ("MLflow", to_install("mlflow")) if package == "mlflow" else (package, to_install(package=package))
    return [
        f"tracking={package}: {name} is not installed{how}; or leave tracking out: "
        "the ledger keeps everything, and python -m caco.tracking.sync can send it later"
    ]
