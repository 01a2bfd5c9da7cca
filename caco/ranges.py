"""Ranges of numbers and lengths of lists, as types.

If a constructor declares its arguments like this, caco/config/annotations.py checks a configuration against them before
anything is built, and `held` checks every caller in Python:

    @held
    def __init__(self, *, k: Count, temperature: AboveZero, scale: Interval): ...

For Python and mypy they are plain numbers and lists. The user's own components may use them, or declare others such as
`Annotated[int, Range(8, 512)]`. Bounds must be plain numbers, because they are read from the source and not executed.
"""

import functools
import math
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, TypeVar

from caco.errors import UserError

P = ParamSpec("P")
S = TypeVar("S")
INT_MAX = 2**31 - 1  # anything larger is a mistake, and too large for the C code of many libraries


@dataclass(frozen=True)
class Range:
    """A number from `least` to `most` inclusive, and between `above` and `below` exclusive."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: Any) -> bool:
        """Whether a number is in the range. True for anything that is not a number, because other types say what it
        should be.
        """
        if not isinstance(value, Real):
            return True
        number = float(value)
        least, most = (-math.inf if self.least is None else self.least), (math.inf if self.most is None else self.most)
        inside = (self.above is None or number > self.above) and (self.below is None or number < self.below)
        return math.isfinite(number) and least <= number <= most and inside

    def __str__(self) -> str:
        words = {
            "from {:g}": self.least,
            "above {:g}": self.above,
            "up to {:.10g}": self.most,
            "below {:g}": self.below,
        }
        return "".join(f" {text.format(bound)}" for text, bound in words.items() if bound not in (None, INT_MAX))


@dataclass(frozen=True)
class Length:
    """A list, or a group of named settings, of at least `least` and at most `most` items."""

    least: int | None = None
    most: int | None = None

    def holds(self, value: Any) -> bool:
        if not isinstance(value, Sequence | Mapping) or isinstance(value, str):
            return True
        return (self.least is None or len(value) >= self.least) and (self.most is None or len(value) <= self.most)

    def __str__(self) -> str:
        number = f"{self.least} or more" if self.most is None else f"{self.least or 0} to {self.most}"
        return f", {self.least if self.least == self.most else number} of them"


def held(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """A decorator for a constructor, which then refuses what its declared types exclude. So a part built in Python is
    checked like one from a configuration.

    Raises, when the constructor is called:
        UserError: names each argument that is out of range, of a wrong length, or not a word of its Literal.
    """

    @functools.wraps(init)
    def checked(self: S, *args: P.args, **kwargs: P.kwargs) -> None:
        refuse_outside(type(self).__name__, _hints(init), kwargs)
        init(self, *args, **kwargs)

    return checked


def hold_fields(made: Any) -> None:
    """The same check as `held`, for the `__post_init__` of a dataclass."""
    refuse_outside(type(made).__name__, _hints(made.__class__), vars(made))


def refuse_outside(owner: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    wrong = [name for name, value in values.items() if name in hints and not _fits(value, hints[name])]
    if wrong:
        raise UserError(
            f"{owner}: "
            + "; ".join(f"{name}: expected {_words(hints[name])}, got {values[name]!r:.80}" for name in wrong)
        )


@functools.cache
def _hints(of: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(of, include_extras=True)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(value, parts[0]) and all(
            mark.holds(value) for mark in hint.__metadata__ if isinstance(mark, Range | Length)
        )
    if origin in (typing.Union, types.UnionType):
        members = [part for part in parts if part is not type(None)]
        return value is None and len(members) < len(parts) or any(_fits(value, part) for part in members)
    if origin is Literal:
        return value in parts
    if origin in (list, Sequence) and isinstance(value, Sequence) and not isinstance(value, str):
        return all(_fits(item, parts[0]) for item in value)
    return True


def _words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _words(parts[0]) + "".join(str(mark) for mark in hint.__metadata__ if isinstance(mark, Range | Length))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("None" if part is type(None) else _words(part) for part in parts)
    if origin is Literal:
        return " | ".join(map(str, parts))
    return f"list of {_words(parts[0])}" if origin in (list, Sequence) else getattr(hint, "__name__", str(hint))


Count = Annotated[int, Range(least=1, most=2147483647)]
Several = Annotated[int, Range(least=2, most=2147483647)]
Natural = Annotated[int, Range(least=0, most=2147483647)]  # such as numbers of steps, epochs, processes
Small = Annotated[int, Range(least=0, most=1000)]
Ahead = Annotated[int, Range(least=1, most=1024)]  # batches that are made before they are asked for, and lie in memory
Workers = Annotated[int, Range(least=0, most=1024)]  # processes of this machine
Threads = Annotated[int, Range(least=1, most=1024)]
Seed = Annotated[int, Range(least=0, most=4294967295)]
Pixels = Annotated[int, Range(least=1, most=65535)]  # a side of an image
Side = Annotated[int, Range(least=2, most=65535)]  # a side of an image with several positions
Width = Annotated[int, Range(least=1, most=1048576)]  # a layer's width
Layers = Annotated[int, Range(least=1, most=1000)]
Finite = Annotated[float, Range(least=-1e30, most=1e30)]  # fits float32; its square fits float64
AboveZero = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
ShareBelowOne = Annotated[float, Range(least=0, below=1)]  # such as an optimiser's momentum, which at 1 forgets nothing
ShareAboveZero = Annotated[float, Range(above=0, most=1)]
ProperShare = Annotated[float, Range(above=0, below=1)]
NumChannels = Annotated[int, Range(least=1, most=1024)]  # channels of an image as it is stored
Channels = Annotated[list[float], Length(least=3, most=3)]  # red, green, blue
Colour = Annotated[Sequence[Annotated[int, Range(least=0, most=255)]], Length(least=3, most=3)]  # an 8-bit fill colour
PositiveChannels = Annotated[list[AboveZero], Length(least=3, most=3)]
Betas = Annotated[Sequence[ShareBelowOne], Length(least=2, most=2)]
Interval = Annotated[Sequence[NonNegative], Length(least=2, most=2)]  # lowest and highest
PositiveInterval = Annotated[Sequence[AboveZero], Length(least=2, most=2)]
ShareInterval = Annotated[Sequence[ShareAboveZero], Length(least=2, most=2)]  # lowest and highest
