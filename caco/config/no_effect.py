"""Refuses command-line settings that the composed configuration would ignore. Needs neither torch nor data."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from caco.config import folders, signatures
from caco.config.schema import COMPONENTS
from caco.runs.identity import flat, read_yaml

LEARNING = "expected pn=both, pn=negative or method=adco"


def problems(tree: dict[str, Any], overrides: Sequence[str], choices: Mapping[str, Any]) -> list[str]:
    """One line for each thing that the command line asks for and the composed configuration does not do."""
    found = []
    if "pn" in choices and not _composes_pn(choices.get("method")):
        found.append(f"pn={choices['pn']}: applies to method=caco only, and the method is {choices.get('method')}")
    leaves = flat(tree)
    assigned = [item.lstrip("+~").partition("=")[0] for item in overrides]
    presets = [item for item in overrides if item.startswith("preset=")]
    if any(name.startswith("warm_start.") for name in assigned) and "warm_start_steps" not in tree["method"]:
        found.append(f"warm_start: method={choices.get('method')} has no warm start; leave it out")
    twice = _chosen_twice(overrides)
    found += [f"{group}: is chosen twice: {' '.join(those)}; leave all but one out" for group, those in twice.items()]
    found += _unlearned(tree, assigned) + _untreated(tree, choices) + _merged_to_nothing(tree, overrides)
    if tree.get("negatives") is not None and (tree.get("bank") or {}).get("keep_probabilities"):
        found.append(
            f"bank.keep_probabilities=true: with negatives={choices.get('negatives')} nothing is kept; leave it out, or"
            " take negatives=plain"
        )
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        for option in value.strip("[]").split(","):
            file = folders.option_file(group, option.strip())
            if group == "preset" or group in twice or file is None:
                continue
            if group == "bank" and tree.get("bank") is None:
                without = f"pn={choices['pn']}" if "pn" in choices else f"method={choices.get('method')}"
                found.append(f"{override}: {without} has no bank")
                continue
            if group == "bank" and tree["bank"].get("size", 0) is None:
                method = choices.get("method")
                found.append(f"{override}: method={method} has a bank with a row for each training image; leave it out")
                continue
            if group == "bank_recipe" and "push" not in (tree.get("bank") or {}):
                method = f"pn={choices['pn']}" if "pn" in choices else f"method={choices.get('method')}"
                found.append(f"{override}: {method} has no bank that learns; {LEARNING}")
                continue
            for key, wanted in settings_of(group, file):
                by_hand = any(key == name or key.startswith(f"{name}.") for name in assigned if name != group)
                # A method's file also sets values of the root and of other components (warm-up, learning rate); a
                # preset may change those.
                own_of_option = key.split(".")[0] in (
                    ("method", "bank")
                    if group == "method"
                    else (*COMPONENTS, "bank", "bank_learning", "negatives", "eval")
                )
                if own_of_option and not by_hand and leaves.get(key) != wanted and "${" not in str(wanted):
                    undone_by = presets[-1] if presets else "a later group"
                    found.append(f"{override}: {undone_by} sets {key}={leaves.get(key)} instead; say {key}={wanted}")
    return found


def _chosen_twice(overrides: Sequence[str]) -> dict[str, list[str]]:
    """group -> its overrides, for every group that several overrides choose. Hydra would take the last of them."""
    given: dict[str, list[str]] = {}
    for item in dict.fromkeys(overrides):
        group, equals, _ = item.partition("=")
        if equals and group in folders.groups():
            given.setdefault(group, []).append(item)
    return {group: those for group, those in given.items() if len(those) > 1}


def _merged_to_nothing(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """One line for each `key={}`, inner ones too, that changes nothing: Hydra merges groups of settings key by key, so
    an empty group leaves all keys as they are.
    """
    problems = []

    def visit(override: str, key: str, value: Any, there: Any) -> None:
        if not isinstance(value, dict) or not isinstance(there, dict):
            return
        if not value and there:
            names = [name for name in there if name != "_target_"]
            problems.append(
                f"{override}: changes nothing, because settings are merged key by key: {key} keeps"
                f" {', '.join(names[:3])}{', ...' * (len(names) > 3)}. Leave one out by ~{key}.{names[-1]}, change one"
                f" by {key}.{names[-1]}=VALUE"
            )
        for name, inner in value.items():
            visit(override, f"{key}.{name}", inner, there.get(str(name)))

    for item in OverridesParser.create().parse_overrides([item for item in overrides if "{" in item]):
        key, there = item.key_or_group.replace("/", "."), tree
        for part in key.split("."):
            there = there.get(part) if isinstance(there, dict) else None  # type: ignore[assignment]
        if not item.is_delete() and not item.is_sweep_override():
            visit(str(item.input_line), key, item.value(), there)
    return problems


def _unlearned(tree: dict[str, Any], assigned: Sequence[str]) -> list[str]:
    """One line for each given setting of bank_learning that this bank does not have. (conf/learned_bank.yaml passes all
    of bank_learning to a learnable bank.)
    """
    block, bank = tree.get("bank_learning", {}), tree.get("bank") or {}
    problems = []
    for name in assigned:
        parent, _, key = name.partition(".")
        if parent == "bank_learning" and key not in ("", *bank):
            taken = ", ".join(name for name in block if name in bank)
            expected = f"it takes {taken}" if taken else f"none of its rows learn; {LEARNING}"
            problems.append(f"{name}: the bank of this configuration takes no {key}: {expected}")
    return problems


def _untreated(tree: dict[str, Any], choices: Mapping[str, Any]) -> list[str]:
    """Refuses a treatment of negatives if the method takes none. caco/methods/treatments.py decides which treatment
    suits which negatives.
    """
    if tree.get("negatives") is None:  # plain negatives, or a command that trains nothing
        return []
    target = tree["method"]["_target_"]
    if _takes(target, "treatment"):
        return []
    taking = [name for name, other in _targets_of_methods().items() if _takes(other, "treatment")]
    return [
        f"negatives={choices.get('negatives')}: {target.rpartition('.')[2]}, the class of"
        f" method={choices.get('method')}, takes no treatment of negatives: it has no negatives, or its own loss over"
        f" them; expected negatives=plain, or one of these methods: {', '.join(taking)}"
    ]


def _takes(target: str, argument: str) -> bool:
    """Whether a component takes an argument; True if its signature cannot be read."""
    signature = signatures.find(target)
    return signature is None or signature.open or argument in signature.parameters


def _targets_of_methods() -> dict[str, str]:
    """method -> `_target_`, for every option of `method` whose own file names the class."""
    files = {name: folders.option_file("method", name) for name in folders.groups()["method"]}
    settings = {name: dict(settings_of("method", file)) for name, file in files.items() if file is not None}
    return {name: found["method._target_"] for name, found in settings.items() if "method._target_" in found}


def _composes_pn(method: str | None) -> bool:
    """Whether the file of this method, or one that it builds on, has the group pn in its defaults list."""
    file = folders.option_file("method", str(method))
    defaults = read_yaml(file).get("defaults") or () if file else ()
    return any(
        "/pn" in item if isinstance(item, DictConfig) else item != "_self_" and _composes_pn(item) for item in defaults
    )


def settings_of(group: str, file: Path) -> list[tuple[str, Any]]:
    """The dotted keys that an option's file sets, with their values."""
    text = file.read_text(encoding="utf-8")
    header = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
    package = header.group(1) if header else group
    prefix = "" if package == "_global_" else f"{package}."
    content = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))
    settings = {key: value for key, value in content.items() if key not in ("defaults", "hydra")}
    return [(f"{prefix}{key}", value) for key, value in flat(settings).items()]
