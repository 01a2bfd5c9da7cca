"""Each number that a configuration gives a constructor has a range, or stands in a list of a declared length."""

import importlib
import inspect
import types
import typing
from collections.abc import Sequence

import pytest
import yaml

from caco.config.composition import CONF
from caco.ranges import Length, Range


def targets(tree):
    if isinstance(tree, dict):
        if isinstance(tree.get("_target_"), str):
            yield tree["_target_"]
        tree = list(tree.values())
    for part in tree if isinstance(tree, list) else []:
        yield from targets(part)


TARGETS = sorted({name for file in CONF.rglob("*.yaml") for name in targets(yaml.safe_load(file.read_text())) if name.startswith("caco.")})


def has_bare_number(hint) -> bool:
    if hint in (int, float):
        return True
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return not any(isinstance(mark, Range | Length) for mark in hint.__metadata__) and has_bare_number(parts[0])
    if origin in (list, tuple, Sequence, typing.Union, types.UnionType):
        return any(map(has_bare_number, parts))
    return False


def test_a_bare_number_is_seen():
    assert all(map(has_bare_number, (int, float | None, list[float], Sequence[int] | None)))
    assert not any(map(has_bare_number, (str, typing.Annotated[int, Range(least=1)] | None, typing.Annotated[list[float], Length(least=3)])))


@pytest.mark.parametrize("target", TARGETS)
def test_no_argument_is_a_number_without_a_range(target):
    module, _, name = target.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    hints = typing.get_type_hints(made.__init__ if inspect.isclass(made) else made, include_extras=True)
    assert [argument for argument, hint in hints.items() if argument != "return" and has_bare_number(hint)] == []
