"""Faster and Mask R-CNN around a ResNet from timm, made from torchvision's parts as detectron2 and MoCo do it.

torchvision's own detectors differ from the published ones: they pool boxes without alignment, use a smooth box loss,
initialise layers differently, and have no C4 variant. This file and the classes that it uses change only these points.

Shapes: n images, R regions of all images, C channels, M cells along a mask's side.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from caco import distributed
from caco.errors import UserError
from caco.evals.dense.boxes_and_masks import Example
from caco.evals.dense.maps import require_resnet
from caco.evals.dense.proposals import RATIOS, Anchors, FloatRPNHead, Proposals, SeededSampler
from caco.evals.dense.regions import AlignedPool, Predictor, Regions, mask_layers

Head = Literal["c4", "fpn"]


class Detection(NamedTuple):
    """The objects found in one image, the highest score first, in the pixels of the image that the detector received.

    Attributes:
        boxes: [d, 4].
        labels: int64 [d], from 0 on.
        scores: [d].
        masks: probabilities [d, M, M] over the boxes; None without masks.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None


class Detector(nn.Module):
    """A detector: `forward` gives its losses on examples, `detect` the objects in images.

    Args:
        body: images [n, 3, H, W] -> feature maps of the levels, by name.
        proposals, regions: the two stages.
        divisible: the sides of images are padded to multiples of this.
        mean, std: of each channel, for pixels in 0..1, as in pre-training.
    """

    def __init__(
        self,
        body: nn.Module,
        proposals: Proposals,
        regions: Regions,
        *,
        divisible: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.body, self.proposals, self.regions, self.divisible = body, proposals, regions, divisible
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, examples: list[Example]) -> dict[str, Tensor]:
        """The losses by name, in training mode: objectness, proposal_box, class, box, mask. Training minimises their
        sum.
        """
        for sampler in (self.proposals.fg_bg_sampler, self.regions.fg_bg_sampler):
            sampler.seeds = [example.seed for example in examples]
        device = self.mean.device
        targets = [
            {"boxes": e.boxes.to(device), "labels": e.labels.to(device), "polygons": e.polygons} for e in examples
        ]
        images = self._batch([example.image for example in examples], over_ranks=True)
        features = self.body(images.tensors)
        proposals, losses = self.proposals(images, features, targets)
        _, more = self.regions(features, proposals, images.image_sizes, targets)
        return {"objectness": losses["loss_objectness"], "proposal_box": losses["loss_rpn_box_reg"], **more}

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detection]:
        """The objects in images, uint8 [3, H, W] each; in eval mode."""
        batch = self._batch(images)
        features = self.body(batch.tensors)
        proposals, _ = self.proposals(batch, features)
        found, _ = self.regions(features, proposals, batch.image_sizes)
        return [Detection(one["boxes"], one["labels"] - 1, one["scores"], one.get("masks")) for one in found]

    def _batch(self, images: list[Tensor], *, over_ranks: bool = False) -> ImageList:
        """Normalise images, and pad them with 0 to the right and below to a common size.

        Args:
            over_ranks: take the common size of the images on all ranks, because padding enters BatchNorm's statistics.
        """
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        largest = torch.tensor(sizes, device=self.mean.device).amax(dim=0)
        height, width = (
            -(-side // self.divisible) * self.divisible
            for side in (distributed.max_(largest) if over_ranks else largest).tolist()
        )
        out = self.mean.new_zeros(len(images), 3, height, width)
        for row, image in zip(out, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = (image.to(self.mean) / 255 - self.mean) / self.std
        return ImageList(out.contiguous(memory_format=torch.channels_last), sizes)


class Conv4(nn.Module):
    """The stem and the first three stages of a ResNet; its only level is the output of the third stage, conv4."""

    def __init__(self, backbone: ResNet) -> None:
        super().__init__()
        self.stem = _stem(backbone)
        self.layer1, self.layer2, self.layer3 = backbone.layer1, backbone.layer2, backbone.layer3

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict(c4=self.layer3(self.layer2(self.layer1(self.stem(x)))))


class Conv5(nn.Module):
    """The last stage, conv5, applied to regions, and an additional BatchNorm without ReLU: [R, C, 14, 14] to [R, 2 C,
    7, 7]."""

    def __init__(self, backbone: ResNet, width: int) -> None:
        super().__init__()
        self.layer4, self.norm = backbone.layer4, nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer4(x))


class Pyramid(nn.Module):
    """All four stages of a ResNet and a feature pyramid of 256 channels with BatchNorm; it has five levels."""

    def __init__(self, backbone: ResNet, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = _stem(backbone)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            backbone.layer1,
            backbone.layer2,
            backbone.layer3,
            backbone.layer4,
        )
        self.pyramid = FeaturePyramidNetwork(list(widths), 256, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, levels = self.stem(x), OrderedDict()
        for name in ("layer1", "layer2", "layer3", "layer4"):
            levels[name] = x = getattr(self, name)(x)
        return self.pyramid(levels)


def detector(
    backbone: nn.Module,
    *,
    head: Head,
    num_classes: int,
    masks: bool,
    anchors: Sequence[int] = (32, 64, 128, 256, 512),
    proposal_samples: int = 256,
    region_samples: int = 512,
    region_cells: int = 14,
    mean: Sequence[float],
    std: Sequence[float],
) -> Detector:
    """Make a detector from a copy of the backbone. New layers are initialised with torch's random numbers.

    Args:
        head: "c4": regions of conv4's map go through conv5 and MoCo's additional BatchNorm. "fpn": a feature pyramid,
            two linear layers for boxes and four convolutions for masks, both without BatchNorm, as in MoCo's runs.
        num_classes: K, without the background.
        masks: whether masks are learned and predicted.
        anchors: sizes in pixels; for c4 all of them at each place, for fpn one for each of its five levels.
        proposal_samples, region_samples: number of anchors and of regions of an image that enter the losses.
        region_cells: number of cells along each side of a pooled region: for c4 before conv5; for fpn of masks, and
            half as many of boxes.
        mean, std: see Detector.
    Raises:
        UserError: the backbone has no such stages, or there are not five anchors for fpn.
    """
    backbone = copy.deepcopy(require_resnet(backbone, "detect")).requires_grad_(True)
    widths, strides = stages_of(backbone)
    counts: tuple[dict[str, int], dict[str, int]]
    if head == "c4":
        body: nn.Module = Conv4(backbone)
        sizes, levels, width = [list(anchors)], [strides[2]], widths[2]
        box_head: nn.Module = Conv5(backbone, widths[3])
        box_pool, box_width = AlignedPool(levels, region_cells), widths[3]
        layers, mask_pool = mask_layers(widths[3], num_classes, convolutions=0) if masks else None, None
        counts = {"training": 12_000, "testing": 6_000}, {"training": 2_000, "testing": 1_000}
    else:
        if len(anchors) != 5:
            raise UserError(f"anchors: expected a size for each of the five levels of head=fpn, got {list(anchors)}")
        body = Pyramid(backbone, widths)
        sizes, levels, width = [[size] for size in anchors], [*strides, 2 * strides[3]], 256
        cells = region_cells // 2
        box_pool, box_head, box_width = AlignedPool(strides, cells), _two_linear(256 * cells**2, 1024), 1024
        layers, mask_pool = (
            (mask_layers(256, num_classes, convolutions=4), AlignedPool(strides, region_cells))
            if masks
            else (None, None)
        )
        counts = {"training": 2_000, "testing": 1_000}, {"training": 1_000, "testing": 1_000}
    proposals = Proposals(
        Anchors(sizes, levels),
        FloatRPNHead(width, len(sizes[0]) * len(RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=proposal_samples,
        positive_fraction=0.5,
        pre_nms_top_n=counts[0],
        post_nms_top_n=counts[1],
        nms_thresh=0.7,
    )
    regions = Regions(
        mask_layers=layers,
        mask_pool=mask_pool,
        box_roi_pool=box_pool,
        box_head=box_head,
        box_predictor=Predictor(box_width, num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=region_samples,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )
    proposals.fg_bg_sampler = SeededSampler(proposal_samples, 0.5)
    regions.fg_bg_sampler = SeededSampler(region_samples, 0.25)
    return Detector(body, proposals, regions, divisible=1 if head == "c4" else 32, mean=mean, std=std)


@torch.no_grad()
def stages_of(backbone: ResNet) -> tuple[list[int], list[int]]:
    """The channels and the strides of the four stages, measured with an image in a copy of the backbone."""
    probe = copy.deepcopy(backbone).cpu().float().eval()
    x, widths, strides = _stem(probe)(torch.zeros(1, 3, 64, 64)), [], []
    for stage in (probe.layer1, probe.layer2, probe.layer3, probe.layer4):
        x = stage(x)
        widths.append(x.shape[1])
        strides.append(64 // x.shape[2])
    return widths, strides


def _stem(backbone: ResNet) -> nn.Sequential:
    return nn.Sequential(backbone.conv1, backbone.bn1, backbone.act1, backbone.maxpool)


def _two_linear(width: int, out: int) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Flatten(), nn.Linear(width, out), nn.ReLU(inplace=True), nn.Linear(out, out), nn.ReLU(inplace=True)
    )
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    return layers
