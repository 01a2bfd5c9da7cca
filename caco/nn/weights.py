"""Weights from elsewhere: our own checkpoints, the released CaCo, AdCo and MoCo ones, torchvision's and timm's.

Whatever the layout, its tensors are first given our own names, those of a method's state_dict; then all go one way.
torchvision, timm and the released checkpoints name a ResNet's layers alike, so its names need no table.
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
from caco.runs import checkpoint

OURS, RELEASED, PLAIN = "a checkpoint of this program", "encoder_q, encoder_k", "one network"
LAYOUTS = {
    "caco": (OURS, RELEASED),
    "adco": (RELEASED,),
    "moco": (RELEASED,),
    "torchvision": (PLAIN,),
    "timm": (PLAIN,),
}
CLASSIFIERS = ("fc.", "head.", "classifier.")  # of torchvision's and timm's models, left out where the backbone has none
STUDENT, EVALUATED = "encoder.backbone.", "evaluated."  # in our names: the backbone that learns, and that which is evaluated if it is another
OWN_OF_A_RUN = ("rows.velocity", "rows.uses")  # the bank's momentum and statistics: a new run starts its own


class Initialised(Protocol):
    """A method, as `initialise` needs it: its parts by the names that they have in its state_dict, `encoder` one of them."""

    @property
    def backbone(self) -> nn.Module: ...

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...

    def overwritten(self) -> set[str]: ...


def initialise(method: Initialised, path: Path | str, format: str) -> str:
    """Give a freshly built method the weights of a file, and say what it got.

    The backbone must fit. The projector, the momentum twin, the bank and what else a method has are taken where the
    file holds them in the same shapes, and stay as they were where not; a twin that the file lacks becomes a copy of
    the encoder. The bank is taken only with its projector; what the run fills anyway is left out. What is said tells why a bank is not taken.

    Args:
        path, format: as in `read`.
    Raises:
        ValueError: as in `load_backbone`.
    """
    named = read(path, format)
    parts = dict(method.named_children())
    encoder, twin, bank = parts.pop("encoder"), parts.pop("twin", None), parts.pop("bank", None)
    projector = encoder.get_submodule("projector")
    _fill_backbone(encoder.get_submodule("backbone"), _below(named, STUDENT), path)
    loaded, fresh = ["backbone"], list[str]()

    def take(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> bool:
        fits = not any(_mismatches(module, tensors))
        if fits:
            module.load_state_dict(tensors, strict=False)
        (loaded if fits else fresh).append(name)
        return fits

    has_projector = take("projector", projector, _below(named, "encoder.projector."))
    for name, module in parts.items():  # a predictor, for example
        if name not in method.overwritten() and module.state_dict():
            take(name, module, _below(named, f"{name}."))
    if twin is not None:
        of_twin = twin.get_submodule("encoder")
        theirs = _below(named, "twin.encoder.")
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
        rows = {name: tensor for name, tensor in _below(named, "bank.").items() if name not in OWN_OF_A_RUN}
        whole = (getattr(bank, "size"), bank.get_parameter("rows.weight").shape[1])  # of all ranks' shards
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
    message = f"weights of {path} ({format}): {', '.join(loaded)}"
    return message + (f"; as initialised: {', '.join(fresh)}" if fresh else "")


def load_backbone(path: Path | str, format: str, backbone: nn.Module) -> None:
    """Give a backbone the weights of a file; of an encoder and its momentum twin, the encoder's, unless the run that saved them says
    that it evaluated the twin's (DINO).

    Raises:
        ValueError: as in `read`; or the file's network has another architecture.
    """
    named = read(path, format)
    _fill_backbone(backbone, _below(named, EVALUATED) or _below(named, STUDENT), path)


def read(path: Path | str, format: str) -> dict[str, Tensor]:
    """The tensors of a file under the names of a method's state_dict, on the CPU. Nothing in the file is run.

    Args:
        path: a file of torch.save, or .safetensors.
        format: caco (our checkpoints and the authors'), adco, moco, torchvision or timm.
    Raises:
        ValueError: no such file or format; the file is damaged, holds more than data, or looks like another format.
    """
    if format not in LAYOUTS:
        raise UserError(f"format: expected one of {', '.join(LAYOUTS)}; got {format!r}")
    content = _content(Path(path))
    layout, named = _in_our_names(content)
    if not named:
        keys = [key[:60] if isinstance(key, str) else type(key).__name__ for key in list(content)[:5]] if isinstance(content, dict) else []
        shown = ", ".join(keys) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"weights={path}: expected a network's state_dict; got {shown or 'nothing'}")
    if layout not in LAYOUTS[format]:
        others = " or ".join(f"format={name}" for name, layouts in LAYOUTS.items() if layout in layouts)
        raise UserError(f"weights={path}: its keys look like {others} ({layout}); got format={format}")
    return named


def _content(path: Path) -> object:
    if not path.is_file():
        raise UserError(f"weights={path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):
            return checkpoint.contents(path)
        return torch.load(path, map_location="cpu", weights_only=True)  # as torch wrote before 1.6
    except UserError as error:
        code = _code(error.__cause__)
        raise UserError(
            f"weights={path}: expected a file of tensors, numbers and text, of which nothing is ever run; "
            f"{code or f'it is of another kind, or damaged: {error}'}"
        ) from error
    except Exception as error:  # a damaged file leads torch's reader into errors of any type
        why = _code(error) or f"it is of another kind, or damaged: {type(error).__name__}"
        raise UserError(f"weights={path}: expected a file of tensors, numbers and text, of which nothing is ever run; {why}") from error


def _code(error: BaseException | None) -> str | None:
    """What a file asks to be run, if that is why it was refused. Not torch's own words: they go on to recommend running it."""
    found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return f"it asks for {found[1]}" if found else None


def _in_our_names(content: object) -> tuple[str, dict[str, Tensor]]:
    """A file's layout, and its tensors as a method's state_dict has them."""
    if not isinstance(content, dict):
        return PLAIN, {}
    method = _tensors(content.get("method"))
    if any(name.startswith(STUDENT) for name in method):
        backbone = content.get("backbone")
        evaluated = f"{backbone}." if isinstance(backbone, str) else STUDENT  # older checkpoints do not say
        return OURS, method | ({} if evaluated == STUDENT else {EVALUATED + name: x for name, x in _below(method, evaluated).items()})
    # Released pre-training and timm's training wrap the network as state_dict, torchvision's reference training as
    # model; DistributedDataParallel prefixes its names.
    inner = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    state = {name.removeprefix("module."): tensor for name, tensor in _tensors(inner).items()}
    if not any(name.startswith("encoder_q.") for name in state):
        return PLAIN, {STUDENT + name: tensor for name, tensor in state.items()}
    named = {}
    for theirs, ours in (("encoder_q.", "encoder."), ("encoder_k.", "twin.encoder.")):
        for name, tensor in _below(state, theirs).items():
            # The projector stands where a ResNet has its classifier: fc.0, fc.2, ... or, in MoCo v1, one layer alone.
            head = re.fullmatch(r"fc\.(?:(\d+)\.)?(\w+)", name)
            named[ours + (f"projector.{head[1] or 0}.{head[2]}" if head else f"backbone.{name}")] = tensor
    columns = {**state, **_tensors(content.get("Memory_Bank"))}
    for bank in ("W", "queue"):  # of CaCo and AdCo; of MoCo. Rows are columns there.
        if bank in columns and columns[bank].ndim == 2:
            named["bank.rows.weight"] = columns[bank].T
    if "queue_ptr" in state and state["queue_ptr"].numel() == 1:
        named["bank.next_row"] = state["queue_ptr"].reshape(())
    return RELEASED, named


def _tensors(state: object) -> dict[str, Tensor]:
    """Those of a state that a module of ours could have: of plain numbers, and with contents."""
    items = state.items() if isinstance(state, dict) else ()
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor) and _is_plain(value)}


def _is_plain(value: Tensor) -> bool:
    return value.layout == torch.strided and value.device.type == "cpu" and not (value.is_complex() or value.is_quantized)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _mismatches(module: nn.Module, tensors: dict[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing, unexpected, of another shape."""
    own = module.state_dict()
    # Files of before 2018 do not count BatchNorm's batches, and nothing that we have reads the count.
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    return missing, unexpected, shapes


def _fill_backbone(backbone: nn.Module, tensors: dict[str, Tensor], path: Path | str) -> None:
    own = backbone.state_dict()
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
    backbone.load_state_dict(tensors, strict=False)
