"""What follows from data.channels, with which images are used as they are stored: the views, the backbone, and the file
channels.json that records both in the run's directory.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from caco import distributed
from caco.config import signatures
from caco.config.channels_needed import left_out
from caco.config.composition import instantiate
from caco.data.sets.sources import Splits
from caco.data.sets.statistics import mean_and_std
from caco.data.views.augmentation import Views
from caco.data.views.channels import ChannelViews
from caco.nn.first_layer import with_channels
from caco.runs.files import read_json, write_json
from caco.runs.identity import plain
from caco.saying import Say, silent

FILE = "channels.json"  # in a run's directory: channels, mean and std of its images


def backbone_of(node: DictConfig | dict[str, Any], channels: int | None) -> nn.Module:
    """The backbone that a configuration names, with `channels` input channels; None means three.

    A backbone that has an argument `in_channels` is given the number. In any other, torchvision's or the user's own,
    the first convolution is replaced.

    Raises:
        UserError: the backbone has no first convolution of three channels.
    """
    if channels in (None, 3):
        return instantiate(node)
    taken = signatures.find(str(node["_target_"]))
    if taken is not None and "in_channels" in taken.parameters:
        return instantiate(node, in_channels=channels)
    return with_channels(instantiate(node), channels)


def views_of(cfg: DictConfig, splits: Splits, *, run_dir: Path | None, say: Say = silent) -> Views:
    """The views of the recipe, for the images of these splits. A collective.

    For images as they are stored, mean and standard deviation come from data.mean and data.std; else from what the run
    in run_dir has recorded (see `note`); else they are measured on the training images and printed.

    Raises:
        UserError: the recipe does not suit such images, or no training image can be read.
    """
    views: Views = instantiate(cfg.augmentation)
    if splits.pretrain.channels is None:
        return views
    noted = read_json(run_dir / FILE) if run_dir is not None and distributed.is_main() else {}
    noted = distributed.shared_object(noted)
    if splits.mean is not None and splits.std is not None:
        mean, std = list(splits.mean), list(splits.std)
    elif noted.get("channels") == splits.pretrain.channels:
        mean, std = noted["mean"], noted["std"]
    else:
        mean, std = mean_and_std(splits.pretrain, say)
        if distributed.is_main():
            each = [f"{m:.4g} and {s:.4g}" for m, s in zip(mean[:4], std[:4], strict=True)] + ["..."] * (len(mean) > 4)
            print(
                f"caco: mean and standard deviation of each channel, measured on {splits.pretrain.name}:"
                f" {', '.join(each)}",
                file=sys.stderr,
            )
    if distributed.is_main() and (line := left_out(plain(cfg))):
        print(f"caco: {line}", file=sys.stderr)
    return ChannelViews(views, mean=mean, std=std)


def note(views: Views, run_dir: Path) -> None:
    """Record channels, mean and std of the images in the run's directory. For photographs no file is written."""
    if views.channels is not None:
        write_json(run_dir / FILE, {"channels": views.channels, "mean": views.mean, "std": views.std})


def stated(cfg: DictConfig, run_dir: Path | None) -> dict[str, Any]:
    """channels, mean and std of the images that a backbone takes as they are stored; {} for photographs. They come from
    the run's record, or for weights from elsewhere from the export's `data`.
    """
    if run_dir is not None:
        return dict(noted(run_dir))
    return {key: value for key, value in plain(cfg)["data"].items() if value is not None}


def noted(run_dir: Path) -> Mapping[str, Any]:
    """channels, mean and std that a run has recorded of its images as they are stored; {} for photographs."""
    return read_json(run_dir / FILE)
