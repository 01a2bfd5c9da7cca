"""What tests of segmentation share, and what the processes of its test of two ranks do."""

import json
from pathlib import Path

import pixelwise
import torch
from processes import PATIENCE_S

from caco import distributed
from caco.evals.dense.dense_linear import DenseLinear
from caco.evals.dense.segment import Segment
from caco.nn.backbones import small_resnet

# Three images a step, so that of two ranks one has one; so few steps that float32 is far from apart.
FEW = {"train": "train", "images": 3, "steps": 2, "rate": 0.1, "crop": 65, "channels": 16}


def backbone() -> torch.nn.Module:
    torch.manual_seed(0)
    return small_resnet(width=16, stem_stride=2)


def of(evaluator, store, *, seed=0) -> dict[str, float]:
    """The results by what comes after the protocol."""
    evaluator.build(store, seed=seed)
    return {name.partition("/voc2012_")[2]: value for name, value in evaluator.run(backbone())}


def results(root, folder=None) -> dict[str, dict[str, float]]:
    store = pixelwise.store_of(folder)
    store.overlap = "allow"  # the toy set's test images look like its training images
    return {
        "segment": of(Segment(root=str(root), **FEW), store),
        "dense_linear": of(DenseLinear(root=str(root), train="train", size=64, places=30), store),
    }


def write_results(root, path) -> None:
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    found = results(root)
    if distributed.is_main():
        Path(path).write_text(json.dumps(found))
    distributed.stop()
