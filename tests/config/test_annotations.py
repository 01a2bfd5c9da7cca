"""Which plain values fit which type annotation, and the message for a value that does not."""

import ast

import pytest

from caco.config.annotations import argument_mismatches, is_plain, mismatches
from caco.config.signatures import Module, find, load

SOURCE = """
from pathlib import Path
from typing import Any, Literal, Optional, Sequence, TypedDict, Union
import torch
from torch import nn

Kind = Literal["epoch", "end"]
Rate = float | None

class View(TypedDict):
    scale: list[float]
    kind: Kind

class Opaque:
    pass

def f(parameters: list[nn.Parameter], *, device: torch.device, backbone: nn.Module, rate: float, views: list[View],
      steps: int = 1, extra: "Optional[nn.Module]" = None): ...
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("lib") / "m.py"
    path.write_text(SOURCE)
    return Module("m", path)


def wrong(value, annotation: str, module) -> list[str]:
    return mismatches(value, ast.parse(annotation, mode="eval").body, module, "here")


FITS = [
    (3, "int"),
    (3, "float"),
    (0.5, "float"),
    (True, "bool"),
    ("a", "str"),
    ("a", "Path"),
    (None, "int | None"),
    (None, "Optional[int]"),
    (None, "Rate"),
    (3, "Rate"),
    (3, "'int'"),
    ("a", "Union[str, float]"),
    ("epoch", "Kind"),
    ("end", "Literal['epoch', 'end'] | None"),
    ([], "list[int]"),
    ([1, 2.5], "list[float]"),
    ([1, 2], "Sequence[int]"),
    ([1, "a"], "tuple[int, str]"),
    ([1, 2, 3], "tuple[int, ...]"),
    ({"a": 1}, "dict[str, int]"),
    ({"a": "b"}, "dict"),
    ([1, None], "list"),
    (object, "Any"),
    ({"scale": [0.1, 1], "kind": "end"}, "View"),
    ([{"scale": [], "kind": "end"}], "list[View]"),
    ({"_target_": "m.Opaque"}, "Opaque"),
    (3, "somewhere.Alias"),
]
WRONG = [
    ("3", "int"),
    (3.0, "int"),
    (True, "int"),
    (True, "float"),
    (1, "bool"),
    (1, "str"),
    (None, "int"),
    ("a", "Rate"),
    ("epochs", "Kind"),
    (1, "Literal['1']"),
    (True, "Literal[1]"),
    (3, "list[int]"),
    ("ab", "list[str]"),
    ([1, "a"], "list[int]"),
    ([1], "tuple[int, str]"),
    ({"a": "b"}, "dict[str, int]"),
    ([], "dict"),
    (3, "Opaque"),
    ({"scale": [0.1]}, "View"),
    ({"scale": 0.1, "kind": "end"}, "View"),
    ({"scale": [], "kind": "end", "blur": 1}, "View"),
]


@pytest.mark.parametrize("value, annotation", FITS)
def test_fits(value, annotation, module):
    assert wrong(value, annotation, module) == []


@pytest.mark.parametrize("value, annotation", WRONG)
def test_does_not_fit(value, annotation, module):
    assert len(wrong(value, annotation, module)) == 1


@pytest.mark.parametrize(
    "value, annotation, said",
    [
        ("x", "int", "here: expected int, got 'x' (str)"),
        (None, "int | str", "here: expected int or str, got None"),
        ("ends", "Kind", "here: expected epoch | end, got 'ends' (str); did you mean end?"),
        ([0, "a"], "list[float] | None", "here.1: expected float, got 'a' (str)"),
        ([{"scale": [1, "b"], "kind": "end"}], "list[View]", "here.0.scale.1: expected float, got 'b' (str)"),
        (
            {"scal": [], "kind": "end", "scale": []},
            "View",
            "here.scal: View takes no such argument; did you mean scale?",
        ),
    ],
)
def test_the_message_names_the_place_the_expected_and_the_got(value, annotation, said, module):
    assert wrong(value, annotation, module) == [said]


def test_the_program_supplies_what_yaml_cannot_hold(module):
    from caco.config.signatures import signature

    taken = signature(module, module.nodes["f"])
    supplied = [name for name, item in taken.parameters.items() if not is_plain(item.annotation, module)]
    assert supplied == ["parameters", "device", "backbone", "extra"], (
        "views is a group of settings, so it is not supplied by the program"
    )
    missing = [
        "optimizer.rate: f needs it, expected float, got nothing",
        "optimizer.views: f needs it, expected list of View, got nothing",
    ]
    assert argument_mismatches({}, taken, "optimizer", "f") == missing
    assert argument_mismatches({}, taken, "optimizer", "f", supplied=["rate", "views"]) == []
    assert argument_mismatches({"rate": 1}, taken, "optimizer", "f", supplied=["rate", "views"]) == [
        "optimizer.rate: the program sets this argument itself; leave it out"
    ]


def test_annotations_of_libraries_are_understood():
    taken = find("torch.optim.SGD")
    assert argument_mismatches({"lr": 0.1, "momentum": 0, "nesterov": True}, taken, "o", "SGD") == []
    assert [line.split(":")[0] for line in argument_mismatches({"lr": "x", "nesterov": 1}, taken, "o", "SGD")] == [
        "o.lr",
        "o.nesterov",
    ]
    assert load("torch.optim.sgd") is not None


def test_numbers_are_held_to_their_declared_range_and_lists_to_their_length(tmp_path, monkeypatch):
    """Ranges are read from the source, also through an alias and in a list; the message states them in words."""
    from caco.config import signatures

    source = """
from collections.abc import Sequence
from typing import Annotated
from caco.ranges import Length, Range, ShareBelowOne

def f(
    *, k: Annotated[int, Range(least=1, most=9)], m: ShareBelowOne | None,
    x: Annotated[Sequence[ShareBelowOne], Length(least=2, most=2)],
): ...
"""
    (tmp_path / "ranged_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    signatures.forget()
    taken = find("ranged_module.f")
    assert argument_mismatches({"k": 9, "m": None, "x": [0, 0.5]}, taken, "o", "f") == []
    assert argument_mismatches({"k": 0, "m": 1.0, "x": [0.5]}, taken, "o", "f") == [
        "o.k: expected int from 1 up to 9, got 0 (int)",
        "o.m: expected float from 0 below 1 or None, got 1.0 (float)",
        "o.x: expected list of float from 0 below 1, 2 of them, got [0.5] (list)",
    ]
    assert argument_mismatches({"k": 1, "m": "0.5", "x": [0, 1]}, taken, "o", "f") == [
        (
            "o.m: expected float from 0 below 1 or None, got the text '0.5'; to use an environment variable as a"
            " number, write '${oc.decode:${oc.env:NAME}}'"
        ),
        "o.x.1: expected float from 0 below 1, got 1 (int)",
    ]
