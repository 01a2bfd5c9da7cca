"""Loads weights from files: caco's own checkpoints, released checkpoints of many families, and files of torchvision and
timm.

Whatever the file's layout is, its tensors first get the names of a method's state_dict (caco/nn/formats.py). From there
on all files are treated in the same way.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from caco.errors import UserError
from caco.nn.formats import BACKBONE, EVALUATED, FORMATS, HEADS_OF_384, TWIN, Reading, below, reading
from caco.runs import checkpoint, pickle_size

CLASSIFIERS = (
    "fc.",
    "head.",
    "classifier.",
)  # classifiers of torchvision's and timm's models, left out if the backbone has none
OWN_OF_A_RUN = ("rows.velocity", "rows.uses")  # a bank's momentum and statistics, which a new run begins anew
CHOICES = ("online", "twin")


class Initialised(Protocol):
    """What `initialise` needs of a method: its child modules, one of which is called `encoder`."""

    @property
    def backbone(self) -> nn.Module: ...

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...

    def overwritten(self) -> set[str]: ...


def initialise(method: Initialised, path: Path | str, format: str | None) -> str:
    """Load the weights of a file into a freshly built method. Returns a message that says which parts were loaded.

    The backbone must fit. The projector, the momentum twin, the bank and all other parts of the method are loaded if
    the file holds them in the same shapes; if not, they stay as they were initialised, except that the twin becomes a
    copy of the encoder. The bank is loaded only together with its projector. Parts that the run overwrites anyway are
    not loaded. The message gives the reason why a bank was not loaded.

    Args:
        method: the method.
        path, format: as in `read`.
    Raises:
        ValueError: as in `load_backbone`.
    """
    found = read(path, format)
    named = found.named
    parts = dict(method.named_children())
    encoder, twin, bank = parts.pop("encoder"), parts.pop("twin", None), parts.pop("bank", None)
    projector = encoder.get_submodule("projector")
    filled = _fill_backbone(encoder.get_submodule("backbone"), below(named, BACKBONE), path, found, _family(format))
    loaded, fresh = ["backbone"], list[str]()

    def take(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> bool:
        fits = not any(_mismatches(module, tensors))
        if fits:
            module.load_state_dict(tensors, strict=False)
        (loaded if fits else fresh).append(name)
        return fits

    has_projector = take("projector", projector, below(named, "encoder.projector."))
    for name, module in parts.items():  # a predictor, for example
        if name not in method.overwritten() and module.state_dict():
            take(name, module, below(named, f"{name}."))
    if twin is not None:
        of_twin = twin.get_submodule("encoder")
        theirs = below(named, "twin.encoder.")
        if not has_projector:
            theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith("projector.")}
            theirs |= {f"projector.{name}": tensor for name, tensor in projector.state_dict().items()}
        if any(_mismatches(of_twin, theirs)):
            of_twin.load_state_dict(encoder.state_dict())
            loaded.append("twin (a copy of the encoder)")
        else:
            of_twin.load_state_dict(theirs, strict=False)
            loaded.append("twin")
    if bank is not None:
        rows = {name: tensor for name, tensor in below(named, "bank.").items() if name not in OWN_OF_A_RUN}
        whole = (getattr(bank, "size"), bank.get_parameter("rows.weight").shape[1])  # of the bank over all ranks
        shape = tuple(rows["rows.weight"].shape) if "rows.weight" in rows else None
        why_not = (
            "the file has none" if shape is None
            else "the warm start fills it" if "bank" in method.overwritten()
            else f"{shape[0]:,} x {shape[1]} there, {whole[0]:,} x {whole[1]} here" if shape != whole
            else None if has_projector else "its projector does not fit"
        )  # fmt: skip
        if why_not is None:
            bank.load_state_dict(rows, strict=False)
            loaded.append("bank")
        else:
            fresh.append(f"bank ({why_not})")
    message = f"{filled}\ncaco: weights of {path} ({format or found.family}): {', '.join(loaded)}"
    return message + (f"; as initialised: {', '.join(fresh)}" if fresh else "")


def load_backbone(path: Path | str, format: str | None, backbone: nn.Module) -> str:
    """Load the weights of a file into a backbone. Returns a message that says what was loaded.

    If the file holds an encoder and its momentum twin, the encoder's backbone is loaded, unless the family evaluates
    the twin's (DINO) or the run that saved the file did.

    Args:
        path, format: as in `read`.
        backbone: the network to fill.
    Raises:
        ValueError: as in `read`; or the file's network has another architecture.
    """
    found = read(path, format)
    return _fill_backbone(
        backbone, below(found.named, EVALUATED) or below(found.named, BACKBONE), path, found, _family(format)
    )


def read(path: Path | str, format: str | None) -> Reading:
    """The tensors of a file under the names of a method's state_dict, on the CPU. Nothing in the file is executed.

    Args:
        path: a file written by torch.save, or a .safetensors file.
        format: one of `FORMATS` (docs/weights.md), or None to recognise the format by the file's keys. `FORMAT:twin`
            takes the momentum twin's weights (or the average that timm's training saves) as the encoder's;
            `FORMAT:online` takes the encoder's own weights even if the family evaluates the twin's.
    Raises:
        ValueError: there is no such file or format; the file is damaged, holds more than data, or looks like another
            format.
    """
    family, _, choice = (format or "").partition(":")
    if family and family not in FORMATS or choice and choice not in CHOICES:
        raise UserError(
            f"format: expected one of {', '.join(FORMATS)}, or one of them followed by :online or :twin; got {format!r}"
        )
    content = _content(Path(path))
    try:
        found = reading(content if isinstance(content, dict) else {}, choice or None)
    except UserError as error:
        raise UserError(f"weights={path}: {error}") from error
    except (
        LookupError,
        ValueError,
        RuntimeError,
    ) as error:  # tensors that have to be joined are missing, or their shapes do not go together
        raise UserError(
            f"weights={path}: its keys are those of a known family, but its tensors do not fit together"
            f" ({str(error).splitlines()[0][:100]})"
        ) from error
    if not found.named:
        keys = (
            [key[:60] if isinstance(key, str) else type(key).__name__ for key in list(content)[:5]]
            if isinstance(content, dict)
            else []
        )
        shown = ", ".join(keys) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"weights={path}: expected a network's state_dict; got {shown or 'nothing'}")
    if family and family not in found.formats:
        others = " or ".join(f"format={name}" for name in found.formats)
        raise UserError(f"weights={path}: its keys look like {others} ({found.family}); got format={format}")
    return _chosen(found, choice, path)


def _chosen(found: Reading, choice: str, path: Path | str) -> Reading:
    """The reading with the encoder that the user chose: "online", "twin", or "" for the family's own."""
    if not choice:
        return found
    named = {name: tensor for name, tensor in found.named.items() if not name.startswith(EVALUATED)}
    if choice == "twin":
        if not below(named, TWIN + BACKBONE):
            raise UserError(
                f"weights={path}: format=...:twin expects a file with a momentum twin or an average of the weights;"
                f" this file of {found.family} has none"
            )
        encoder = below(named, TWIN)
        named = {name: tensor for name, tensor in named.items() if not name.startswith("encoder.")} | encoder
    return Reading(found.family, found.formats, named, found.left, choice)


