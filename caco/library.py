"""Functions for the user's own programs, without a command line: trained backbones with their preprocessing, views,
evaluators.

The bank and its loss are in caco/banks/own_loop.py, the momentum twin is caco.nn.twin.MomentumTwin.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from caco.config import composition, pretrained
from caco.config.composition import instantiate
from caco.config.folders import CONF
from caco.data.sets.anyones import as_source
from caco.data.sets.sources import Splits
from caco.data.views.augmentation import Views
from caco.data.views.channels import ChannelViews
from caco.data.views.transform import Preprocessing, Transform
from caco.engine.assembly import pick_device
from caco.engine.channels import backbone_of, stated
from caco.engine.evaluating import load_pretrained
from caco.errors import UserError
from caco.evals.base import Evaluator
from caco.evals.evaluation import Evaluation
from caco.evals.extraction import Precision
from caco.runs.identity import read_yaml


class Loaded(NamedTuple):
    """backbone: from images float32 [B, 3, H, W] to features [B, D], on the CPU and in eval mode. preprocess: from a
    Pillow image or an array, or a batch of them, to such images. For a run on images as they are stored
    (data.channels=N) it takes arrays [H, W, N] of the numbers in the files.
    """

    backbone: nn.Module
    preprocess: Preprocessing


def load(run: str | Path | None = None, **chosen: Any) -> Loaded:
    """A trained backbone and its preprocessing, for unpacking: `backbone, preprocess = caco.load("runs/caco/NAME")`.

    Args:
        run: a run's directory, one of its checkpoint files, or its MLflow run id.
        chosen: settings of caco.export by name, groups included: `weights="FILE", backbone="resnet50"` instead of a run
            (docs/weights.md), `augmentation="byol"` for other views.
    Raises:
        UserError: there is no such run, or the weights belong to another backbone.
    """
    given = {**({} if run is None else {"run": str(run)}), **chosen}
    words = [f"{key}={_word(value)}" for key, value in given.items()]
    # An export has the settings of a backbone and of the images that it takes, and no others. Nothing is written.
    cfg = pretrained.compose("export", [*words, "to=nowhere"])
    location = None if cfg.run is None else pretrained.locate(cfg.run)
    # The weights drawn here are overwritten, and drawing them must not change the caller's random generator.
    with torch.random.fork_rng(devices=[]):
        images = stated(cfg, None if location is None else location.run_dir)
        backbone = backbone_of(cfg.backbone, images.get("channels"))
    load_pretrained(cfg, location, backbone)
    recipe: Views = instantiate(cfg.augmentation)
    return Loaded(
        backbone.eval(),
        Preprocessing(ChannelViews(recipe, mean=images["mean"], std=images["std"]) if images else recipe),
    )


def views(recipe: str = "caco", **settings: Any) -> Transform:
    """The views of a published recipe as a transform.

    Args:
        recipe: an option of `augmentation=` (docs/options.md): caco, simclr, byol, dino, cifar, ...
        settings: arguments of `Views` that replace the recipe's: size, mean, std, plain_crop, ...
    Raises:
        UserError: there is no such recipe.
    """
    return Transform(_made("augmentation", recipe, settings))


def evaluate(
    backbone: nn.Module,
    evaluators: Sequence[str] | Mapping[str, Evaluator],
    *,
    train: Any,
    test: Any = None,
    views: Transform | Preprocessing | Views | None = None,
    batch: int = 256,
    device: str = "auto",
    precision: Precision = "fp32",
    seed: int = 0,
) -> dict[str, float]:
    """The results of evaluators by name, accuracies in percent. The names tell the protocols (docs/evaluation.md).

    Args:
        backbone: any module from images [B, 3, H, W] to features [B, D]; it is not changed.
        evaluators: names of options of `eval=`, such as ["knn_all", "geometry"], or evaluators made by hand, such as
            {"linear": Linear(epochs=10, batch=64)}.
        train, test: images and labels: (uint8 [N, H, W, 3], int [N]), a list of Pillow images, or a PyTorch dataset
            without a transform; see caco.data.sets.anyones.as_source. Evaluators that need no labels (geometry) take
            images alone, from `train`.
        views: gives each image's plain view, and two views for geometry's alignment; for a run, use
            `load(...).preprocess`. None: 224 px with ImageNet's mean and standard deviation.
        batch: number of images in a forward pass. device: auto, cpu or cuda. precision: fp32 or bf16. seed: for the
            evaluators' random draws.
    Raises:
        UserError: the images are not enough for an evaluator, which is named.
    """
    chosen = (
        views if isinstance(views, Views) else views.views if views is not None else _made("augmentation", "caco", {})
    )
    sources = [
        None if images is None else as_source(images, name=name) for name, images in (("train", train), ("test", test))
    ]
    assert sources[0] is not None
    made = (
        dict(evaluators) if isinstance(evaluators, Mapping) else {name: _made("eval", name, {}) for name in evaluators}
    )
    where = pick_device(device)
    evaluation = Evaluation(
        made,
        Splits(sources[0], sources[0], sources[1]),
        chosen,
        batch=batch,
        device=where,
        precision=precision,
        seed=seed,
    )
    home = next((parameter.device for parameter in backbone.parameters()), where)
    try:
        evaluation.require(backbone)
        return evaluation.run(backbone.to(where), "end")
    finally:
        backbone.to(home)


def _made(group: str, option: str, settings: dict[str, Any]) -> Any:
    """The object that an option of a group describes, with some settings replaced."""
    options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if option not in options:
        raise UserError(f"{group}: expected one of {', '.join(options)}, got {option!r}")
    if group == "augmentation":
        node = composition.compose([f"augmentation={option}"]).augmentation
    else:
        node = read_yaml(CONF / group / f"{option}.yaml")
    return instantiate(node, **settings)


def _word(value: Any) -> str:
    """A value as it is written on a command line."""
    if not isinstance(value, (str, Path)):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
