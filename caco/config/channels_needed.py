"""Checks that other settings suit data.channels=N: images used with the channels they are stored with, not as RGB."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from caco.config import signatures


def channels_of(cfg: DictConfig | Mapping[str, Any]) -> int | None:
    """data.channels of a configuration. None for photographs (read as RGB) and for a `data` without this setting."""
    data = cfg.get("data")
    return None if data is None else data.get("channels")


def problems(tree: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """One line for each setting that does not suit data.channels=N. Colour changes that come from a recipe's file are
    left out of the views with a note (see `left_out`); those that the command line asks for are refused."""
    channels, found = channels_of(tree), []
    if channels is None:
        return []
    augmentation = tree.get("augmentation") or {}
    if augmentation.get("colours", "rgb") != "rgb":
        found.append(
            f"augmentation.colours: expected rgb with data.channels={channels}, because the other colour spaces are"
            f" computed from 8-bit RGB; got {augmentation['colours']}; choose another augmentation"
        )
    views = augmentation.get("views")
    for name, view in views.items() if isinstance(views, Mapping) else ():
        if isinstance(view, Mapping) and view.get("then"):
            found.append(
                f"augmentation.views.{name}.then: its operations need 8-bit RGB, and data.channels={channels} is set;"
                f" remove them with '~augmentation.views.{name}.then', or choose another augmentation"
            )
    for item in overrides:
        key, _, value = item.lstrip("+~").partition("=")
        if item.startswith("~"):
            continue
        if key in ("augmentation.mean", "augmentation.std"):
            found.append(
                f"{key}: applies to photographs only; with data.channels={channels} set data.{key.rpartition('.')[2]}"
                " instead, or leave it out to have it measured"
            )
        elif key.startswith("augmentation.views.") and channels != 3 and _is_of_colour(key.rpartition(".")[2], value):
            found.append(
                f"{key}: images of {channels} channels have no hue, saturation or grey; expected 0 for these, or the"
                f" setting left out; got {value}"
            )
    for name, node in (tree.get("eval") or {}).items():
        if signatures.declared(str(node.get("_target_")), "reads_photographs"):
            found.append(
                f"eval.{name}: this evaluator reads its own photographs as 8-bit RGB, but this backbone takes"
                f" {channels} channels (data.channels); leave it out"
            )
    return found


def _is_of_colour(name: str, value: str) -> bool:
    """Whether this value of a view's setting asks for a change of saturation, hue or grey."""
    given = OmegaConf.from_dotlist([f"value={value}"]).value
    if name == "gray_p":
        return bool(given)
    return name == "jitter" and any(list(given)[2:])


def left_out(tree: Mapping[str, Any]) -> str | None:
    """A sentence that names the colour changes of the recipe which these images cannot have; None if there are none."""
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
        f"data.channels={channels}: the recipe's {', '.join(names)} are left out of the views, because only red, green"
        " and blue images have them"
        if names
        else None
    )
