"""Configurations of runs that are small enough for a test: digits, a narrow ResNet, a few steps, and otherwise the
defaults of caco.
"""

import copy
import functools
from pathlib import Path

from omegaconf import DictConfig

from caco.config import composition

TINY = [
    "data=digits",
    "augmentation=digits",
    "backbone=small_resnet",
    "backbone.width=8",
    "projector=small",
    "projector.hidden_dim=16",
    "projector.dim=8",
    "optimizer=sgd",
    "schedule.warmup_epochs=0",
    "batch=64",
    "epochs=2",
    "max_steps=12",
    "precision=fp32",
    "device=cpu",
    "eval=[knn]",
    "tracking=ledger",
    "loader.num_workers=0",
    "log_every_steps=1",
]
# A few prototypes for methods whose YAML files have thousands, and labels or clusters from the first epoch on for
# methods that begin with them later.
FEW_PROTOTYPES = {name: ["method.num_prototypes=24"] for name in ("swav", "dino")} | {
    "sela": ["method.num_heads=2", "method.num_moments=8"],
    "pcl": [
        "method.num_clusters=[8,12,24]",
        "method.num_negatives=6",
        "method.first_clustering_epoch=0",
        "method.restarts=1",
    ],
}
# The same for a method that mixes negatives.
MIXED = ["negatives.hardest=16", "negatives.pairs=8", "negatives.with_query=4", "negatives.warmup_epochs=0"]
FEW_PROTOTYPES["mochi"] = MIXED
# Coloured images for methods that need colours or patches.
COLOURED = ["data._target_=coloured.images", "data.size=32"]
OF_PATCHES = {
    "infomin": [*COLOURED, "augmentation=infomin_cifar", "method.jigsaw_hidden_dim=16"],
    "cpcv2": [
        *COLOURED,
        "augmentation=cpcv2_cifar",
        "method.hidden_dim=8",
        "method.blocks=2",
        "method.averaging=0.9",
        "method.group_size=4",
        "batch=16",
    ],
    "pirl": [*COLOURED, "augmentation=pirl_cifar", "method.num_noise=64"],
    "cmc": [
        *COLOURED,
        "augmentation=cmc_cifar",
        "backbone=cmc_small",
        "projector=cmc",
        "projector.hidden_dim=16",
        "projector.dim=16",
        "method.num_noise=64",
    ],
}
BANK = ["bank.size=128"]  # with batch 64, two steps of the warm start fill it
EVERY = ["checkpoint.every_steps=3"]


@functools.cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    composition.register()
    return composition.job_config(composition.compose(list(overrides)))


def compose(*overrides: str, bank: bool = True) -> DictConfig:
    """A validated configuration without Hydra's own node. Cached, because Hydra takes a third of a second for each."""
    return copy.deepcopy(_composed((*TINY, *(BANK if bank else []), *overrides)))


def train(run_dir: Path, *overrides: str, bank: bool = True) -> dict[str, float]:
    from caco.engine.training import run_training

    return run_training(compose(*overrides, bank=bank), run_dir)


def now(phase: str = "training", step: int = 0, **values: float):
    """The position in a run, for tests that call a method directly; `values` are the values of its schedules."""
    from caco.methods.base import Now

    epoch, step_in_epoch = (0, step) if phase == "training" else (None, None)
    set_by_hand = {
        "twin_momentum": 0.99,
        "bank_lr": 0.0,
        "teacher_temperature": 0.04,
        "labels_made": 0.0,
        "row_share": 0.5,
        **values,
    }
    return Now(step, phase, step, False, epoch, step_in_epoch, set_by_hand, lr=0.01)


def batch_of(views, *, first: int = 0, patches=None):
    """An unlabelled batch of these views and patches; its images are numbered from `first` on."""
    import torch

    from caco.data.loaders.batches import Batch

    index = torch.arange(first, first + len(patches if patches is not None else views[0]))
    return Batch(list(views), index, torch.full_like(index, -1), patches)


def layers_of(head) -> str:
    """A network's layers as text: "2048-4096b" is a linear layer with a bias, "BN*" a BatchNorm without scale and
    shift.
    """
    from torch import nn

    words = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            words.append(f"{layer.in_features}-{layer.out_features}" + "b" * (layer.bias is not None))
        else:
            words.append({"BatchNorm1d": "BN", "ReLU": "ReLU", "GELU": "GELU"}[type(layer).__name__])
            words[-1] += "*" * (isinstance(layer, nn.BatchNorm1d) and not layer.affine)
    return " ".join(words)


def noise(cfg, images: int, generator, dtype=None):
    """Noise in the shapes of an augmentation recipe: (its views, its patches or None)."""
    import torch

    from caco.config.composition import instantiate

    recipe = instantiate(cfg.augmentation)
    views = [torch.randn(images, 3, size, size, generator=generator, dtype=dtype) for size in recipe.sizes]
    cut = recipe.patches
    return views, (
        None
        if cut is None
        else torch.randn(images, cut.grid**2, 3, cut.size, cut.size, generator=generator, dtype=dtype)
    )
