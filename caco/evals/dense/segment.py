"""Semantic segmentation: the whole network is fine-tuned on VOC 2012 with MoCo's head, FCN-16s.

Shapes: B images of H x W pixels, S the side of a crop, K = 21 classes.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed, metrics
from caco.data.loaders.batches import mixed_seed
from caco.data.views.augmentation import Views
from caco.errors import UserError
from caco.evals.base import Evaluator, Work
from caco.evals.dense import pixel_metric, roots
from caco.evals.dense.counting import VOC_IMAGE, work_of
from caco.evals.dense.maps import Maps, dilated_last_stage, require_resnet
from caco.evals.dense.recipe import Recipe
from caco.evals.dense.segmentation_sets import (
    CLASSES,
    IGNORED,
    LAYOUT,
    NUM_IMAGES,
    LabelledPixels,
    SegmentationSet,
    voc2012,
)
from caco.evals.dense.training import Task, one_by_one, train
from caco.evals.features import FeatureStore, Precision
from caco.evals.pixels import RawPixels
from caco.ranges import Count, Interval, NonNegative, Share, ShareBelowOne, Side, Width, held

DILATION = 6  # dilation of the head's convolutions


class Segment(Evaluator):
    """Segmentation of VOC 2012 val: `<protocol>/voc2012_miou`, `_mean_accuracy`, `_pixel_accuracy`, percent. The
    protocol is called `segment_fcn16`; changed settings appear in its name (caco/metrics.py).

    The protocol is MoCo's (arXiv 1911.05722, appendix). The network is a copy of the ResNet whose 3x3 convolutions of
    conv5 have stride 1 and dilation 2, so that its stride is 16; two 3x3 convolutions of 256 channels, dilation 6, with
    BatchNorm and ReLU; and a 1x1 convolution to 21 classes. Everything is trained, BatchNorm too, over all images of a
    step. Training images are scaled by 0.5 to 2, cropped to 513 pixels and flipped; test images are used as a whole, at
    their own size. The mIoU is computed from one confusion matrix over all pixels, for the network after the last step.

    Args:
        root: the folder that holds VOCdevkit, and SBD's labels in one of their layouts (docs/dense.md).
        train: "trainaug", 10,582 images, or "train", 1,464.
        images, steps, rate, milestones, momentum, weight_decay: see Recipe; steps and rate are given for 16 images in a
            step and are scaled for other `images`.
        crop: side of a crop in pixels.
        scale: range [smallest, largest] of the scale, which is drawn uniformly.
        channels: number of channels of the head's two hidden layers.
        precision: "fp32" as published, or "bf16".
        save_every_steps: steps between checkpoints of the training; it does not change the result.
        when: "epoch" (during training and at its end) or "end".
    Raises:
        UserError: scale is not above 0 or not ascending.
    """

    on_all_ranks = True
    # Its own photographs, so a backbone for data.channels cannot be evaluated (caco/config/channels_needed.py).
    reads_photographs = True
    departures = (
        (
            "segment_fcn16: MoCo's code for it was not published. Where the paper is silent, the scale is drawn evenly"
            " from its range, small images are padded with the mean colour and the label 255, weight decay is on all"
            " weights, new layers are initialised with He's standard deviation and the last one with 0.01, and scores"
            " are interpolated bilinearly between places. The effect of these choices was not measured."
        ),
        "segment_fcn16: on GPUs PyTorch's float32 convolutions use TF32 unless this is turned off.",
    )

    @held
    def __init__(
        self,
        *,
        root: str | None = None,
        train: Literal["trainaug", "train"] = "trainaug",
        images: Count = 16,
        steps: Count = 30_000,
        rate: NonNegative = 0.003,
        milestones: Sequence[Share] = (0.7, 0.9),
        momentum: ShareBelowOne = 0.9,
        weight_decay: NonNegative = 1e-4,
        crop: Side = 513,
        scale: Interval = (0.5, 2.0),
        channels: Width = 256,
        precision: Precision = "fp32",
        save_every_steps: Count = 1000,
        when: Literal["epoch", "end"] = "end",
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise UserError(f"segment: expected scale as [smallest, largest] above 0, got {list(scale)}")
        self.recipe = Recipe(
            steps=steps,
            images=images,
            rate=rate,
            milestones=list(milestones),
            momentum=momentum,
            weight_decay=weight_decay,
        )
        self.root, self.train, self.crop, self.scale, self.channels = root, train, crop, list(scale), channels
        self.precision, self.save_every_steps, self.when = precision, save_every_steps, when
        self.protocol = metrics.segment(
            train=train, images=images, steps=steps, rate=rate, milestones=milestones, momentum=momentum,
            weight_decay=weight_decay,
            crop=crop, scale=scale, channels=channels, precision=precision,
        )  # fmt: skip

    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Find the set.

        Raises:
            UserError: the set is incomplete, or tests on images that the encoder was trained on; or a step has fewer
                images than there are processes.
        """
        self.recipe.refuse_more_ranks_than_images()
        self._store, self._seed = store, seed
        self._set = found_voc2012(self.root, "segment", self.train, store)

    def require(self, backbone: nn.Module) -> None:
        require_resnet(backbone, "segment")

    def inputs(self) -> list[Any]:
        """The images and labels, by cache key."""
        return [self._set.train.cache_key(), self._set.test.cache_key()]

    def image_sets(self) -> dict[str, str]:
        return {"voc2012": self._set.test.digest()}

    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (`<protocol>/voc2012_<measure>`, percent).

        Raises:
            UserError: the backbone is not a ResNet from timm, or the loss is not finite.
        """
        store = self._store
        if isinstance(backbone, RawPixels):
            store.say(f"{self.protocol} skips the baseline of raw pixels, which has no stages to fine-tune")
            return
        require_resnet(backbone, "segment")
        made_from = {
            "backbone": store.digest_of(backbone), "images": self._set.train.digest(), "crop": self.crop,
            "scale": self.scale,
            "channels": self.channels, "mean": store.views.mean, "std": store.views.std,
        }  # fmt: skip
        network = train(
            FCN16(backbone, channels=self.channels, seed=self._seed),
            Crops(self._set.train, store.views, crop=self.crop, scale=self.scale),
            self.recipe,
            store,
            seed=self._seed,
            name=self.protocol,
            made_from=made_from,
            precision=self.precision,
            save_every_steps=self.save_every_steps,
        )
        for measure, value in scored(
            network, self._set.test, store, name=self.protocol, precision=self.precision
        ).items():
            yield f"{self.protocol}/voc2012_{measure}", value

    def work(self, backbone: Callable[[], nn.Module]) -> list[Work]:
        network, crop = FCN16(backbone(), channels=self.channels, seed=0), self.crop
        seen = self.recipe.num_steps * self.recipe.images
        height, width = VOC_IMAGE
        return [
            work_of(
                f"{self.protocol}: crops of {crop} px to train on",
                seen,
                network,
                height=crop,
                width=crop,
                training=True,
            ),
            work_of(
                f"{self.protocol}: images to test on",
                NUM_IMAGES["val"],
                network,
                height=height,
                width=width,
                training=False,
            ),
        ]


def found_voc2012(
    root: str | None, evaluator: str, train: Literal["trainaug", "train"], store: FeatureStore
) -> SegmentationSet:
    """Find VOC 2012 in the folder that a setting names, and report how many images it has.

    Raises:
        UserError: the set is incomplete, or its test images are among those that the encoder or the head is trained on.
    """
    found = voc2012(roots.existing(root, evaluator, LAYOUT), train)
    for files in (found.train.files, found.train.labels, found.test.files, found.test.labels):
        files.look(store.say)  # all ranks share the reading
    for source in (found.train.files, store.splits.pretrain):
        store.refuse_shared(source, found.test.files)
    parts = {train: ("train on", found.train), "val": ("test on", found.test)}
    there = ", ".join(
        f"{len(part):,} images to {use} (published: {NUM_IMAGES[name]:,})" for name, (use, part) in parts.items()
    )
    store.say(f"{evaluator}: VOC 2012, {there}")
    return found


class FCN16(nn.Module):
    """MoCo's FCN-16s around a copy of a ResNet: images [B, 3, H, W] to scores [B, K, H, W], float32.

    Args:
        backbone: a ResNet from timm.
        channels: number of channels of the head's two hidden layers.
        seed: seed of the new layers.
        num_classes: K.
    """

    def __init__(self, backbone: nn.Module, *, channels: int, seed: int, num_classes: int = len(CLASSES)) -> None:
        super().__init__()
        body = dilated_last_stage(require_resnet(copy.deepcopy(backbone), "segment"))
        self.maps = Maps(body.requires_grad_(True), purpose="segment")
        layers: list[nn.Module] = []
        for width in (self.maps.width, channels):
            convolution = nn.Conv2d(width, channels, 3, padding=DILATION, dilation=DILATION, bias=False)
            layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        last = nn.Conv2d(channels, num_classes, 1)
        draws = torch.Generator().manual_seed(mixed_seed(seed, 0))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=draws)
        nn.init.normal_(last.weight, std=0.01, generator=draws)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.head = nn.Sequential(*layers, last)

    def forward(self, images: Tensor) -> Tensor:
        return self.maps.to_pixels(self.head(self.maps(images)), *images.shape[-2:])


class Crops(Task):
    """The training images, scaled, cropped and flipped.

    Args:
        images: the images and their labels.
        views: their mean and standard deviation normalise the pixels.
        crop: S, side of a crop in pixels.
        scale: range [smallest, largest] of the scale.
    """

    def __init__(self, images: LabelledPixels, views: Views, *, crop: int, scale: Sequence[float]) -> None:
        self.images, self.files, self.views, self.crop, self.scale = images, images.files, views, crop, list(scale)

    def example(self, index: int, seed: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Pixels uint8 [S, S, 3], labels uint8 [S, S], and (height, width) of the part that is not padding. Padding is
        below and to the right.
        """
        image, labels = self.images.read(index)
        rng, side = np.random.default_rng(seed), self.crop
        factor = rng.uniform(self.scale[0], self.scale[1])
        width, height = (max(1, round(factor * pixels)) for pixels in image.size)
        left, top = (int(rng.integers(0, max(0, pixels - side) + 1)) for pixels in (width, height))
        flipped = rng.random() < 0.5
        box = (left, top, min(left + side, width), min(top + side, height))
        pixels = np.asarray(resized(image, width, height).crop(box))
        classes = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST).crop(box))
        if flipped:
            pixels, classes = pixels[:, ::-1], classes[:, ::-1]
        shape = classes.shape
        below, right = side - shape[0], side - shape[1]
        pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)))
        classes = np.pad(classes, ((0, below), (0, right)), constant_values=IGNORED)
        return torch.from_numpy(pixels), torch.from_numpy(classes), shape

    def loss(self, network: nn.Module, examples: list[tuple[Tensor, Tensor, tuple[int, int]]]) -> Tensor:
        """The mean cross-entropy over the labelled pixels of all ranks."""
        device = next(network.parameters()).device
        pixels, classes = (torch.stack(parts).to(device) for parts in list(zip(*examples, strict=True))[:2])
        images = self.views.normalise(pixels)
        for image, (_, _, (height, width)) in zip(images, examples, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        labelled = distributed.sum_((classes != IGNORED).sum().float()).clamp(min=1)
        each = F.cross_entropy(network(images), classes.long(), ignore_index=IGNORED, reduction="sum")
        return each / labelled * distributed.world()


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize bilinearly, first across, then down. Two calls, because from version 13 on Pillow swaps the two passes for
    some shapes, which changes the rounding."""
    return image.resize((width, image.height), Image.Resampling.BILINEAR).resize(
        (width, height), Image.Resampling.BILINEAR
    )


@torch.no_grad()
def scored(
    network: nn.Module, images: LabelledPixels, store: FeatureStore, *, name: str, precision: Precision
) -> dict[str, float]:
    """The scores of a network in eval mode on whole images at their own size, on every rank. Each image is processed by
    one rank. A collective.
    """
    device, num_classes = store.device, len(CLASSES)
    matrix_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def example(index: int) -> tuple[Tensor, Tensor]:
        image, labels = images.read(index)
        return torch.from_numpy(np.array(image)), torch.from_numpy(labels)

    def count_pixels() -> None:
        for _, one in one_by_one(example, images.files, store, name=name):
            if one is None:
                continue
            pixels, labels = one
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                scores = network(store.views.normalise(pixels[None].to(device)))
            matrix_KK.add_(pixel_metric.confusion(labels.to(device), scores[0].argmax(dim=0), num_classes))

    distributed.on_each(count_pixels)
    return pixel_metric.scores(distributed.sum_(matrix_KK))
