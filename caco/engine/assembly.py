"""Builds the single parts of a training or an evaluation from a checked configuration: the device, the encoder, the
method with its bank, the images and the tracker.
"""

import dataclasses
import os
from typing import Any

import torch
from omegaconf import DictConfig

from caco.banks.base import Bank
from caco.config import views_needed
from caco.config.channels_needed import channels_of
from caco.config.composition import instantiate, target
from caco.data.sets import unfit
from caco.data.sets.sources import Source, Splits
from caco.data.views.augmentation import Views
from caco.engine.channels import backbone_of
from caco.errors import UserError, require_contract
from caco.methods.base import Method, Needs
from caco.methods.treatments import Treatment
from caco.nn import backbones
from caco.nn.backbones import feature_width
from caco.nn.heads import Encoder
from caco.tracking.base import Tracker


def pick_device(name: str) -> torch.device:
    """The torch device of the setting `device`; "auto" takes CUDA if torch sees a CUDA device.

    Raises:
        UserError: "cuda" was asked for and torch sees no CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device=cuda, but torch sees no CUDA device here; use device=cpu or device=auto")
        # The modulo: some clusters show each process only its own GPU, as number 0.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device(name)


def refuse_unfit_backbone(cfg: DictConfig) -> None:
    """Check a timm backbone against the sizes of the views.

    Raises:
        UserError: the timm model cannot compute features of images of a size that the views have.
    """
    channels = channels_of(cfg)
    settings = dict(cfg.backbone) | ({} if channels is None else {"in_channels": channels})
    if settings.pop("_target_") == "caco.nn.backbones.timm_backbone":
        views: Views = instantiate(cfg.augmentation)
        backbones.refuse_unfit([views.size, *views.sizes], **settings)


def build_encoder(cfg: DictConfig) -> Encoder:
    """Backbone and projector with random weights, drawn from torch's global generator."""
    refuse_unfit_backbone(cfg)
    backbone = backbone_of(cfg.backbone, channels_of(cfg))
    return Encoder(backbone=backbone, projector=instantiate(cfg.projector, in_dim=feature_width(backbone)))


def counts_images(cfg: DictConfig) -> bool:
    """Whether the method or its bank keeps something for each training image, and so must be told their number."""
    return (cfg.bank is not None and cfg.bank.size is None) or getattr(target(cfg.method), "needs", Needs()).indices


def build_method(cfg: DictConfig, num_images: int | None = None) -> Method:
    """Encoder, bank and objective. `seed` alone decides weights and rows, so they are the same on every rank.

    Args:
        num_images: number of training images. None: count them if the method or its bank keeps something for each.
    """
    if num_images is None and counts_images(cfg):
        num_images = len(build_splits(cfg).pretrain)
    torch.manual_seed(cfg.seed)
    return method_on(build_encoder(cfg), cfg, num_images)[0]


def method_on(encoder: Encoder, cfg: DictConfig, num_images: int | None) -> tuple[Method, Bank | None]:
    """The objective on this encoder, and its bank. A part that the configuration does not have is not passed at all, so
    a method that knows no banks or no treatments of negatives needs no argument for them.

    Args:
        num_images: number of training images; needed if `counts_images`.
    """
    parts: dict[str, Any] = {}
    if cfg.get("negatives") is not None:
        parts["treatment"] = instantiate(cfg.negatives)
        require_contract("negatives", parts["treatment"], Treatment)
    if cfg.bank is not None:
        parts["bank"] = instantiate(cfg.bank, **({"size": num_images} if cfg.bank.size is None else {}))
        require_contract("bank", parts["bank"], Bank)
    if getattr(target(cfg.method), "needs", Needs()).indices:
        parts["num_images"] = num_images
    return instantiate(cfg.method, encoder=encoder, **parts), parts.get("bank")


def build_tracker(cfg: DictConfig) -> Tracker:
    tracker = instantiate(cfg.tracking)
    require_contract("tracking", tracker, Tracker)
    return tracker


def build_splits(cfg: DictConfig) -> Splits:
    splits = instantiate(cfg.data)
    for name in ("pretrain", "train", "test"):
        if (source := getattr(splits, name)) is not None:
            require_contract(f"data: {name}", source, Source)
    return splits


def refuse_unfit(method: Method, views: Views, source: Source) -> None:
    """Raise UserError if the views, or the images that they are made from, do not meet the method's needs."""
    views_needed.refuse(dataclasses.asdict(method.needs), views.patches, views.colours)
    if method.needs.patches != "none":
        unfit.refuse_too_small_for_patches(source)
    if method.needs.lightness_first:
        unfit.refuse_grey(source)
    if method.needs.classes is not None:
        unfit.refuse_other_labels(source, method.needs.classes)


def final_backbone(cfg: DictConfig, method: Method) -> torch.nn.Module:
    """A new backbone with the weights of the method's, on the CPU and in eval mode. Its BatchNorm communicates with no
    other rank.
    """
    backbone = backbone_of(cfg.backbone, channels_of(cfg))
    backbone.load_state_dict(method.backbone.state_dict())
    return backbone.eval()
