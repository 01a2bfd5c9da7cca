"""Recognises by its keys which family a file of weights belongs to, and gives its tensors the names of a method's
state_dict.

A family is an entry of `FAMILIES`. It says how its files are recognised, and for the beginnings of their names what
caco calls them or, after a ~, which kind of tensor is left out. A name that no rule matches is an error. The layouts
were taken from the authors' code that saves or loads such files; docs/weights.md says which layouts were not. "twin"
means the momentum network, "online" the network that gets gradients.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from caco.errors import UserError
from caco.nn.names import children, dinov2, simclr2, transformers

OURS, ONE_NETWORK = "a checkpoint of this program", "one network"
BACKBONE, PROJECTOR, PREDICTOR = "encoder.backbone.", "encoder.projector.", "predictor."
TWIN = "twin."  # prefix of the names of the twin's encoder
EVALUATED = "evaluated."  # prefix of the names of the backbone that is evaluated, if it is not the online one
DDP = r"(?:module\.)?"  # DistributedDataParallel's prefix
HEADS_OF_384 = {"mocov3": 12, "dino": 6, "dinov2": 6}  # attention heads of a ViT-S; the shapes of its tensors hide them


class Reading(NamedTuple):
    family: str  # its name in messages
    formats: tuple[str, ...]  # the values of format= that fit it
    named: dict[str, Tensor]  # by the names of a method's state_dict
    left: dict[str, int]  # kind of tensor -> how many of that kind were left out
    evaluated: str = "online"  # or "twin": the network that is evaluated


class File:
    """The content of a file from torch.save or safetensors, with the questions that the families ask about it.

    Args:
        content: the dict that the file holds.
        choice: "online" or "twin", the network that the user wants; None leaves it to the family.
    """

    def __init__(self, content: Mapping[Any, Any], choice: str | None = None):
        self.content, self.choice = content, choice

    def holds(self, *keys: str) -> bool:
        return all(key in self.content for key in keys)

    def below(self, *path: str, prefix: str = "") -> dict[str, Tensor]:
        """The tensors in the dict that a path of keys leads to, with `prefix` before each name; empty if there is no
        such path.
        """
        found: Any = self.content
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return {prefix + name: tensor for name, tensor in tensors(found).items()}

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The network's tensors by the file's own names, under whichever key the training saved them."""
        for key in ("state_dict", "model", "model_state_dict", "resnet"):
            if isinstance(self.content.get(key), Mapping):
                return self.below(key)
        return self.below()

    def has(self, *beginnings: str) -> bool:
        """Whether each of these regular expressions matches the beginning of some name."""
        return all(any(re.match(beginning, name) for name in self.state) for beginning in beginnings)

    @property
    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights that timm's and torchvision's training save beside the network; empty unless the user
        wants the twin.
        """
        if self.choice != "twin":
            return {}
        return self.below("state_dict_ema", prefix="ema/") or self.below("model_ema", prefix="ema/")


@dataclass(frozen=True)
class Family:
    says: str  # its name in messages
    formats: tuple[str, ...]  # the values of format= that fit it
    holds: Callable[[File], bool]  # whether a file is of this family
    rules: tuple[tuple[str, str], ...] = ()  # a name's beginning (a regular expression), and ours; ~kind: left out
    state: Callable[[File], dict[str, Tensor]] = field(default=lambda file: file.state)  # tensors before renaming
    evaluated: str = "online"  # or "twin": the network that is evaluated
    refuses: str | None = None  # the reason why no backbone can be taken from such a file


def head(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    """The rules for a head that is a Sequential or a single layer."""
    return (rf"{theirs}\.(?=\d+\.)", ours), (rf"{theirs}\.(?=weight$|bias$)", f"{ours}0.")


def two_encoders(online: str, twin: str) -> tuple[tuple[str, str], ...]:
    """The rules for two ResNets, online and twin, that have the projector in the place of the classifier."""
    rules: tuple[tuple[str, str], ...] = ()
    for theirs, ours in ((online, ""), (twin, TWIN)):
        rules += (*head(rf"{theirs}\.(?:fc|head)", ours + PROJECTOR), (rf"{theirs}\.", ours + BACKBONE))
    return rules


def _with_rows(file: File) -> dict[str, Tensor]:
    """The state of a file of MoCo, PCL, CaCo or AdCo, with the bank transposed: the files hold its rows as columns."""
    state = dict(file.state)
    bank = {name: tensor for name, tensor in file.below("Memory_Bank").items() if tensor.ndim == 2}
    for name in ("queue", "module.queue"):
        if name in state and state[name].ndim == 2:
            bank["W"] = state.pop(name)
    if "W" in bank:
        state["bank/rows.weight"] = bank["W"].T
    if "v" in bank:
        state["bank/velocity"] = bank["v"]
    return state


def _dino(file: File) -> dict[str, Tensor]:
    return (
        file.below("student", prefix="online/")
        | file.below("teacher", prefix="twin/")
        | file.below("dino_loss", prefix="loss/")
    )


def _vissl(file: File) -> dict[str, Tensor]:
    if not file.holds("classy_state_dict"):
        return {f"trunk/{name}": tensor for name, tensor in file.state.items()}
    model = ("classy_state_dict", "base_model", "model")
    return file.below(*model, "trunk", prefix="trunk/") | file.below(*model, "heads", prefix="heads/")


def _pycontrast(file: File) -> dict[str, Tensor]:
    return file.below("model") | file.below("model_ema", prefix="twin/") | file.below("contrast", prefix="bank/")


def _plain(file: File) -> dict[str, Tensor]:
    return file.state | file.averaged


SOLO = (
    (r"(?:backbone|encoder)\.", BACKBONE), (r"momentum_(?:backbone|encoder)\.", TWIN + BACKBONE),
    *head("projector", PROJECTOR), *head("momentum_projector", TWIN + PROJECTOR), *head("predictor", PREDICTOR),
    (r"(?:momentum_)?(?:projector|predictor)\.", "~head"),
    (r"(?:momentum_)?classifier\.", "~classifier trained with labels"),
    (r"(?:momentum_)?head\.|prototypes\.", "~head"), (r"queue", "~bank"), (r"dino_loss|loss", "~loss"),
)  # fmt: skip
LIGHTLY = (
    (r"student_backbone\.(?:vit\.)?", BACKBONE),
    (r"(?:key_|teacher_)backbone\.(?:vit\.)?|backbone_momentum\.", TWIN + BACKBONE),
    (r"student_(?:projection_)?head\.layers\.", PROJECTOR),
    (r"(?:key_|teacher_)(?:projection_)?head\.layers\.", TWIN + PROJECTOR),
    (r"projection_head_momentum\.layers\.", TWIN + PROJECTOR), (r"projection_head\.layers\.", PROJECTOR),
    (r"prediction_head\.layers\.", PREDICTOR),
    (r"(?:student_|key_|teacher_)?(?:projection_|prediction_)?head[._]", "~head"),
    (r"prototypes\.", "~prototypes"), (r"criterion\.", "~loss"),
    (r"online_classifier\.", "~classifier trained with labels"),
)  # fmt: skip
LIGHTLY_HOLDS = (
    r"(?:(?:student_|key_|teacher_)?(?:projection|prediction)|student|teacher)_head(?:_momentum)?\.layers\.|"
    r"online_classifier\.classification_head\."
)
CHILD = r"(?:student_|key_|teacher_)?backbone(?:_momentum)?"
OF_RELEASED = (
    *two_encoders(rf"{DDP}encoder_q", rf"{DDP}encoder_k"), (rf"{DDP}queue_ptr$", "bank.next_row"),
    (r"bank/velocity", "~bank's momentum"),
    (r"bank/", "bank."), (rf"{DDP}queue", "~bank"),
)  # fmt: skip
RELEASED = ("caco", "adco", "moco", "pcl")
ANYBODY = (
    "torchvision",
    "timm",
    "dino",
    "barlow",
    "vicreg",
    "simclr",
    "byol",
    "sela",
    "mocov3",
    "instdisc",
)  # the formats whose files may hold one network alone, whose names do not tell these apart

# The order matters: a file belongs to the first family whose `holds` is true.
FAMILIES = (
    Family(
        "Hugging Face transformers", ("transformers",),
        lambda f: f.has(r"(?:\w+\.)?(?:embeddings|embedder)\.", r"(?:\w+\.)?encoder\.(?:layer|stages)\."),
        ((r"pooler\.", "~pooler"), (r"classifier\.", "~classifier"), (r"mask_token$", "~mask token"), ("", BACKBONE)),
        lambda f: transformers(f.state),
    ),
    Family(
        "a shard of VISSL", ("vissl",), lambda f: f.content.get("type") in ("shard", "shard_list", "slice_list"),
        refuses="it is a part of a checkpoint: VISSL's own tools join them",
    ),
    Family(
        "VISSL", ("vissl",), lambda f: f.holds("classy_state_dict") or f.has(r"(?:base_model\.)?_feature_blocks\."),
        ((r"heads/", "~head"), (r"trunk/(?:base_model\.)?(?:_feature_blocks\.)?", BACKBONE)), _vissl,
    ),
    Family(
        "DINO", ("dino",), lambda f: f.holds("teacher", "student"),
        (
            (rf"online/{DDP}backbone\.", BACKBONE), (rf"twin/{DDP}backbone\.", TWIN + BACKBONE),
            (rf"(?:online|twin)/{DDP}head\.", "~head"),
            (r"loss/", "~loss"),
        ), _dino, "twin",
    ),
    Family(
        "DINOv2", ("dinov2",),
        lambda f: bool(f.below("teacher")) or f.has(r"blocks\.\d+\.(?:\d+\.)?ls1\.gamma", "mask_token"),
        ((r"(?:dino|ibot)_head\.", "~head"), (r"(?:backbone\.)?mask_token", "~mask token"), (r"(?:backbone\.)?",
        BACKBONE)),
        lambda f: dinov2(f.below("teacher") or f.state),
    ),
    Family(
        "lightly, DINO", ("lightly",), lambda f: f.has(LIGHTLY_HOLDS, r"student_backbone\."),
        (*LIGHTLY, (r"backbone\.(?:vit\.)?", TWIN + BACKBONE)), lambda f: children(f.state, CHILD), "twin",
    ),
    Family(
        "lightly", ("lightly",), lambda f: f.has(LIGHTLY_HOLDS, r"backbone\."),
        (*LIGHTLY, (r"backbone\.(?:vit\.)?", BACKBONE)),
        lambda f: children(f.state, CHILD),
    ),
    Family(
        "stable-pretraining", ("stable_pretraining",),
        lambda f: f.has(r"callbacks_modules\.") or f.has(r"backbone\.student\."),
        (
            (r"callbacks_modules\.", "~classifier trained with labels"), (r"backbone\.student\.", BACKBONE),
            (r"backbone\.teacher\.", TWIN + BACKBONE),
            (r"backbone\.(?:base_ema_coefficient|ema_coefficient)", "~numbers"),
            (r"backbone\.", BACKBONE), (r"projector\.teacher\.", TWIN + PROJECTOR),
            (r"projector\.(?:student\.)?", PROJECTOR), (r"predictor\.", PREDICTOR), (r"prototypes", "~prototypes"),
            (r"queue", "~bank"),
        ),
    ),
    Family(
        "solo-learn", ("solo",),
        lambda f: f.has(r"(?:backbone|encoder)\.")
        and (f.has(r"momentum_(?:backbone|encoder)\.") or f.has(r"classifier\.", r"projector\.|head\.")),
        SOLO,
    ),
    Family(
        "InstDisc, CIFAR", ("instdisc",), lambda f: f.holds("net", "lemniscate"),
        refuses="its network has another stem and other names",
    ),
    Family(
        "InstDisc", ("instdisc",), lambda f: f.holds("lemniscate"), ((rf"{DDP}fc\.", "~embedding"), (DDP, BACKBONE)),
    ),
    Family(
        "CMC", ("pycontrast",),
        lambda f: f.has(rf"{DDP}encoder1\.") or f.has(r"encoder\.module\.(?:l_to_ab|ab_to_l)\."),
        refuses="it holds two networks, of one and of two channels, of which none takes RGB images",
    ),
    Family(
        "InstDisc or MoCo of CMC's authors", ("pycontrast",), lambda f: f.has(r"encoder\.module\."),
        (
            (r"(?:twin/)?encoder\.module\.fc\.", "~embedding"), (r"bank/", "~bank"),
            (r"twin/encoder\.module\.", TWIN + BACKBONE),
            (r"encoder\.module\.", BACKBONE),
        ), _pycontrast,
    ),
    Family(
        "PyContrast", ("pycontrast",),
        lambda f: f.has(r"module\.encoder\.", r"module\.head") and not f.has(r"module\.predictor\."),
        (
            (r"twin/(?:module\.)?encoder\.", TWIN + BACKBONE), (r"twin/(?:module\.)?", "~head"), (r"bank/", "~bank"),
            (r"module\.encoder\.", BACKBONE), *head(r"module\.head", PROJECTOR),
            (r"module\.(?:head|head_jig|jigsaw)\.", "~head"),
        ), _pycontrast,
    ),
    Family("CaCo", RELEASED, lambda f: f.holds("Memory_Bank") and f.has(rf"{DDP}encoder_q\.fc\.1\.running_mean"),
    OF_RELEASED, _with_rows),
    Family("AdCo", RELEASED, lambda f: f.holds("Memory_Bank") and f.has(rf"{DDP}encoder_q\."), OF_RELEASED, _with_rows),
    Family("MoCo v1 or PCL v1", RELEASED, lambda f: f.has(rf"{DDP}encoder_q\.fc\.weight"), OF_RELEASED, _with_rows),
    Family("MoCo v2 or PCL v2", RELEASED, lambda f: f.has(rf"{DDP}encoder_q\."), OF_RELEASED, _with_rows),
    Family(
        "MoCo v3, a ViT with a stem of convolutions", ("mocov3",),
        lambda f: f.has(rf"{DDP}base_encoder\.patch_embed\.proj\.3\."),
        refuses="caco has no ViT with a stem of convolutions",
    ),
    Family(
        "MoCo v3", ("mocov3",), lambda f: f.has(rf"{DDP}base_encoder\."),
        (*two_encoders(rf"{DDP}base_encoder", rf"{DDP}momentum_encoder"), *head(rf"{DDP}predictor", PREDICTOR)),
    ),
    Family(
        "SimSiam", ("simsiam",), lambda f: f.has(rf"{DDP}encoder\.(?:conv1|layer1)\.", rf"{DDP}predictor\."),
        (*head(rf"{DDP}encoder\.fc", PROJECTOR), (rf"{DDP}encoder\.", BACKBONE), *head(rf"{DDP}predictor", PREDICTOR)),
    ),
    Family(
        "SwAV or DeepCluster v2", ("swav",),
        lambda f: f.has(rf"{DDP}prototypes\.") or f.has(rf"{DDP}projection_head\."),
        (*head(rf"{DDP}projection_head", PROJECTOR), (rf"{DDP}prototypes\.", "~prototypes"), (DDP, BACKBONE)),
    ),
    Family(
        "Barlow Twins", ("barlow",), lambda f: f.has(rf"{DDP}backbone\.", rf"{DDP}projector\.", rf"{DDP}bn\."),
        ((rf"{DDP}backbone\.", BACKBONE), *head(rf"{DDP}projector", PROJECTOR), (rf"{DDP}bn\.",
        "~normalisation of the embeddings")),
    ),
    Family(
        "VICReg", ("vicreg",), lambda f: f.has(rf"{DDP}backbone\.", rf"{DDP}projector\."),
        ((rf"{DDP}backbone\.", BACKBONE), *head(rf"{DDP}projector", PROJECTOR)),
    ),
    Family(
        "SimCLR v2 with selective kernels", ("simclr",), lambda f: f.has(r"net\.0\.") and not f.has(r"net\.0\.1\.0\."),
        refuses="caco has no ResNet with selective kernels",
    ),
    Family(
        "SimCLR v2", ("simclr",), lambda f: f.holds("resnet", "head") and f.has(r"net\.0\.0\."),
        ((r"fc\.", "~classifier trained with labels"), ("", BACKBONE)), lambda f: simclr2(f.state),
    ),
    Family(
        "SeLa, in training", ("sela",), lambda f: f.holds("L") and f.has(rf"{DDP}features\."),
        ((rf"{DDP}features\.", BACKBONE), (rf"{DDP}top_layer", "~pseudo-labels")),
        lambda f: children(f.state, rf"{DDP}features"),
    ),
    Family(
        "detectron2", (), lambda f: f.has(r"stem\.conv1\.|backbone\.bottom_up\."),
        refuses="it was made for detectron2: take the file that it was made from",
    ),
    Family(
        "MMSelfSup", ("mmselfsup",), lambda f: f.has(r"backbone\.") and f.has(r"(?:neck|head)\."),
        ((r"backbone\.", BACKBONE), (r"(?:neck|head)\.", "~head"),
         (r"queue|.*(?:memory|ema|momentum|data_preprocessor|target)", "~other parts")),
    ),
    Family(
        "a classifier of VICReg's", (), lambda f: f.has(rf"{DDP}0\.conv1\.", rf"{DDP}1\."),
        refuses="it is a classifier: take the backbone that it was trained on",
    ),
    Family(
        ONE_NETWORK, ANYBODY, lambda f: True,
        ((r"ema/(?:module\.)?n_averaged", "~numbers"), (r"ema/(?:module\.)*", TWIN + BACKBONE), (DDP, BACKBONE)),
        _plain,
    ),
)  # fmt: skip
FORMATS = tuple(
    dict.fromkeys(
        ["caco", "adco", "moco", "torchvision", "timm", *(name for family in FAMILIES for name in family.formats)]
    )
)


def reading(content: Mapping[Any, Any], choice: str | None = None) -> Reading:
    """Read a file's content by the rules of the first family that its keys fit.

    Args:
        content: the dict that the file holds.
        choice: "online" or "twin": whose backbone is wanted; None for the one that the family evaluates.
    Raises:
        UserError: no backbone can be taken from such a file, or it holds names that no rule of the family matches.
    """
    method = tensors(content.get("method"))
    if any(name.startswith(BACKBONE) for name in method):
        where = content.get("backbone")  # the evaluated backbone's name; older checkpoints do not have it
        twin = isinstance(where, str) and f"{where}." != BACKBONE
        named = method if not twin else method | {EVALUATED + name: x for name, x in below(method, f"{where}.").items()}
        return Reading(OURS, ("caco",), named, {}, "twin" if twin else "online")
    file = File(content, choice)
    family = next(family for family in FAMILIES if family.holds(file))
    if family.refuses is not None:
        raise UserError(f"by its keys it is a file of {family.says}: {family.refuses}")
    named, left, unknown = dict[str, Tensor](), dict[str, int](), list[str]()
    for name, tensor in family.state(file).items():
        for theirs, ours in family.rules:
            if (found := re.match(theirs, name)) is None:
                continue
            if ours.startswith("~"):
                left[ours[1:]] = left.get(ours[1:], 0) + 1
            else:
                named[ours + name[found.end() :]] = tensor
            break
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"by its keys it is a file of {family.says}, which has no place for {len(unknown)} of them:"
            f" {', '.join(unknown[:3])}" + (", ..." if len(unknown) > 3 else "")
        )
    if family.evaluated == "twin":
        named |= {EVALUATED + name: x for name, x in below(named, TWIN + BACKBONE).items()}
    return Reading(family.says, family.formats, named, left, family.evaluated)


def below(named: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}


def tensors(state: object) -> dict[str, Tensor]:
    """The tensors of a state that a module of ours could hold: dense ones of plain numbers, on the CPU."""
    items = state.items() if isinstance(state, Mapping) else ()
    return {
        name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor) and _is_plain(value)
    }


def _is_plain(value: Tensor) -> bool:
    return (
        value.layout == torch.strided and value.device.type == "cpu" and not (value.is_complex() or value.is_quantized)
    )
