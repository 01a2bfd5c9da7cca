"""Files in the formats of released checkpoints, made from networks with known weights."""

from pathlib import Path
from typing import Any, Literal

import torch
from timm.models.resnet import BasicBlock, ResNet

from caco.banks.base import Bank
from caco.banks.learnable import LearnableBank
from caco.methods.contrastive import Contrastive
from caco.methods.sources import BankRow, BankRows, BatchBothViews, OtherView
from caco.nn.heads import Encoder, Projector

PROJECTORS: dict[str, dict[str, Any]] = {  # as in the papers, but narrow
    "caco": {"hidden_dim": 16, "dim": 8, "layers": 3, "batch_norm": True, "bias": False},
    "adco": {"hidden_dim": 64, "dim": 8, "layers": 2, "batch_norm": False, "bias": True},
    "moco": {"hidden_dim": 64, "dim": 8, "layers": 2, "batch_norm": False, "bias": True},
}


def resnet(*, blocks=(2, 2, 2, 2)) -> ResNet:
    """ResNet-18 with narrow stages."""
    return ResNet(BasicBlock, blocks, channels=(8, 16, 32, 64), num_classes=0)


def new_method(
    projector: str = "caco", *, bank: Bank | Literal["keys", "random"] | None = "random", twin: bool = True
) -> Contrastive:
    if isinstance(bank, str):
        bank = LearnableBank(size=32, dim=8, seed=7, initialisation=bank)
    return Contrastive(
        encoder=Encoder(backbone=resnet(), projector=Projector(in_dim=64, **PROJECTORS[projector])),
        bank=bank,
        positives=BankRow() if bank else OtherView(),
        negatives=BankRows() if bank else BatchBothViews(),
        momentum=0.99 if twin else None,
    )


def noise(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values that no initialisation gives, so that a loaded tensor can be told from an initialised one."""
    return {name: torch.randn(v.shape) if v.is_floating_point() else v + 5 for name, v in state.items()}


def released(kind: str, *, keys: bool = True) -> dict:
    """A checkpoint as the authors' code saves it, with the names of DistributedDataParallel and the projector in the
    place of the classifier.
    """
    state: dict[str, torch.Tensor] = {}
    for side in ["encoder_q", "encoder_k"] if keys else ["encoder_q"]:
        state |= {f"module.{side}.{name}": v for name, v in noise(resnet().state_dict()).items()}
        projector = Projector(in_dim=64, **PROJECTORS[kind]).state_dict()
        state |= {f"module.{side}.fc.{name}": v for name, v in noise(projector).items()}
    file: dict[str, Any] = {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
    }
    if kind == "moco":
        state["module.queue"], state["module.queue_ptr"] = torch.randn(8, 32), torch.tensor([12])
    else:
        file |= {"best_acc": 0, "Memory_Bank": {"W": torch.randn(8, 32), "v": torch.randn(8, 32)}}
    return file


def saved(path: Path, content: object, **options) -> Path:
    torch.save(content, path, **options)
    return path


def copy_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_holds(module: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = module.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


def side(file: dict, name: str) -> dict[str, torch.Tensor]:
    """One encoder of a released file under caco's names."""
    prefix = f"module.{name}."
    inner = {key.removeprefix(prefix): v for key, v in file["state_dict"].items() if key.startswith(prefix)}
    head = {f"projector.{key.removeprefix('fc.')}": v for key, v in inner.items() if key.startswith("fc.")}
    return {f"backbone.{key}": v for key, v in inner.items() if not key.startswith("fc.")} | head
