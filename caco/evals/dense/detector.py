"""Faster and Mask R-CNN around a ResNet of timm's, from torchvision's parts, as detectron2 and MoCo put them together.

torchvision's own assemblies differ from the published ones: boxes are pooled without alignment, the box loss is smooth, layers start
otherwise, and there is no C4. What is here overrides just that.

Shapes: n images, R regions of all images, K classes (0 is the background), C channels, M cells along a mask's side.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from caco import distributed
from caco.errors import UserError
from caco.evals.dense.boxes_and_masks import Example, mask_targets
from caco.evals.dense.maps import require_resnet

Head = Literal["c4", "fpn"]
RATIOS = (0.5, 1.0, 2.0)  # height by width of the anchors


class Detection(NamedTuple):
    """What was found in one image, the surest first, in its pixels.

    boxes: [d, 4]. labels: int64 [d], from 0. scores: [d]. masks: probabilities [d, M, M] over the boxes; None without masks.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None


def wide(x: Tensor) -> Tensor:
    """float32 of what autocast made narrower."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Anchors(AnchorGenerator):
    """Anchors at the places of each level, a fixed stride apart. torchvision rounds them to whole pixels, and divides the image's size by
    that of the level's map: 15 instead of 16 for an image of 801 pixels."""

    def __init__(self, sizes: Sequence[Sequence[int]], strides: Sequence[int]) -> None:
        super().__init__(tuple(tuple(level) for level in sizes), (RATIOS,) * len(sizes))
        self.strides = list(strides)

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=torch.device("cpu")) -> Tensor:
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
    """Positive and negative positions of each image, at most `positive_fraction` of `size` positive; drawn by the image's own seed, so
    that it does not matter which rank has it.

    seeds: of the images of the next call, set before it.
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
    """torchvision's, with a plain L1 loss, and both losses over the number of anchors that are to be drawn."""

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(masks) for masks in self.fg_bg_sampler(labels))
        sampled, count = positive | negative, of_a_rank(self.fg_bg_sampler.size * len(labels), objectness)
        wanted = torch.cat(labels)[sampled].to(objectness)
        of_objects = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], wanted, reduction="sum")
        of_boxes = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        return of_objects / count, of_boxes / count


class FloatRPNHead(RPNHead):
    """torchvision's; its answers are float32 under autocast too: bfloat16 has 8 bits for a place in an image of 1,333 pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [wide(level) for level in logits], [wide(level) for level in deltas]


class AlignedPool(nn.Module):
    """RoIAlign, aligned to half a pixel, with as many samples as a region has pixels; of several levels each region takes one, by its size.

    Args:
        strides: of the levels, which come first in the features; a single level, or those from 4 to 32.
        size: cells along a side of what a region gives.
    """

    def __init__(self, strides: Sequence[int], size: int) -> None:
        super().__init__()
        self.strides, self.size = list(strides), size

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: object = None) -> Tensor:
        """[R, C, size, size], image by image."""
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
    """The level of each region, int64 [R], from 0: a box of 224 pixels square takes the third, one of half the side the one before.

    Source: Feature Pyramid Networks (arXiv 1612.03144), equation 1.
    """
    side = (boxes_R4[:, 2:] - boxes_R4[:, :2]).prod(dim=1).sqrt()
    return (2 + torch.log2(side / 224 + 1e-8)).floor().clamp(0, count - 1).long()


class Predictor(nn.Module):
    """Scores [R, K + 1] and one box for each class [R, (K + 1) * 4], float32; of maps [R, C, h, w] it takes the mean over their places."""

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
    """Maps [R, width, M, M] to logits [R, K + 1, 2 M, 2 M]: convolutions of 256 channels, one that doubles the grid, one for each class."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(width, 256, 3, padding=1), nn.ReLU(inplace=True)]
        width = 256
    layers += [nn.ConvTranspose2d(width, 256, 2, stride=2), nn.ReLU(inplace=True), nn.Conv2d(256, num_classes + 1, 1)]
    for layer in layers[:-1]:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    nn.init.normal_(layers[-1].weight, std=0.001)
    nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)


