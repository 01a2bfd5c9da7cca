"""Helpers for the tests of segmentation, and functions for the processes of their test with two ranks."""

import json
from pathlib import Path

import pixelwise
import torch
from processes import PATIENCE_S

from caco import distributed
from caco.evals.dense.dense_linear import DenseLinear
from caco.evals.dense.recipe import Recipe
from caco.evals.dense.segment import FCN16, Crops, scored
from caco.evals.dense.segmentation_sets import voc2012
from caco.evals.dense.training import train
from caco.nn.backbones import small_resnet

FEW = {"train": "train", "images": 3, "steps": 2, "rate": 0.1, "crop": 65, "channels": 16}


def backbone() -> torch.nn.Module:
    torch.manual_seed(0)
    return small_resnet(width=16, stem_stride=2)


def of(evaluator, store, *, seed=0) -> dict[str, float]:
    """The results by the part of their names after the protocol."""
    evaluator.build(store, seed=seed)
    return {name.partition("/voc2012_")[2]: value for name, value in evaluator.run(backbone())}


def trained(root, precision="fp32") -> dict[str, torch.Tensor]:
    """The weights after three steps with three images each."""
    recipe, images = Recipe(steps=3, images=3, rate=0.02, reference_images=3), voc2012(Path(root), "train").train
    store = pixelwise.store_of()
    task, network = Crops(images, store.views, crop=65, scale=[0.5, 2.0]), FCN16(backbone(), channels=16, seed=0)
    options = {"seed": 0, "name": "it", "made_from": {}, "precision": precision}
    return train(network, task, recipe, store, **options).state_dict()


def scores(root) -> dict[str, dict[str, float]]:
    """The scores of a network whose predictions contain many classes, and of a linear head."""
    store = pixelwise.store_of()
    store.overlap = "allow"  # because the toy set's test images look like its training images
    network = FCN16(backbone(), channels=16, seed=0).eval()
    last = network.head[-1]
    assert isinstance(last, torch.nn.Conv2d)
    torch.nn.init.normal_(last.weight, generator=torch.Generator().manual_seed(0))
    return {
        "segment": scored(network, voc2012(Path(root), "train").test, store, name="it", precision="fp32"),
        "dense_linear": of(DenseLinear(root=str(root), train="train", size=64, places=30), store),
    }


def write_both(root, folder) -> None:
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    weights, found = trained(root), scores(root)
    if distributed.is_main():
        torch.save(weights, Path(folder) / "weights.pt")
        (Path(folder) / "scores.json").write_text(json.dumps(found))
    distributed.stop()
