"""What follows from data.channels, images as they are stored: a run's views, its backbone, and what is noted of both in
its directory.
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
    """The backbone that a configuration names, for images of so many channels; None is three.

    One that takes `in_channels` is given it; of any other, torchvision's or one of your own, the first convolution is
    replaced. Raises:
        UserError: it has no first convolution of three channels.
    """
    if channels in (None, 3):
        return instantiate(node)
    taken = signatures.find(str(node["_target_"]))
    if taken is not None and "in_channels" in taken.parameters:
        return instantiate(node, in_channels=channels)
    return with_channels(instantiate(node), channels)


def views_of(cfg: DictConfig, splits: Splits, *, run_dir: Path | None, say: Say = silent) -> Views:
    """The recipe's views, of the images that these splits have. A collective.

    Of images as they are stored, their mean and standard deviation are those that data.mean and data.std say, or that
    the run in run_dir has noted, or else measured on the training images and said. `note` writes them down.
    Raises:
        UserError: the recipe does not go with such images; none of them can be read.
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
    """Write down, in the run's directory, what its images are; of photographs there is nothing to say."""
    if views.channels is not None:
        write_json(run_dir / FILE, {"channels": views.channels, "mean": views.mean, "std": views.std})


def stated(cfg: DictConfig, run_dir: Path | None) -> dict[str, Any]:
    """channels, mean and std of a backbone's images, where these are as they are stored; else nothing. Of a run as it
    has noted them, of weights from elsewhere as an export's `data` says.
    """
    if run_dir is not None:
        return dict(noted(run_dir))
    return {key: value for key, value in plain(cfg)["data"].items() if value is not None}


def noted(run_dir: Path) -> Mapping[str, Any]:
    """channels, mean and std of a run's images, where these are as they are stored; else nothing."""
    return read_json(run_dir / FILE)
