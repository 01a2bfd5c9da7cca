"""Small detectors and examples for them, and functions for the ranks of a test with several processes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import PATIENCE_S
from torch import Tensor, nn

from caco import distributed
from caco.evals.dense.boxes_and_masks import Example
from caco.evals.dense.detection_rows import on_main
from caco.evals.dense.detector import Detector, detector
from caco.nn.backbones import small_resnet
from caco.nn.norm import over_all_ranks
from experiments.toy_sets.detection import ring, shapes

SMALL: dict[str, Any] = {
    "anchors": (8, 16, 24),
    "proposal_samples": 32,
    "region_samples": 16,
    "region_cells": 4,
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
}


def small(head="c4", *, masks=True, num_classes=3, seed=0, **changed) -> Detector:
    torch.manual_seed(seed)
    backbone = small_resnet(stem_stride=2)
    settings = SMALL | ({"anchors": (4, 8, 16, 24, 32)} if head == "fpn" else {}) | changed
    return detector(backbone, head=head, num_classes=num_classes, masks=masks, **settings)


def example(seed: int, *, height=48, width=64) -> Example:
    """An example from a toy image at half its size, cropped to `height` x `width` pixels."""
    image, objects = shapes(seed, count=2)
    names = ["aeroplane", "bird", "car"]
    boxes = torch.tensor([box for _, box in objects], dtype=torch.float32) / 2
    polygons = [[np.array(ring(name, box), dtype=np.float32) / 2] for name, box in objects]
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[:, ::2, ::2][:, :height, :width]
    return Example(
        pixels, boxes, torch.tensor([names.index(name) + 1 for name, _ in objects]), polygons, seed=100 + seed
    )


UNEQUAL = [example(3), example(4, height=45, width=59), example(5, height=38)]


def losses_and_gradients(examples: list[Example], head: str, total: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of this rank's examples in float64, and the gradients for all `total` images of all ranks."""
    network = over_all_ranks(small(head), torch.device("cpu")).double().train()
    losses = network(examples)
    loss = torch.stack(list(losses.values()))
    loss.sum().backward()
    parameters = dict(network.named_parameters())
    distributed.mean_gradients(parameters.values())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert gradients.keys() == parameters.keys()
    return distributed.sum_(loss.detach()) / distributed.world(), gradients


def write_losses_and_gradients(folder: str, head: str) -> None:
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    own = UNEQUAL[:1] if distributed.rank() == 0 else UNEQUAL[1:]
    found = losses_and_gradients(own, head, len(UNEQUAL))
    if distributed.is_main():
        torch.save(found, Path(folder) / "two.pt")
    distributed.stop()


def norms_of(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def write_rows(path: str) -> None:
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    own = [{"image": i, "score": i / 3} for i in ([0, 2, 4] if distributed.rank() == 0 else [1])]
    rows = on_main(own, torch.device("cpu"))
    if distributed.is_main():
        Path(path).write_text(json.dumps(rows))
    distributed.stop()