def _family(format: str | None) -> str | None:
    return None if format is None else format.partition(":")[0]


class _Inert:
    """Stands in for objects that training saves beside the weights: accepts anything, holds nothing, does nothing."""

    def __init__(self, *_: object) -> None:
        """Accept any arguments."""

    def __setstate__(self, _: object) -> None:
        """Accept any state."""


# Classes of argparse's settings and NumPy's numbers, by their old and new names: DINO, SwAV, CMC and torchvision save
# such objects. Where a file names one of these classes, an `_Inert` is made instead.
INERT = ("argparse.Namespace", "numpy.dtype") + tuple(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core"))
ELSEWHERE = {
    ".pkl": (
        "a .pkl file, which runs code when it is read (BYOL and detectron2 use them). Take a converted file, or the"
        " file that it was made from"
    ),
    ".index": "a checkpoint of TensorFlow's: convert it first (github.com/tonylins/simclr-converter does SimCLR's)",
}


def _content(path: Path) -> object:
    if not path.is_file():
        raise UserError(f"weights={path}: there is no such file")
    if path.suffix in ELSEWHERE:
        raise UserError(f"weights={path}: expected a file of torch.save, or .safetensors; got {ELSEWHERE[path.suffix]}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in INERT]):
            if zipfile.is_zipfile(path):
                return checkpoint.contents(path)
            with open(path, "rb") as file:  # torch before 1.6 wrote five pickles, followed by the numbers
                for _ in range(5):
                    pickle_size.check(file, str(path))
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError as error:
        code = _code(error.__cause__)
        raise UserError(
            f"weights={path}: expected a file of tensors, numbers and text, of which nothing is ever run; "
            f"{code or f'it is of another kind, or damaged: {error}'}"
        ) from error
    except Exception as error:  # a damaged file can make torch's reader raise anything
        why = _code(error) or f"it is of another kind, or damaged: {type(error).__name__}"
        raise UserError(
            f"weights={path}: expected a file of tensors, numbers and text, of which nothing is ever run; {why}"
        ) from error


def _code(error: BaseException | None) -> str | None:
    """What the file wanted to have run, if it was refused for that reason; else None. torch's own message is not passed
    on, because it goes on to recommend running it.
    """
    found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return f"it asks for {found[1]}" if found else None


def _mismatches(module: nn.Module, tensors: dict[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """The names that are missing, the names that are unexpected, and the tensors of another shape."""
    own = module.state_dict()
    # Files from before 2018 do not hold BatchNorm's counts of batches. Only a BatchNorm without momentum reads them.
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    return missing, unexpected, shapes


def _fill_backbone(
    backbone: nn.Module, tensors: dict[str, Tensor], path: Path | str, found: Reading, family: str | None
) -> str:
    """Load all of the backbone's tensors. Returns a message that says what was loaded, left out and missing.

    Raises:
        UserError: the file's network has another architecture.
    """
    own, given = backbone.state_dict(), len(tensors)
    tensors = {name: value for name, value in tensors.items() if name in own or not name.startswith(CLASSIFIERS)}
    missing, unexpected, shapes = _mismatches(backbone, tensors)
    if missing or unexpected or shapes:
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        lines = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in kinds.items()
            if names
        ]
        raise UserError(f"weights={path}: another architecture than the backbone's; keys: {'; '.join(lines)}")
    _refuse_other_heads(backbone, path, found, family)
    backbone.load_state_dict(tensors, strict=False)
    left = found.left | ({"classifier": given - len(tensors)} if given > len(tensors) else {})
    others = len(found.named) - len(below(found.named, EVALUATED)) - given
    whose = (
        ""
        if not below(found.named, TWIN + BACKBONE)
        else f", of the {'momentum twin' if found.evaluated == 'twin' else 'online network'}"
    )
    parts = [
        f"weights of {path} are {found.family} by their keys: {len(tensors)} of the backbone's {len(own)}"
        f" tensors{whose}"
    ]
    if len(own) > len(tensors):
        parts.append(f"{len(own) - len(tensors)} counters of BatchNorm's batches are missing, but not needed")
    parts += [f"{others} tensors belong to other parts that caco knows"] if others > 0 else []
    parts += [f"left out: {', '.join(f'{count} ({kind})' for kind, count in left.items())}"] if left else []
    return "; ".join(parts)


def _refuse_other_heads(backbone: nn.Module, path: Path | str, found: Reading, family: str | None) -> None:
    """Refuse a ViT-S with another number of attention heads than the file's. The tensors do not show that number, so
    the file's family has to tell it.

    Raises:
        UserError: the numbers differ.
    """
    known = (
        family
        if family in HEADS_OF_384
        else next((name for name in found.formats if len(found.formats) == 1 and name in HEADS_OF_384), None)
    )
    blocks = getattr(backbone, "blocks", None)
    if known is None or blocks is None or getattr(backbone, "num_features", None) != 384:
        return
    heads = blocks[0].attn.num_heads
    if heads != HEADS_OF_384[known]:
        use = "backbone=mocov3_vit_small" if known == "mocov3" else "backbone=vit_small or dino_vit_small"
        raise UserError(
            f"weights={path}: {known}'s ViT-S has {HEADS_OF_384[known]} attention heads, this backbone {heads}; take"
            f" {use}"
        )