class Regions(RoIHeads):
    """torchvision's, with its own pass: a plain L1 loss; losses over the regions of all ranks; masks, where `mask_pool` is None, from the
    rows that the box head has computed already.

    Args:
        mask_layers, mask_pool: see `mask_layers` and AlignedPool; None without masks.
        settings: of torchvision's RoIHeads.
    """

    def __init__(self, *, mask_layers: nn.Module | None, mask_pool: AlignedPool | None, **settings) -> None:
        super().__init__(**settings)
        self.mask_layers, self.mask_pool = mask_layers, mask_pool

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
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
            losses["mask"] = mask_loss(wide(self.mask_layers(maps)), torch.cat(labels)[torch.cat(positive)], polygons, torch.cat(boxes))
        return [], losses

    def _found(self, features, proposals, image_shapes) -> list[dict[str, Tensor]]:
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        found = [{"boxes": b, "scores": s, "labels": label} for b, s, label in zip(boxes, scores, labels, strict=True)]
        if self.mask_layers is not None:
            maps = self.box_head(self.box_roi_pool(features, boxes)) if self.mask_pool is None else self.mask_pool(features, boxes)
            every = wide(self.mask_layers(maps))
            own = every[torch.arange(len(every), device=every.device), torch.cat(labels)].sigmoid()
            for one, masks in zip(found, own.split([len(label) for label in labels]), strict=True):
                one["masks"] = masks
        return found


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the classes and L1 of the box of each positive region's own class, both over the number of regions.

    Args:
        logits: [R, K + 1]. deltas: [R, (K + 1) * 4]. labels: int64 [R]. targets: [R, 4].
    """
    count = of_a_rank(len(labels), logits)
    positive = (labels > 0).nonzero()[:, 0]
    own = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
    return {
        "class": F.cross_entropy(logits, labels, reduction="sum") / count,
        "box": F.l1_loss(own, targets[positive], reduction="sum") / count,
    }


def mask_loss(logits: Tensor, labels: Tensor, polygons: list, boxes: Tensor) -> Tensor:
    """Binary cross-entropy of the mask of each positive region's own class, the mean over cells and regions."""
    targets = torch.from_numpy(mask_targets(polygons, boxes.cpu().numpy(), logits.shape[-1])).to(logits)
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    count = of_a_rank(len(labels), logits).clamp(min=1 / distributed.world())
    return F.binary_cross_entropy_with_logits(own, targets, reduction="sum") / (count * logits.shape[-1] ** 2)


def of_a_rank(count: int, like: Tensor) -> Tensor:
    """The mean of the ranks' counts: sums over it, averaged over the ranks, are the means of one process that has everything."""
    return distributed.sum_(torch.tensor(float(count), dtype=like.dtype, device=like.device)) / distributed.world()


