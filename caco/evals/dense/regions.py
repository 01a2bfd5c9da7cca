"""The second stage of a detector: class, box and mask of each region, by torchvision's heads, changed to match
detectron2.

Shapes: n images, R regions of all images, K classes (label 0 is the background), C channels, M cells along a mask's
side.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import roi_align

from caco import distributed
from caco.evals.dense.boxes_and_masks import mask_targets
from caco.evals.dense.proposals import of_a_rank, wide


class AlignedPool(nn.Module):
    """RoIAlign, aligned to half a pixel, with as many samples as a region has pixels. Each region is pooled from one
    level, chosen by its size.

    Args:
        strides: the strides of the levels to pool from, which are the first levels of the features: one level, or those
            of strides 4 to 32.
        size: number of cells along each side of the result.
    """

    def __init__(self, strides: Sequence[int], size: int) -> None:
        super().__init__()
        self.strides, self.size = list(strides), size

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: object = None) -> Tensor:
        """Pool all boxes, image by image: [R, C, size, size]."""
        levels = [wide(level) for level in list(features.values())[: len(self.strides)]]
        images = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
        regions = torch.cat([images, torch.cat(boxes)], dim=1)
        level_R = level_of(regions[:, 1:], len(levels))
        out = levels[0].new_zeros(len(regions), levels[0].shape[1], self.size, self.size)
        for i, (level, stride) in enumerate(zip(levels, self.strides, strict=True)):
            rows = (level_R == i).nonzero()[:, 0]
            pooled = roi_align(level, regions[rows].to(level), self.size, 1 / stride, sampling_ratio=0, aligned=True)
            out[rows] = pooled
        return out


def level_of(boxes_R4: Tensor, count: int) -> Tensor:
    """The level of each region, int64 [R], numbered from 0. A box of 224 x 224 pixels takes the third level, a box of
    half its side the second, and so on.

    Source: Feature Pyramid Networks (arXiv 1612.03144), equation 1.
    """
    side = (boxes_R4[:, 2:] - boxes_R4[:, :2]).prod(dim=1).sqrt()
    return (2 + torch.log2(side / 224 + 1e-8)).floor().clamp(0, count - 1).long()


class Predictor(nn.Module):
    """Scores [R, K + 1] and a box for each class [R, (K + 1) * 4], float32. Inputs are rows [R, width] or maps [R,
    width, h, w], of which it takes the mean over places.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Linear(width, num_classes + 1), nn.Linear(width, 4 * (num_classes + 1))
        for layer, spread in ((self.scores, 0.01), (self.boxes, 0.001)):
            nn.init.normal_(layer.weight, std=spread)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.mean(dim=(2, 3)) if x.ndim == 4 else x
        return wide(self.scores(x)), wide(self.boxes(x))


def mask_layers(width: int, num_classes: int, *, convolutions: int) -> nn.Sequential:
    """Layers that turn maps [R, width, M, M] into logits [R, K + 1, 2 M, 2 M]: convolutions of 256 channels, one that
    doubles the resolution, and a 1x1 convolution.
    """
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(width, 256, 3, padding=1), nn.ReLU(inplace=True)]
        width = 256
    layers += [nn.ConvTranspose2d(width, 256, 2, stride=2), nn.ReLU(inplace=True), nn.Conv2d(256, num_classes + 1, 1)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    last = layers[-1]
    assert isinstance(last, nn.Conv2d)
    nn.init.normal_(last.weight, std=0.001)
    return nn.Sequential(*layers)


class Regions(RoIHeads):
    """torchvision's RoIHeads with its own `forward`. The box loss is a plain L1 loss, and losses are means over the
    regions of all ranks. If `mask_pool` is None, masks use the maps that the box head has computed already. With
    targets `forward` gives losses, without them detections.

    Args:
        mask_layers: see the function `mask_layers`; None for a detector without masks.
        mask_pool: an AlignedPool, or None.
        settings: arguments of torchvision's RoIHeads.
    """

    def __init__(self, *, mask_layers: nn.Module | None, mask_pool: AlignedPool | None, **settings: Any) -> None:
        super().__init__(**settings)
        self.mask_layers, self.mask_pool = mask_layers, mask_pool

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if targets is None:
            return self._found(features, proposals, image_shapes), {}
        proposals, matched, labels, box_targets = self.select_training_samples(proposals, targets)
        rows = self.box_head(self.box_roi_pool(features, proposals))
        logits, deltas = self.box_predictor(rows)
        losses = box_losses(logits, deltas, torch.cat(labels), torch.cat(box_targets))
        if self.mask_layers is not None:
            positive = [label > 0 for label in labels]
            boxes = [box[chosen] for box, chosen in zip(proposals, positive, strict=True)]
            maps = rows[torch.cat(positive)] if self.mask_pool is None else self.mask_pool(features, boxes)
            whose = [index[chosen].tolist() for index, chosen in zip(matched, positive, strict=True)]
            polygons = [target["polygons"][i] for target, own in zip(targets, whose, strict=True) for i in own]
            losses["mask"] = mask_loss(
                wide(self.mask_layers(maps)), torch.cat(labels)[torch.cat(positive)], polygons, torch.cat(boxes)
            )
        return [], losses

    def _found(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        found = [{"boxes": b, "scores": s, "labels": label} for b, s, label in zip(boxes, scores, labels, strict=True)]
        if self.mask_layers is not None:
            maps = (
                self.box_head(self.box_roi_pool(features, boxes))
                if self.mask_pool is None
                else self.mask_pool(features, boxes)
            )
            every = wide(self.mask_layers(maps))
            own = every[torch.arange(len(every), device=every.device), torch.cat(labels)].sigmoid()
            for one, masks in zip(found, own.split([len(label) for label in labels]), strict=True):
                one["masks"] = masks
        return found


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the classes, and the L1 loss of each positive region's box for its own class. Both are sums
    divided by the number of regions.

    Args:
        logits: [R, K + 1].
        deltas: [R, (K + 1) * 4], predicted boxes relative to the regions.
        labels: int64 [R]; 0 is the background.
        targets: [R, 4], the boxes to predict.
    """
    count = of_a_rank(len(labels), logits)
    positive = (labels > 0).nonzero()[:, 0]
    own = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
    return {
        "class": F.cross_entropy(logits, labels, reduction="sum") / count,
        "box": F.l1_loss(own, targets[positive], reduction="sum") / count,
    }


def mask_loss(logits: Tensor, labels: Tensor, polygons: list, boxes: Tensor) -> Tensor:
    """Binary cross-entropy of each positive region's mask for its own class, averaged over cells and regions.

    Args:
        logits: [R, K + 1, 2 M, 2 M], of the positive regions.
        labels: int64 [R].
        polygons: the rings of each region's object.
        boxes: [R, 4], the regions.
    """
    targets = torch.from_numpy(mask_targets(polygons, boxes.cpu().numpy(), logits.shape[-1])).to(logits)
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    count = of_a_rank(len(labels), logits).clamp(min=1 / distributed.world())
    return F.binary_cross_entropy_with_logits(own, targets, reduction="sum") / (count * logits.shape[-1] ** 2)
