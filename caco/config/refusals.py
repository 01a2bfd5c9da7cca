"""Puts Hydra's and OmegaConf's composition errors into plain words: what was given, what exists, the nearest match."""

import difflib
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from caco.config import folders
from caco.config.annotations import is_plain
from caco.config.components import SUPPLIED
from caco.config.composition import compose, job_config
from caco.config.folders import groups
from caco.config.schema import ROOTS
from caco.config.signatures import find
from caco.errors import UserError
from caco.installed import is_installed, to_install
from caco.redaction import OF_SECRETS, holds_secret, redacted, shortened
from caco.runs import renamed

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)
_OF_MLFLOW = (
    "tracking.uri",
    "tracking.experiment",
    "tracking.feed_seconds",
    "tracking.finish_seconds",
    "tracking.model",
)


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean a, b?", or "" if no known word is close."""
    known = sorted(set(known))
    # Compared in lower case, so that 12m finds 12M.
    lowered = {name.lower(): name for name in known}
    if word.lower() in lowered:
        return f"; did you mean {lowered[word.lower()]}?"
    close = [lowered[name] for name in difflib.get_close_matches(word.lower(), lowered, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def refuse_unwritable(overrides: Sequence[str]) -> None:
    """Refuse overrides that cannot be written down, and overrides without a value such as `data.root=$UNSET`, which
    would otherwise mean the working directory or no directory at all.

    Raises:
        UserError: an override has no value, holds a secret such as a password, or is not valid text in this locale.
    """
    # Secrets are refused wherever they stand: in a value, a run's directory, the name of an option, ...
    if secret := [item for item in overrides if holds_secret(item)]:
        raise UserError(f"{redacted(' '.join(secret))}: {OF_SECRETS}")
    for item in overrides:
        try:
            item.encode()
        except UnicodeEncodeError:
            shown = item.encode(errors="backslashreplace").decode()
            raise UserError(
                f"{shown} is not valid text in this locale's encoding; set LC_ALL=C.UTF-8, or rename the file"
            ) from None
    empty = [
        item for item in overrides if item.partition("=")[1:] == ("=", "") or item.partition("=")[2] in ("''", '""')
    ]
    if empty:
        raise UserError(
            f"{', '.join(empty)} has no value after the =. Is a shell variable unset? To set nothing, write null"
        )


def explain(error: Exception, overrides: Sequence[str], root: str = "config") -> str:
    """One or two lines on why the command line `overrides` cannot be composed with the root conf/<root>.yaml."""
    if isinstance(error, OverrideParseException):
        why = next(
            (line for line in str(error).splitlines() if not line.startswith("Error parsing override")),
            "it is not key=value",
        )
        why = "it has a character that Hydra's grammar allows only in quotes" if why.startswith("Lexer") else why
        return (
            f"{error.override or 'the command line'} cannot be read ({why}); expected"
            f" key=value{_quoted(error.override)}"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _explain_option(error.missing_cfg_file)
    twice = re.search(r"Multiple values for ([^.\s]+)", str(error))
    if twice:
        those = [
            item
            for item in overrides
            if item.lstrip("+~").partition("=")[0].replace("/", ".") == twice.group(1).replace("/", ".")
        ]
        return f"{twice.group(1)} is chosen twice{': ' * bool(those)}{' '.join(those)}; keep only one of them"
    given = re.search(r"Could not override '([^'@]+)", str(error))
    if given:
        inner = re.search(r"full_key: (\S+)", str(error.__cause__))
        return _explain_key(
            given.group(1),
            overrides,
            root,
            in_defaults_list="defaults list" in str(error),
            inner=inner[1] if inner else "",
        )
    left_out = re.search(r"Could not delete from config\. '([^']+)' does not exist", str(error))
    if left_out:
        cfg = _compose_without(left_out[1], overrides, root)
        tree = {} if cfg is None else OmegaConf.to_container(job_config(cfg), resolve=False)
        return f"~{left_out[1]}: there is no such key to leave out{nearest(left_out[1], _names(tree)) or '.'}"
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, ValidationError) and cause.full_key:
        return _explain_type(cause)
    for override in overrides:  # Hydra accepts no number and no null as an option's name, and does not say which it was
        group, _, option = override.partition("=")
        if group in groups() and re.fullmatch(r"[\d.-]*|null|true|false", option, re.IGNORECASE):
            size = f"; for another size bank.size={option}" if group == "bank" and option.isdigit() else ""
            return f"{override}: {group} is one of {', '.join(groups()[group])}{size}"
    if (merging := re.match(r"Error merging override (.+)", str(error))) and cause is not None:
        return f"{merging[1]}: {str(cause).splitlines()[0]}"
    if "RecursionError" in str(error):
        return "a setting refers to itself through a circle of ${...}; write its value out"
    lines = [line.strip() for line in str(error if str(error) else cause).splitlines() if line.strip()]
    said = " ".join(line for line in lines if not line.startswith(("full_key:", "reference_type=", "object_type=")))
    said = said.replace(" full_key: ", ", needed by ").partition(" reference_type=")[0]
    made = [item for item in overrides if "${" in item and item.partition("=")[0] not in said]
    return f"{made[0]}: {said}" if len(made) == 1 else said


def culprit(said: str, overrides: Sequence[str]) -> str | None:
    """The override that a line from `explain` is about; None if it is about none of them."""
    for item in overrides:
        key = item.lstrip("+~").partition("=")[0]
        if said.startswith((f"{item} ", f"{item}:", f"{key}:", f"{key} ", f"{key}=")):
            return item
    return None


def _quoted(override: str | None) -> str:
    """A hint how to quote a value that Hydra's grammar cannot read unquoted (a path with blanks, umlauts, parentheses,
    = or ~), as it is typed in a shell; "" if quoting does not make it readable."""
    key, equals, value = (override or "").partition("=")
    if not equals or not value:
        return ""
    inner = value.strip("'\"").replace("\\", "\\\\").replace("'", "\\'")
    written = f"{key}='{inner}'"
    try:
        OverridesParser.create().parse_override(written)
    except HydraException:
        return ""
    return f". Hydra needs quotes around such a value, and the shell needs its own around those: {shlex.quote(written)}"


def _explain_option(missing: str) -> str:
    # Split after the group's name, not at the last slash: a URL given as an option has slashes too.
    known = [name for name in groups() if missing.startswith(f"{name}/")]
    group, option = (known[0], missing.removeprefix(f"{known[0]}/")) if known else missing.rpartition("/")[::2]
    options = groups().get(group, [])
    listed = f" There are: {', '.join(options)}." if options else ""
    return (
        f"{group}={option}: no such option{nearest(option, options) or '.'}{listed}{folders.misplaced(group, option)}"
    )


def _explain_key(key: str, overrides: Sequence[str], root: str, *, in_defaults_list: bool, inner: str) -> str:
    """Why `key` cannot be set.

    Args:
        inner: the unknown name within a value {NAME: ...} given for `key`; else `key` itself.
    """
    if key in renamed.KEYS:
        return f"{key}: is now called {renamed.KEYS[key]}; use that name"
    if key == "pn":
        return (
            "pn applies to method=caco only: it chooses where that method takes its positives and negatives (Table"
            " VII). Leave pn out, or choose method=caco"
        )
    if in_defaults_list:
        return f"{key}: no such group in this configuration{nearest(key, groups())}"
    cfg = _compose_without(key, overrides, root)
    # Left unresolved: only names are needed, and some other setting may not resolve.
    tree = None if cfg is None else OmegaConf.to_container(job_config(cfg), resolve=False)
    known = [*ROOTS[root].__dataclass_fields__, *groups()] if tree is None else [*_names(tree), *groups()]
    parent, _, name = key.rpartition(".")
    node = _selected(cfg, parent) if cfg is not None and parent else None
    if isinstance(node, DictConfig):
        target = OmegaConf.to_container(node, resolve=False).get("_target_")  # type: ignore[union-attr]
        signature = find(target) if isinstance(target, str) else None
        taken = signature.parameters.get(name) if signature else None
        if (
            signature
            and taken
            and is_plain(taken.annotation, signature.module)
            and name not in SUPPLIED.get(parent, ())
        ):
            value = next(
                (item.partition("=")[2] for item in overrides if item.lstrip("+~").startswith(f"{key}=")), "VALUE"
            )
            if inner.startswith(f"{key}."):
                return f"{inner} is not set by the chosen {parent}; to add it, write +{key}={value}"
            return f"{key} is not set by the chosen {parent}, which does accept it: write +{key}={value}"
        if key in _OF_MLFLOW and not is_installed("mlflow"):
            return f"{key}: applies to tracking=mlflow, and MLflow is not installed{to_install('mlflow')}"
        near = nearest(name, [str(item) for item in node])
        return f"{key}: no such key{near or nearest(key, known)} {parent} has: {', '.join(map(str, node))}"
    if parent and cfg is not None and parent in ROOTS[root].__dataclass_fields__:
        return f"{key}: this configuration has no {parent} (it is {shortened(node, 40)})"
    return f"{key}: no such key{nearest(key, known) or '. `--help` lists all'}"


def _explain_type(error: ValidationError) -> str:
    """The text for OmegaConf's own type error of a key of the typed root."""
    key = str(error.full_key)
    got = re.search(r"Value '(.*)' (?:of type|is not a valid|\()", str(error), re.DOTALL)
    expected = re.search(r"(?:could not be converted to|is not a valid) (\w+)", str(error))
    if not got or not expected:
        return f"{key}: {str(error).splitlines()[0]}"
    words = {"Integer": "int", "Float": "float", "String": "str"}
    return f"{key}: expected {words.get(expected.group(1), expected.group(1))}, got {got.group(1)!r}"


def _compose_without(key: str, overrides: Sequence[str], root: str) -> DictConfig | None:
    """The configuration made by the overrides but those of `key`, to look up names that the user may have meant.

    If another override is wrong too, only the existing options that the command line chooses count; and if these do not
    go together, nothing of the command line. None if conf/ itself cannot be composed.
    """
    others = [item for item in overrides if item.lstrip("+~").partition("=")[0] != key]
    for kept in (others, _existing_options(others), []):
        try:
            return compose(kept, root)
        except (*COMPOSITION_ERRORS, ValueError):
            continue
    return None


def _existing_options(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose existing options of groups; of several for one group, the last."""
    kept = {}
    for item in overrides:
        group, _, chosen = item.partition("=")
        options = [name.strip() for name in chosen.strip("[]").split(",")]
        if group in groups() and set(options) <= {*groups()[group], ""}:
            kept[group] = item
    return list(kept.values())


def _selected(cfg: DictConfig, key: str) -> Any:
    """The node at this key; None if there is none, or if it cannot be resolved."""
    try:
        return OmegaConf.select(cfg, key)
    except (OmegaConfBaseException, RecursionError):
        return None


def _names(node: Any, prefix: str = "") -> list[str]:
    """Every dotted name in the tree, at all depths."""
    if not isinstance(node, dict):
        return []
    return [
        name
        for key, value in node.items()
        for name in (f"{prefix}{key}", *_names(value, f"{prefix}{key}."))
        if not name.endswith("_target_")
    ]
