"""Checks that the views of an augmentation meet the needs that a method declares (caco/methods/base.py: Needs)."""

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf

from caco.config import folders, signatures
from caco.errors import UserError
from caco.runs.identity import read_yaml

LIGHTNESS_FIRST = ("lab", "ydbdr", "ycbcr")  # values of Views.colours whose first channel is lightness


def early_problems(tree: Mapping[str, Any]) -> list[str]:
    """`problems` of a configuration, from what its classes declare; empty if the declarations cannot be read."""
    needs, views = signatures.declared(str(tree["method"].get("_target_")), "needs"), tree["augmentation"].get("views")
    if not isinstance(needs, Mapping) or not isinstance(views, Mapping):
        return []
    cut = {name: view["patches"] for name, view in views.items() if isinstance(view, Mapping) and view.get("patches")}
    return problems(
        needs, next(iter(cut.values()), None), tree["augmentation"].get("colours", "rgb"), name=next(iter(cut), "")
    )


def refuse(needs: Mapping[str, Any], patches: Any, colours: str) -> None:
    """Check a method and views that have been built.

    Args:
        needs: the fields of the method's Needs. patches, colours: of the Views.
    Raises:
        UserError: the views do not meet the needs.
    """
    shape = None if patches is None else {"grid": patches.grid, "shuffled": patches.shuffled}
    if found := problems(needs, shape, colours):
        raise UserError("\n".join(found))


def problems(
    needs: Mapping[str, Any], patches: Mapping[str, Any] | None, colours: str, *, name: str = "NAME"
) -> list[str]:
    """One line for each need that is not met.

    Args:
        patches: `grid` and `shuffled` of the view that is cut into patches, whose name is `name`; None if no view is.
    """
    wanted, found = needs.get("patches", "none"), []
    number = f"{count} patches" if (count := needs.get("num_patches")) else "patches"
    if wanted == "none" and patches is not None:
        found.append(
            f"augmentation: its view {name} is cut into patches, which this method does not take; leave it out "
            f"('~augmentation.views.{name}'), or choose another augmentation"
        )
    elif wanted != "none" and patches is None:
        options = _options(lambda option: _has_patches(option, shuffled=wanted == "shuffled"))
        found.append(
            f"augmentation: this method takes {number} of each image, and no view of this augmentation is cut into"
            f" patches; choose one of {options}. Images with sides below 24 pixels, such as the digits, are too small"
            " for patches"
        )
    elif patches is not None and (shuffled := bool(patches.get("shuffled"))) != (wanted == "shuffled"):
        found.append(
            f"augmentation: this method takes patches {'in a random order' if wanted == 'shuffled' else 'row by row'};"
            f" expected augmentation.views.{name}.patches.shuffled={str(not shuffled).lower()}, got"
            f" {str(shuffled).lower()}"
        )
    if patches is not None and count and count != patches["grid"] ** 2:
        found.append(
            f"augmentation: this method takes {number} of each image; got a grid of {patches['grid']} x"
            f" {patches['grid']} patches"
        )
    if needs.get("lightness_first") and colours not in LIGHTNESS_FIRST:
        options = _options(lambda option: option.get("colours") in LIGHTNESS_FIRST)
        found.append(
            "augmentation: this method contrasts the lightness of an image with its colour, and needs"
            f" colours={', '.join(LIGHTNESS_FIRST)}; got {colours}; choose one of {options}. Grey images, such as the"
            " digits, have no colour to contrast with"
        )
    return found


def _has_patches(option: Mapping[str, Any], *, shuffled: bool) -> bool:
    cut = [view["patches"] for view in option.get("views", {}).values() if view.get("patches")]
    return any(bool(patches.get("shuffled")) == shuffled for patches in cut)


def _options(fits: Callable[[Mapping[str, Any]], bool]) -> str:
    """The names of the augmentations that fit, for a message."""
    names = []
    for name in folders.groups()["augmentation"]:
        file = folders.option_file("augmentation", name)
        option = OmegaConf.to_container(read_yaml(file)) if file else None
        if isinstance(option, dict) and fits({str(key): value for key, value in option.items()}):
            names.append(name)
    return ", ".join(names) or "your own that does"