class Detector(nn.Module):
    """A detector: `forward` gives its losses on examples, `detect` what it finds in images.

    Args:
        body: images [n, 3, H, W] to levels by name.
        divisible: sides are padded to multiples of it.
        mean, std: of pixels between 0 and 1, as in pre-training.
    """

    def __init__(
        self, body: nn.Module, proposals: Proposals, regions: Regions, *, divisible: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.body, self.proposals, self.regions, self.divisible = body, proposals, regions, divisible
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, examples: list[Example]) -> dict[str, Tensor]:
        """Losses by name: objectness, proposal_box, class, box, mask; their sum is what is minimised. In training mode."""
        for sampler in (self.proposals.fg_bg_sampler, self.regions.fg_bg_sampler):
            sampler.seeds = [example.seed for example in examples]
        device = self.mean.device
        targets = [{"boxes": e.boxes.to(device), "labels": e.labels.to(device), "polygons": e.polygons} for e in examples]
        images = self._batch([example.image for example in examples], over_ranks=True)
        features = self.body(images.tensors)
        proposals, losses = self.proposals(images, features, targets)
        _, more = self.regions(features, proposals, images.image_sizes, targets)
        return {"objectness": losses["loss_objectness"], "proposal_box": losses["loss_rpn_box_reg"], **more}

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detection]:
        """What is in images uint8 [3, H, W], in eval mode."""
        batch = self._batch(images)
        features = self.body(batch.tensors)
        proposals, _ = self.proposals(batch, features)
        found, _ = self.regions(features, proposals, batch.image_sizes)
        return [Detection(one["boxes"], one["labels"] - 1, one["scores"], one.get("masks")) for one in found]

    def _batch(self, images: list[Tensor], *, over_ranks: bool = False) -> ImageList:
        """Normalised, and padded with 0 to the right and below to a common size.

        Args:
            over_ranks: the size is that of the images of all ranks: padding is among what BatchNorm's statistics are of.
        """
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        largest = torch.tensor(sizes, device=self.mean.device).amax(dim=0)
        height, width = (-(-side // self.divisible) * self.divisible for side in (distributed.max_(largest) if over_ranks else largest).tolist())
        out = self.mean.new_zeros(len(images), 3, height, width)
        for row, image in zip(out, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = (image.to(self.mean) / 255 - self.mean) / self.std
        return ImageList(out.contiguous(memory_format=torch.channels_last), sizes)


class Conv4(nn.Module):
    """Stem and the first three stages; one level."""

    def __init__(self, backbone: ResNet) -> None:
        super().__init__()
        self.stem = _stem(backbone)
        self.layer1, self.layer2, self.layer3 = backbone.layer1, backbone.layer2, backbone.layer3

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict(c4=self.layer3(self.layer2(self.layer1(self.stem(x)))))


class Conv5(nn.Module):
    """The last stage over regions, and a BatchNorm of its own, without ReLU: [R, C, 14, 14] to [R, 2 C, 7, 7]."""

    def __init__(self, backbone: ResNet, width: int) -> None:
        super().__init__()
        self.layer4, self.norm = backbone.layer4, nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer4(x))


class Pyramid(nn.Module):
    """All four stages and a feature pyramid of 256 channels with BatchNorm; five levels."""

    def __init__(self, backbone: ResNet, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = _stem(backbone)
        self.layer1, self.layer2, self.layer3, self.layer4 = backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4
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
    """A detector of a copy of the backbone, with new layers drawn by torch's random numbers.

    Args:
        head: "c4": regions of the fourth stage go through the fifth and MoCo's extra BatchNorm. "fpn": a feature pyramid, two linear layers
            for boxes and four convolutions for masks, without BatchNorm, as in MoCo's runs.
        anchors: sizes in pixels: of c4 all at each place, of fpn one for each of its five levels.
        proposal_samples, region_samples: anchors and regions of an image that losses are taken of.
        region_cells: cells along the side of a pooled region: of c4 before the fifth stage, of fpn for masks, and half of it for boxes.
    Raises:
        UserError: the backbone has no such stages, or a pyramid has not five sizes of anchors.
    """
    backbone = copy.deepcopy(require_resnet(backbone, "detect")).requires_grad_(True)
    widths, strides = stages_of(backbone)
    counts: tuple[dict[str, int], dict[str, int]]
    if head == "c4":
        body: nn.Module = Conv4(backbone)
        sizes, levels, width = [list(anchors)], [strides[2]], widths[2]
        box_pool, box_head, box_width = AlignedPool(levels, region_cells), Conv5(backbone, widths[3]), widths[3]
        layers, mask_pool = mask_layers(widths[3], num_classes, convolutions=0) if masks else None, None
        counts = {"training": 12_000, "testing": 6_000}, {"training": 2_000, "testing": 1_000}
    else:
        if len(anchors) != 5:
            raise UserError(f"anchors: expected a size for each of the five levels of head=fpn, got {list(anchors)}")
        body = Pyramid(backbone, widths)
        sizes, levels, width = [[size] for size in anchors], [*strides, 2 * strides[3]], 256
        box_pool, box_head, box_width = AlignedPool(strides, region_cells // 2), _two_linear(256 * (region_cells // 2) ** 2, 1024), 1024
        layers, mask_pool = (mask_layers(256, num_classes, convolutions=4), AlignedPool(strides, region_cells)) if masks else (None, None)
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
    """Channels and strides of the four stages, found by sending an image through a copy."""
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
    layers = nn.Sequential(nn.Flatten(), nn.Linear(width, out), nn.ReLU(inplace=True), nn.Linear(out, out), nn.ReLU(inplace=True))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    return layers
