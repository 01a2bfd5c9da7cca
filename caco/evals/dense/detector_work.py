"""The cost of a detector for caco.plan: arithmetic counted on tensors without data, time measured on real ones."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from caco.evals.base import Work
from caco.evals.dense.boxes_and_masks import Example
from caco.evals.dense.detector import Detector

TEST_REGIONS = 1000  # proposals of a test image


def counted(what: str, images: int, network: Detector, height: int, *, training: bool) -> Work:
    """The cost of images, `height` pixels high and a third more wide, in a detector on the CPU; with `training` also of
    the backward pass.

    The arithmetic is that of the layers, for as many regions as are drawn; a quarter of them have masks in training.
    The little arithmetic of RoIAlign and non-maximum suppression is not counted, but their time is measured.
    """
    width = 4 * height // 3

    def once(device: torch.device) -> None:
        own = copy.deepcopy(network).to(device).train(training)
        if training:
            torch.stack(list(own([_example(height, width)]).values())).sum().backward()
        else:
            own.detect([torch.zeros(3, height, width, dtype=torch.uint8)])

    layers = _Layers(network, network.regions.fg_bg_sampler.size if training else TEST_REGIONS)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        layers = copy.deepcopy(layers).to("meta").train(training)
        with torch.set_grad_enabled(training):
            out = layers(torch.zeros(1, 3, height, width))
        if training:
            out.backward()
    return Work(what, images, counter.get_total_flops(), once)


class _Layers(nn.Module):
    """The layers of a detector that do arithmetic, without the steps that depend on values."""

    def __init__(self, network: Detector, num_regions: int) -> None:
        super().__init__()
        self.network, self.num_regions = network, num_regions

    def forward(self, images: Tensor) -> Tensor:
        network, regions = self.network, self.network.regions
        levels = list(network.body(images).values())
        logits, deltas = network.proposals.head(levels)
        size = regions.box_roi_pool.size
        # Computed from a level's features, so that the backward pass reaches the body, as it does through RoIAlign.
        pooled = levels[0].mean(dim=(2, 3), keepdim=True).expand(self.num_regions, -1, size, size)
        rows = regions.box_head(pooled)
        outputs = [*logits, *deltas, *regions.box_predictor(rows)]
        if regions.mask_layers is not None:
            part = self.num_regions // 4 if self.training else 100
            own = (
                rows[:part]
                if regions.mask_pool is None
                else levels[0].mean(dim=(2, 3), keepdim=True).expand(part, -1, *[regions.mask_pool.size] * 2)
            )
            outputs.append(regions.mask_layers(own))
        return torch.stack([output.sum() for output in outputs]).sum()


def _example(height: int, width: int) -> Example:
    """An image of noise with three boxes."""
    draw = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.3, 0.2, 0.9, 0.9], [0.6, 0.1, 0.7, 0.2]]) * torch.tensor(
        [width, height] * 2
    )
    polygons = [[np.array([[x0, y0], [x1, y0], [x1, y1]])] for x0, y0, x1, y1 in boxes.tolist()]
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=draw)
    return Example(pixels, boxes, torch.tensor([1, 2, 3]), polygons)
