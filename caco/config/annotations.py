"""Checks whether a plain value from YAML fits a type annotation, which is parsed from source and never executed."""

import ast
import builtins
import difflib
import math
from collections.abc import Collection
from typing import Any

from caco.config.signatures import Module, Parameter, Signature, is_group, lookup, signature
from caco.ranges import Length, Range
from caco.redaction import shortened

# An int fits a float annotation. A bool fits neither int nor float: `true` in place of a number is a mistake.
SCALARS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "Path": (str,),
    "PathLike": (str,),
    "bytes": (),
    "None": (type(None),),
}
LISTS = {"list", "List", "Sequence", "Iterable", "Collection", "Set", "set", "frozenset"}
DICTS = {"dict", "Dict", "Mapping", "MutableMapping"}


def alternatives(annotation: ast.expr, module: Module) -> list[tuple[Module, ast.expr]]:
    """The members of a union with aliases resolved, each with the module in which its names are looked up."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return alternatives(ast.parse(annotation.value, mode="eval").body, module)
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return alternatives(annotation.left, module) + alternatives(annotation.right, module)
    if isinstance(annotation, ast.Subscript):
        head = _word(annotation.value)
        if head == "Optional":
            return [*alternatives(annotation.slice, module), (module, ast.Constant(None))]
        if head == "Union":
            return [pair for item in _items(annotation.slice) for pair in alternatives(item, module)]
        if head == "Final":
            return alternatives(_items(annotation.slice)[0], module)
    known = {*SCALARS, *LISTS, *DICTS, "tuple", "Tuple", "Any", "object", "Annotated"}
    if isinstance(annotation, ast.Name) and annotation.id not in known:
        found = lookup(module, annotation.id)
        if found and not isinstance(found[1], (ast.ClassDef, ast.FunctionDef)):
            return alternatives(found[1].value, found[0])  # type: ignore[attr-defined]
    return [(module, annotation)]


def is_plain(annotation: ast.expr | None, module: Module) -> bool:
    """Whether YAML can hold a value of this type. The program supplies all others: networks, parameters, devices."""
    members = [] if annotation is None else alternatives(annotation, module)
    return bool(members) and all(_is_plain(item, where) for where, item in members)


def _is_plain(annotation: ast.expr, module: Module) -> bool:
    kind = _word(_head(annotation))
    items = _items(annotation.slice) if isinstance(annotation, ast.Subscript) else []
    if kind == "Annotated":
        return is_plain(items[0], module)
    if kind in LISTS or kind in DICTS or kind in ("tuple", "Tuple"):
        return all(_is_ellipsis(item) or is_plain(item, module) for item in items)
    found = lookup(module, kind) if isinstance(annotation, ast.Name) and kind not in SCALARS else None
    if found is not None and is_group(*found):
        return all(is_plain(item.annotation, found[0]) for item in _parameters(*found) if item.required)
    return kind in ("Literal", "Any", "object") or kind in SCALARS


def _parameters(module: Module, node: ast.stmt) -> list[Parameter]:
    taken = signature(module, node)
    return [] if taken is None else list(taken.parameters.values())


def mismatches(value: Any, annotation: ast.expr | None, module: Module, path: str) -> list[str]:
    """The reasons why `value` at `path` does not fit, one line per place; empty if it fits."""
    if annotation is None or (isinstance(value, dict) and "_target_" in value):
        return []
    members = alternatives(annotation, module)
    attempts = [_mismatch(value, item, where, path) for where, item in members]
    if any(not attempt for attempt in attempts):
        return []
    # Report the union member that matched deepest: "views.0.blur: ..." helps more than "expected list[View] | None".
    inner = [attempt for attempt in attempts if attempt and not attempt[0].startswith(f"{path}: ")]
    if inner:
        return inner[0]
    choices = [item for _, member in members for item in _literals(member)]
    if (
        isinstance(value, str)
        and _reads_as_number(value)
        and "str" not in [_word(_head(member)) for _, member in members]
    ):
        # An environment variable always arrives as text, and so does a YAML value in quotes.
        return [
            f"{path}: expected {' or '.join(_shown(m, w) for w, m in members)}, got the text {value!r}; to use an"
            " environment variable as a number, write '${oc.decode:${oc.env:NAME}}'"
        ]
    near = difflib.get_close_matches(str(value), [str(item) for item in choices], n=1)
    hint = f"; did you mean {near[0]}?" if near and isinstance(value, str) else ""
    expected = " or ".join(_shown(member, where) for where, member in members)
    return [f"{path}: expected {expected}, got {shortened(value, 80)}{_kind(value)}{hint}"]


def argument_mismatches(
    given: dict[str, Any], taken: Signature, path: str, owner: str, supplied: Collection[str] = ()
) -> list[str]:
    """The reasons why a mapping does not fit a signature: unknown names, missing names, wrong types.

    Args:
        supplied: arguments that the program always passes although YAML could hold them, such as the width of the
            preceding network. The mapping must not contain them.
    """
    found = []
    for name, value in given.items():
        inner_path = f"{path}.{name}"
        if name in supplied:
            found.append(f"{inner_path}: the program sets this argument itself; leave it out")
        elif name in taken.parameters:
            found += mismatches(value, taken.parameters[name].annotation, taken.module, inner_path)
        elif not taken.open:
            names = [key for key, item in taken.parameters.items() if is_plain(item.annotation, taken.module)]
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(names) or 'nothing'}"
            found.append(f"{inner_path}: {owner} takes no such argument{hint}")
    for name, parameter in taken.parameters.items():
        if parameter.required and name not in {*given, *supplied} and is_plain(parameter.annotation, taken.module):
            found.append(
                f"{path}.{name}: {owner} needs it, expected {shown(parameter.annotation, taken.module)}, got nothing"
            )
    return found


def _mismatch(value: Any, annotation: ast.expr, module: Module, path: str) -> list[str]:
    """`mismatches` for one member of a union."""
    wrong = [f"{path}: does not fit"]
    kind = _word(_head(annotation))
    items = _items(annotation.slice) if isinstance(annotation, ast.Subscript) else []
    if kind in ("Any", "object"):
        return []
    if kind == "Annotated":
        inside = mismatches(value, items[0], module, path)
        # A mismatch inside the value gets its own line; a mismatch of the whole value is reported with its bounds.
        deeper = [line for line in inside if not line.startswith(f"{path}: ")]
        return deeper or (wrong if inside or not all(bound.holds(value) for bound in bounds(items[1:])) else [])
    if kind in SCALARS:
        fits = isinstance(value, SCALARS[kind]) and (kind == "bool" or not isinstance(value, bool))
        return [] if fits else wrong
    if kind == "Literal":
        return [] if any(value == item and type(value) is type(item) for item in _literals(annotation)) else wrong
    if kind in LISTS or kind in ("tuple", "Tuple"):
        if not isinstance(value, list):
            return wrong
        if kind in LISTS or not items or _is_ellipsis(items[-1]):
            items = items[:1] * len(value)
        elif len(items) != len(value):
            return wrong
        return [
            line
            for number, (member, item) in enumerate(zip(value, items, strict=False))
            for line in mismatches(member, item, module, f"{path}.{number}")
        ]
    if kind in DICTS:
        if not isinstance(value, dict):
            return wrong
        if len(items) < 2:
            return []
        return [line for key, item in value.items() for line in mismatches(item, items[1], module, f"{path}.{key}")]
    found = lookup(module, kind) if isinstance(annotation, ast.Name) else None
    if found is None:
        return []  # a type whose source cannot be read is not checked
    taken = signature(*found)
    if not isinstance(value, dict) or taken is None:
        return wrong
    return argument_mismatches(value, taken, path, kind)


def _head(annotation: ast.expr) -> ast.expr:
    return annotation.value if isinstance(annotation, ast.Subscript) else annotation


def _word(node: ast.expr) -> str:
    """The last name of an annotation: `list` -> "list", `typing.Optional` -> "Optional", `None` -> "None"."""
    if isinstance(node, ast.Constant) and node.value is None:
        return "None"
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _items(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def _literals(annotation: ast.expr) -> list[Any]:
    if not isinstance(annotation, ast.Subscript) or _word(annotation.value) != "Literal":
        return []
    return [item.value for item in _items(annotation.slice) if isinstance(item, ast.Constant)]


def bounds(declared: list[ast.expr]) -> list[Range | Length]:
    """The `Range(...)` and `Length(...)` in an Annotated (caco/ranges.py), parsed from source; other metadata is
    ignored."""
    calls = [item for item in declared if isinstance(item, ast.Call) and _word(item.func) in ("Range", "Length")]
    kinds: dict[str, type[Range] | type[Length]] = {"Range": Range, "Length": Length}
    found = []
    for call in calls:
        by_name = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        found.append(kinds[_word(call.func)](*map(ast.literal_eval, call.args), **by_name))
    return found


def shown(annotation: ast.expr | None, module: Module) -> str:
    """What a value is expected to be, in words: "int from 1", "list[float] of 3", "a or b"."""
    return (
        "a value"
        if annotation is None
        else " or ".join(_shown(member, where) for where, member in alternatives(annotation, module))
    )


def _shown(member: ast.expr, module: Module) -> str:
    kind, items = _word(_head(member)), _items(member.slice) if isinstance(member, ast.Subscript) else []
    if kind == "Literal":
        return " | ".join(map(str, _literals(member)))
    if kind == "Annotated":
        return shown(items[0], module) + "".join(map(str, bounds(items[1:])))
    if kind in LISTS and len(items) == 1:
        return f"list of {shown(items[0], module)}"
    return ast.unparse(member)


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "" if value is None or not hasattr(builtins, name) else f" ({name})"
