"""Whether what is chosen beside data.channels=N goes with images as they are stored, of other than red, green and
blue.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from caco.config import signatures


def channels_of(cfg: DictConfig | Mapping[str, Any]) -> int | None:
    """data.channels of a configuration; None of photographs, also where `data` has no such setting."""
    data = cfg.get("data")
    return None if data is None else data.get("channels")


def problems(tree: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """One line for each setting that such images cannot have. What a recipe sets of colours is left out of their views,
    and said; what the command line sets of them is refused."""
    channels, found = channels_of(tree), []
    if channels is None:
        return []
    augmentation = tree.get("augmentation") or {}
    if augmentation.get("colours", "rgb") != "rgb":
        found.append(
            f"augmentation.colours: expected rgb with data.channels={channels}, for other spaces are made of red, green"
            f" and blue of 8 bits; got {augmentation['colours']}; choose another augmentation"
        )
    views = augmentation.get("views")
    for name, view in views.items() if isinstance(views, Mapping) else ():
        if isinstance(view, Mapping) and view.get("then"):
            found.append(
                f"augmentation.views.{name}.then: its operations are of RGB of 8 bits, and data.channels={channels};"
                f" leave them out, '~augmentation.views.{name}.then', or choose another augmentation"
            )
    for item in overrides:
        key, _, value = item.lstrip("+~").partition("=")
        if item.startswith("~"):
            continue
        if key in ("augmentation.mean", "augmentation.std"):
            found.append(
                f"{key}: is of photographs; with data.channels={channels} say data.{key.rpartition('.')[2]}, or leave"
                " it out to have it measured"
            )
        elif key.startswith("augmentation.views.") and channels != 3 and _is_of_colour(key.rpartition(".")[2], value):
            found.append(
                f"{key}: images of {channels} channels have no hue, saturation or grey; expected 0 for these, or it"
                f" left out; got {value}"
            )
    for name, node in (tree.get("eval") or {}).items():
        if signatures.declared(str(node.get("_target_")), "reads_photographs"):
            found.append(
                f"eval.{name}: reads photographs of its own, RGB of 8 bits, and this backbone takes"
                f" data.channels={channels}; leave it out"
            )
    return found


def _is_of_colour(name: str, value: str) -> bool:
    """Whether a setting of a view asks for saturation, hue or grey."""
    given = OmegaConf.from_dotlist([f"value={value}"]).value
    if name == "gray_p":
        return bool(given)
    return name == "jitter" and any(list(given)[2:])


def left_out(tree: Mapping[str, Any]) -> str | None:
    """Which parts of a recipe the views of such images go without, in a sentence; None where it has none of them."""
    channels, views = channels_of(tree), (tree.get("augmentation") or {}).get("views")
    if channels in (None, 3) or not isinstance(views, Mapping):
        return None
    parts = {"saturation": False, "hue": False, "grey": False}
    for view in views.values():
        jitter = view.get("jitter", [0.4, 0.4, 0.4, 0.1]) if view.get("jitter_p", 0.8) else [0, 0, 0, 0]
        parts["saturation"] |= jitter[2] > 0
        parts["hue"] |= jitter[3] > 0
        parts["grey"] |= view.get("gray_p", 0.2) > 0
    names = [name for name, is_set in parts.items() if is_set]
    return (
        f"data.channels={channels}: views have no {', '.join(names)}, which the recipe sets and only red, green and"
        " blue have"
        if names
        else None
    )
