"""Names and colours of runs for MLflow's page, which shows some 20 characters of a name and draws each run's charts in
the run's colour.
"""

import colorsys
from collections.abc import Iterator, Sequence

FITS = 20  # characters that fit the column of names and the list beside the charts (MLflow 3.17: 190 pixels)
_COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
)  # fmt: skip
OF_SWEEPS = "#000000"
_GOLDEN = 0.381966  # step around the colour circle that keeps each hue far from the previous ones


def short(name: str) -> str:
    """A run's name, shortened to fit the page if possible: `pn=both bank=tiny seed=1` -> `both tiny seed=1`,
    `bank.lr=3` -> `lr=3`.

    The name of an option tells its group; a number or a switch needs its key.
    """
    for shorten in (_without_groups, _last_parts):
        if len(name) <= FITS:
            break
        name = " ".join(map(shorten, name.split()))
    return name


def short_sweep(title: str, keys: Sequence[str]) -> str:
    """A sweep's name, shortened to fit the page if possible: what varies, as `pn=both,none` or `pn x bank x seed`.

    Args:
        keys: the keys that vary; a long title may be cut off before it names all of them.
    """
    varied = [word for word in title.split() if word.partition("=")[0] in keys]
    if len(title) <= FITS or not keys:
        return title
    whole = " ".join(varied)
    if len(varied) == len(keys) and len(whole) <= FITS:
        return whole
    named = [word.partition("=")[0] for word in varied] if len(varied) == len(keys) else keys
    return " x ".join(key.rpartition(".")[2] for key in named)


def colours() -> Iterator[str]:
    """An endless sequence of colours, without repetition among the first thousand: ten that are easy to tell apart,
    then hues around the colour circle.
    """
    yield from _COLOURS
    seen, number = {*_COLOURS, OF_SWEEPS}, 0
    while True:
        number += 1
        hue, lightness = number * _GOLDEN % 1, (0.45, 0.28, 0.7)[number % 3]
        colour = "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, 0.6))
        if colour not in seen:
            seen.add(colour)
            yield colour


def _without_groups(word: str) -> str:
    key, _, value = word.partition("=")
    is_option = (
        "." not in key
        and value[:1].isalnum()
        and not value.replace(".", "").isdigit()
        and value not in ("true", "false", "null")
    )
    return value if is_option else word


def _last_parts(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"{key.rpartition('.')[2]}{equals}{value}"
