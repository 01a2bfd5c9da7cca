"""The first stage of a detector: proposals of regions that may contain an object, by torchvision's network, changed to
match detectron2.

Shapes: n images, R regions of all images.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from caco import distributed

RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors


class Anchors(AnchorGenerator):
    """Anchors at the places of each level, a fixed stride apart. torchvision's class differs: it rounds anchors to
    whole pixels, and takes as stride the image's size over the map's size, which is 15 instead of 16 for an image of
    801 pixels."""

    def __init__(self, sizes: Sequence[Sequence[int]], strides: Sequence[int]) -> None:
        super().__init__(tuple(tuple(level) for level in sizes), (RATIOS,) * len(sizes))
        self.strides = list(strides)

    def generate_anchors(
        self,
        scales: Sequence[int],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
    ) -> Tensor:
        scale, ratio = torch.as_tensor(scales, dtype=dtype), torch.as_tensor(aspect_ratios, dtype=dtype).sqrt()
        w, h = (scale[:, None] / ratio).flatten(), (scale[:, None] * ratio).flatten()
        return (torch.stack([-w, -h, w, h], dim=1) / 2).to(device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        self.set_cell_anchors(wide(feature_maps[0]).dtype, device)
        strides = [[torch.tensor(s, device=device)] * 2 for s in self.strides]
        every = torch.cat(self.grid_anchors([list(level.shape[-2:]) for level in feature_maps], strides))
        return [every] * len(image_list.image_sizes)


class SeededSampler:
    """Draws positive and negative positions of each image; at most the share `positive_fraction` of `size` is positive.
    The draw depends on the image's own seed, so that it does not matter which rank has the image.

    Attributes:
        seeds: the seeds of the images of the next call; set before each call.
    """

    def __init__(self, size: int, positive_fraction: float) -> None:
        self.size, self.positive_fraction = size, positive_fraction
        self.seeds: list[int] = []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for label, seed in zip(labels, self.seeds, strict=True):
            draw = torch.Generator(label.device).manual_seed(seed)
            room = int(self.size * self.positive_fraction)
            for masks, candidates in zip(chosen, (label >= 1, label == 0), strict=True):
                places = candidates.nonzero()[:, 0]
                places = places[torch.randperm(len(places), generator=draw, device=label.device)[:room]]
                masks.append(torch.zeros_like(candidates).index_fill_(0, places, True))
                room = self.size - len(places)
        return chosen


class Proposals(RegionProposalNetwork):
    """torchvision's network with a plain L1 loss. Both losses are divided by the number of anchors to draw, even if
    fewer could be drawn."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(masks) for masks in self.fg_bg_sampler(labels))
        sampled, count = positive | negative, of_a_rank(self.fg_bg_sampler.size * len(labels), objectness)
        wanted = torch.cat(labels)[sampled].to(objectness)
        of_objects = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], wanted, reduction="sum")
        of_boxes = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        return of_objects / count, of_boxes / count


class FloatRPNHead(RPNHead):
    """torchvision's RPNHead with float32 outputs, under autocast too: bfloat16 has only 8 bits, too few for positions
    in an image of 1,333 pixels.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [wide(level) for level in logits], [wide(level) for level in deltas]


def of_a_rank(count: int, like: Tensor) -> Tensor:
    """The mean of the counts over all ranks, a scalar. If each rank divides its sum by it, the mean over the ranks is
    the mean that one process with all images would compute.
    """
    return distributed.sum_(torch.tensor(float(count), dtype=like.dtype, device=like.device)) / distributed.world()


def wide(x: Tensor) -> Tensor:
    """Convert bfloat16 and float16, as autocast makes them, to float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
