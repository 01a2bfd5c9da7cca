"""Each number that a configuration gives to a constructor has a declared range, or is in a list of declared length."""

import ast
import importlib
import inspect
import types
import typing
from collections.abc import Sequence

import pytest
import yaml

from caco.config.annotations import bounds
from caco.config.composition import CONF
from caco.errors import UserError
from caco.ranges import AboveZero, Count, Length, PositiveChannels, Range, held


def targets(tree):
    if isinstance(tree, dict):
        if isinstance(tree.get("_target_"), str):
            yield tree["_target_"]
        tree = list(tree.values())
    for part in tree if isinstance(tree, list) else []:
        yield from targets(part)


TARGETS = sorted(
    {
        name
        for file in CONF.rglob("*.yaml")
        for name in targets(yaml.safe_load(file.read_text()))
        if name.startswith("caco.")
    }
)


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
    assert not any(
        map(
            has_bare_number,
            (str, typing.Annotated[int, Range(least=1)] | None, typing.Annotated[list[float], Length(least=3)]),
        )
    )


@pytest.mark.parametrize("target", TARGETS)
def test_no_argument_is_a_number_without_a_range(target):
    module, _, name = target.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    hints = typing.get_type_hints(made.__init__ if inspect.isclass(made) else made, include_extras=True)
    assert [argument for argument, hint in hints.items() if argument != "return" and has_bare_number(hint)] == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_constructor_holds_whoever_calls_it_to_what_it_declares(target):
    """Ranges, lengths and allowed words are declared once; a class built directly in Python refuses the same values as
    one built from a configuration.
    """
    module, _, name = target.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    if not inspect.isclass(made):
        return
    hints = typing.get_type_hints(made.__init__, include_extras=True)
    declared = [
        hint
        for argument, hint in hints.items()
        if argument != "return" and any(word in str(hint) for word in ("Range(", "Length(", "Literal["))
    ]
    assert not declared or hasattr(made.__init__, "__wrapped__")


class Part:
    @held
    def __init__(
        self, *, k: Count = 1, temperature: AboveZero | None = None, when: typing.Literal["epoch", "end"] = "end",
        mean: PositiveChannels = [1, 1, 1],
        own: typing.Annotated[int, Range(8, 512)] = 8,
    ):  # fmt: skip
        self.k = k


@pytest.mark.parametrize(
    "given, told",
    [
        ({"k": 0}, "Part: k: expected int from 1, got 0"),
        (
            {"temperature": 0.0, "when": "now"},
            r"Part: temperature: expected float above 0 or None, got 0.0; when: expected epoch \| end, got 'now'",
        ),
        ({"temperature": float("nan")}, "temperature: expected float above 0 or None, got nan"),
        ({"mean": [1, 0, 1]}, r"mean: expected list of float above 0, 3 of them, got \[1, 0, 1\]"),
        ({"mean": (1, 2)}, r"mean: .*3 of them, got \(1, 2\)"),
        ({"own": 7}, "own: expected int from 8 up to 512, got 7"),
    ],
)
def test_what_is_out_of_its_range_is_refused_in_one_sentence(given, told):
    with pytest.raises(UserError, match=told):
        Part(**given)


def test_what_is_in_its_range_is_taken_and_who_misses_an_argument_hears_it_from_python():
    assert Part(k=1, temperature=None, when="epoch", mean=[0.1, 1, 2.5]).k == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'nope'"):
        Part(nope=1)


def test_bounds_without_names_are_read_too():
    source = (
        "from typing import Annotated\nfrom caco.ranges import Range\ndef f(k: Annotated[int, Range(8, 512)]): ...\n"
    )
    annotation = ast.parse(source).body[2].args.args[0].annotation
    assert bounds(annotation.slice.elts[1:]) == [Range(least=8, most=512)]
