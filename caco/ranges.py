"""The ranges of numbers and the lengths of lists, as types: what a constructor declares, caco/config/annotations.py holds a configuration to.

    def __init__(self, *, k: Count, temperature: AboveZero, scale: Interval): ...

To Python and mypy they are plain numbers and lists. A component of your own may use them, or declare others: `Annotated[int, Range(8, 512)]`;
the bounds have to be plain numbers, for they are read and not run. Imports nothing of caco.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

INT_MAX = 2**31 - 1  # more of anything is a slip, and too much for many a library's C


@dataclass(frozen=True)
class Range:
    """A number from `least` to `most`, both of them included, and between `above` and `below`, neither of which is."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None


@dataclass(frozen=True)
class Length:
    """A list, or a group of named settings, of at least `least` and at most `most` items."""

    least: int | None = None
    most: int | None = None


Count = Annotated[int, Range(least=1, most=2147483647)]  # of what there must be at least one
Several = Annotated[int, Range(least=2, most=2147483647)]
Natural = Annotated[int, Range(least=0, most=2147483647)]  # steps, epochs, processes: none is a number of them
Small = Annotated[int, Range(least=0, most=1000)]
Workers = Annotated[int, Range(least=0, most=1024)]  # processes of this machine
Seed = Annotated[int, Range(least=0, most=4294967295)]
Pixels = Annotated[int, Range(least=1, most=65535)]  # of a side
Width = Annotated[int, Range(least=1, most=1048576)]  # of a layer
Layers = Annotated[int, Range(least=1, most=1000)]
Finite = Annotated[float, Range(least=-1e30, most=1e30)]  # within float32, and its square within float64
AboveZero = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
ShareBelowOne = Annotated[float, Range(least=0, below=1)]  # momenta of optimisers: at 1 nothing is ever forgotten
ShareAboveZero = Annotated[float, Range(above=0, most=1)]
ProperShare = Annotated[float, Range(above=0, below=1)]
NumChannels = Annotated[int, Range(least=1, most=1024)]  # of an image as it is stored
Channels = Annotated[list[float], Length(least=3, most=3)]  # red, green, blue
Colour = Annotated[Sequence[Annotated[int, Range(least=0, most=255)]], Length(least=3, most=3)]  # a fill, of 8 bits
PositiveChannels = Annotated[list[AboveZero], Length(least=3, most=3)]
Betas = Annotated[Sequence[ShareBelowOne], Length(least=2, most=2)]
Interval = Annotated[Sequence[NonNegative], Length(least=2, most=2)]  # lowest and highest
ShareInterval = Annotated[Sequence[ShareAboveZero], Length(least=2, most=2)]  # lowest and highest
