"""Whether the views of a recipe are what a method declares that it needs of them (caco/methods/base.py: Needs)."""

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf

from caco.config import folders, signatures
from caco.errors import UserError
from caco.runs.identity import read_yaml

LIGHTNESS_FIRST = ("lab", "ydbdr", "ycbcr")  # of Views.colours


def early_problems(tree: Mapping[str, Any]) -> list[str]:
    """Of a whole configuration, from what its classes declare; nothing is claimed of what cannot be read there."""
    needs, views = signatures.declared(str(tree["method"].get("_target_")), "needs"), tree["augmentation"].get("views")
    if not isinstance(needs, Mapping) or not isinstance(views, Mapping):
        return []
    cut = {name: view["patches"] for name, view in views.items() if isinstance(view, Mapping) and view.get("patches")}
    return problems(
        needs, next(iter(cut.values()), None), tree["augmentation"].get("colours", "rgb"), name=next(iter(cut), "")
    )


def refuse(needs: Mapping[str, Any], patches: Any, colours: str) -> None:
    """Of a method and views that were built.

    Args:
        needs: the fields of the method's Needs. patches, colours: of the Views.
    Raises:
        UserError: they do not fit.
    """
    shape = None if patches is None else {"grid": patches.grid, "shuffled": patches.shuffled}
    if found := problems(needs, shape, colours):
        raise UserError("\n".join(found))


def problems(
    needs: Mapping[str, Any], patches: Mapping[str, Any] | None, colours: str, *, name: str = "NAME"
) -> list[str]:
    """One line for each need that is not met.

    Args:
        patches: `grid` and `shuffled` of the view that is cut, which has that name; None where none is.
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
            f"augmentation: this method takes {number} of each image, and no view here is cut into patches; choose one"
            f" of {options}. Images of fewer than 24 pixels a side, as the digits, are too small for patches"
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
            f" {patches['grid']}"
        )
    if needs.get("lightness_first") and colours not in LIGHTNESS_FIRST:
        options = _options(lambda option: option.get("colours") in LIGHTNESS_FIRST)
        found.append(
            "augmentation: this method contrasts the lightness of an image with its colour, and needs"
            f" colours={', '.join(LIGHTNESS_FIRST)}; got {colours}; choose one of {options}. Grey images, as the"
            " digits, have no colour to contrast with"
        )
    return found


def _has_patches(option: Mapping[str, Any], *, shuffled: bool) -> bool:
    cut = [view["patches"] for view in option.get("views", {}).values() if view.get("patches")]
    return any(bool(patches.get("shuffled")) == shuffled for patches in cut)


def _options(fits: Callable[[Mapping[str, Any]], bool]) -> str:
    """The names of the augmentations that do."""
    names = []
    for name in folders.groups()["augmentation"]:
        file = folders.option_file("augmentation", name)
        option = OmegaConf.to_container(read_yaml(file)) if file else None
        if isinstance(option, dict) and fits({str(key): value for key, value in option.items()}):
            names.append(name)
    return ", ".join(names) or "your own that does"
