"""Detection: a detector around a copy of the backbone is fine-tuned on PASCAL VOC 07+12 or COCO 2017, and scored once
on the test images."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from caco import distributed, metrics
from caco.data.loaders.batches import mixed_seed
from caco.errors import UserError
from caco.evals.base import Evaluator, Work
from caco.evals.dense import roots
from caco.evals.dense.boxes_and_masks import Example, example_of
from caco.evals.dense.detection_metric import Boxes, coco_scores, voc_scores
from caco.evals.dense.detection_rows import coco_row, on_main, rows_of
from caco.evals.dense.detection_sets import LAYOUTS, READERS, AnnotatedImages, DetectionSet
from caco.evals.dense.detector import Detector, Head, detector
from caco.evals.dense.detector_work import counted
from caco.evals.dense.maps import require_resnet
from caco.evals.dense.recipe import Recipe
from caco.evals.dense.training import Task, batches, one_by_one, train
from caco.evals.features import FeatureStore, Precision
from caco.evals.pixels import RawPixels
from caco.installed import to_install
from caco.nn.norm import BATCH_NORMS
from caco.ranges import Count, Length, Natural, NonNegative, Pixels, Share, ShareBelowOne, held

NUM_TEST_IMAGES = {"voc": 4952, "coco": 5000}
_OPTIONS = {  # the options of conf/eval, by the recipe's name
    "detect_voc_c4": "detect", "detect_coco_c4_1x": "detect_coco", "detect_coco_c4_2x": "detect_coco_2x",
    "detect_coco_fpn_1x": "detect_coco_fpn",
}  # fmt: skip
_NEW_LAYERS, _STATISTICS = 3, 4  # what is drawn, continuing the numbers in training.py


class Detect(Evaluator):
    """Average precision of boxes, and for COCO of masks, percent: `<protocol>/voc2007_ap50`, `_ap`, `_ap75`, or
    `<protocol>/coco2017_box_ap`, `_mask_ap` and others. The protocol is called `name`; changed settings of the recipe
    with that name appear in it (caco/metrics.py).

    The protocol is MoCo's (arXiv 1911.05722, and the configurations of its code): all layers are trained, BatchNorm
    uses the images of all ranks, boxes have a plain L1 loss and are predicted class by class, normalisation layers have
    no weight decay, and BatchNorm's statistics are computed anew before the test, which is done once. `departures`
    lists the differences from detectron2, which MoCo used.

    Args:
        name: detect_voc_c4, detect_coco_c4_1x, detect_coco_c4_2x, detect_coco_fpn_1x, or a name of your own.
        root: the folder that holds the set.
        dataset: "voc" (07+12; MoCo's later tables) or "coco" (2017, with masks).
        head: "c4" or "fpn", see `detector`.
        steps, images, rate, milestones, warmup_steps, momentum, weight_decay: see Recipe; steps and rate are given for
            16 images in a step and are scaled for other `images`.
        short_sides: possible lengths in pixels of the shorter side in training, drawn for each image.
        test_side: length in pixels of the shorter side in the test.
        longest: greatest length in pixels of the longer side.
        anchors, proposal_samples, region_samples, region_cells: see `detector`.
        precise_batches: number of training batches over which BatchNorm's statistics are computed anew; 0 keeps those
            of training.
        precision: "fp32", as published, or "bf16" (autocast).
        save_every_steps: steps between checkpoints; it does not change the result.
        when: "epoch" (during training and at its end) or "end".
    Raises:
        UserError: a value is out of its range.
    """

    on_all_ranks = True
    # Its own photographs, so a backbone for data.channels cannot be evaluated (caco/config/channels_needed.py).
    reads_photographs = True
    _seed = 0
    departures = (
        (
            "detect: differs from detectron2, with which the published numbers were made, in this: each image's anchors"
            " and regions, and the order of images, are drawn in another way; a step's images are not grouped by their"
            " aspect ratio, and all ranks pad to one size; losses of regions and masks are means over all ranks, as on"
            " one GPU with all images; orientation tags of image files are not read; VOC's recalls are compared with"
            " tenths exactly. The effect of these differences was not measured."
        ),
        "detect: on GPUs PyTorch's float32 convolutions use TF32 unless this is turned off.",
    )

    @held
    def __init__(
        self,
        *,
        name: str = "detect_voc_c4",
        root: str | None = None,
        dataset: Literal["voc", "coco"] = "voc",
        head: Head = "c4",
        steps: Count = 24_000,
        images: Count = 16,
        rate: NonNegative = 0.02,
        milestones: Sequence[Share] = (18 / 24, 22 / 24),
        warmup_steps: Natural = 100,
        momentum: ShareBelowOne = 0.9,
        weight_decay: NonNegative = 1e-4,
        short_sides: Annotated[Sequence[Pixels], Length(least=1)] = tuple(range(480, 801, 32)),
        test_side: Pixels = 800,
        longest: Pixels = 1333,
        anchors: Annotated[Sequence[Pixels], Length(least=1)] = (32, 64, 128, 256, 512),
        proposal_samples: Count = 256,
        region_samples: Count = 512,
        region_cells: Count = 14,
        precise_batches: Natural = 200,
        precision: Precision = "fp32",
        save_every_steps: Count = 1000,
        when: Literal["epoch", "end"] = "end",
    ) -> None:
        problems = [
            f"{key}: expected {wanted}, got {value!r}"
            for key, value, fine, wanted in (
                ("short_sides", short_sides, min(short_sides) >= 32, "sides of at least 32 pixels"),
                ("test_side", test_side, test_side >= 32, "at least 32 pixels"),
                ("longest", longest, longest >= max(test_side, *short_sides), "at least each shorter side"),
                ("anchors", anchors, head != "fpn" or len(anchors) == 5, "with head=fpn five, one a level"),
                ("proposal_samples", proposal_samples, proposal_samples >= 2, "at least 2"),
                ("region_samples", region_samples, region_samples >= 4, "at least 4"),
                ("region_cells", region_cells, region_cells >= 2 and region_cells % 2 == 0, "an even number"),
            )
            if not fine
        ]
        if problems:
            raise UserError(f"{name} " + "; ".join(problems))
        self.recipe = Recipe(
            steps=steps,
            images=images,
            rate=rate,
            milestones=list(milestones),
            warmup_steps=warmup_steps,
            momentum=momentum,
            weight_decay=weight_decay,
            decay_norms=False,
        )
        self.name, self.root, self.dataset, self.head, self.when, self.precision = (
            name,
            root,
            dataset,
            head,
            when,
            precision,
        )
        self.short_sides, self.test_side, self.longest = list(short_sides), test_side, longest
        self.network_settings: dict[str, Any] = {
            "head": head, "anchors": list(anchors), "proposal_samples": proposal_samples,
            "region_samples": region_samples,
            "region_cells": region_cells,
        }  # fmt: skip
        self.precise_batches, self.save_every_steps = precise_batches, save_every_steps
        self.protocol = metrics.detect(
            name=name, dataset=dataset, steps=steps, images=images, rate=rate, milestones=list(milestones),
            warmup_steps=warmup_steps,
            momentum=momentum, weight_decay=weight_decay, short_sides=list(short_sides), test_side=test_side,
            longest=longest,
            precise_batches=precise_batches, precision=precision, **self.network_settings,
        )  # fmt: skip

    @property
    def masks(self) -> bool:
        return self.dataset == "coco"

    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Read the annotations and check that every image is there.

        Raises:
            UserError: the set is incomplete, masks need a package that is not installed, or test images are among the
                pre-training images.
        """
        self._store, self._seed = store, seed
        if self.dataset == "coco":
            require_pycocotools()
        option = _OPTIONS.get(self.name, "NAME")
        self._set: DetectionSet = READERS[self.dataset](roots.existing(self.root, option, LAYOUTS[self.dataset]))
        store.refuse_shared(store.splits.pretrain, self._set.test.files)

    def require(self, backbone: nn.Module) -> None:
        require_resnet(backbone, "detect")

    def inputs(self) -> list[Any]:
        """What the numbers depend on besides the arguments: the set, by name, digests and cache keys."""
        return [*self._set.inputs(), *(self._store.key_of(part.files) for part in (self._set.train, self._set.test))]

    def image_sets(self) -> dict[str, str]:
        return {self._set.name: self._set.test.digest()}

    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (`<protocol>/<set>_<measure>`, percent). A collective; ranks other than 0 yield nothing.

        Raises:
            UserError: the backbone is not a ResNet from timm, or the loss is not finite.
        """
        store, views = self._store, self._store.views
        if isinstance(backbone, RawPixels):
            store.say(f"{self.protocol} skips the baseline of raw pixels, which has no stages to fine-tune")
            return
        require_resnet(backbone, "detect")
        task = Training(self._set.train, self.short_sides, self.longest, masks=self.masks)
        network = self._network(backbone, num_classes=len(self._set.classes), mean=views.mean, std=views.std)
        of_pixels = {"mean": views.mean, "std": views.std, "short_sides": self.short_sides, "longest": self.longest}
        trained = train(
            network,
            task,
            self.recipe,
            store,
            seed=self._seed,
            name=self.name,
            made_from={
                "backbone": store.digest_of(backbone),
                "set": self._set.inputs(),
                **of_pixels,
                **self.network_settings,
            },
            precision=self.precision,
            save_every_steps=self.save_every_steps,
        )
        assert isinstance(trained, Detector)
        take_statistics(
            trained, task, self.recipe.images, self.precise_batches, store, seed=self._seed, precision=self.precision
        )
        rows = on_main(distributed.on_each(lambda: self._found(trained)), store.device)
        if not distributed.is_main():
            return
        tested = {"voc": "voc2007", "coco": "coco2017"}[self.dataset]
        for measure, value in self._scores(rows).items():
            yield f"{self.protocol}/{tested}_{measure}", value

    def work(self, backbone: Callable[[], nn.Module]) -> list[Work]:
        network = self._network(backbone(), num_classes=80 if self.masks else 20, mean=[0.5] * 3, std=[0.5] * 3)
        typical = round(sum(self.short_sides) / len(self.short_sides))
        seen = self.recipe.num_steps * self.recipe.images
        return [
            counted(
                f"{self.protocol}: images of {4 * typical // 3} x {typical} px to train on", seen, network, typical,
                training=True
            ),
            counted(
                f"{self.protocol}: images of {4 * self.test_side // 3} x {self.test_side} px to test on",
                NUM_TEST_IMAGES[self.dataset], network, self.test_side, training=False,
            ),
        ]  # fmt: skip

    def _network(
        self, backbone: nn.Module, *, num_classes: int, mean: Sequence[float], std: Sequence[float]
    ) -> Detector:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self._seed, _NEW_LAYERS))
            return detector(
                backbone, num_classes=num_classes, masks=self.masks, mean=mean, std=std, **self.network_settings
            )

    def _found(self, network: Detector) -> list[dict[str, Any]]:
        """A row for each detection in this rank's test images, in the pixels of the image itself. For an unreadable
        image there is one row that has only the image's number.
        """
        store, test, rows = self._store, self._set.test, []
        example = _TestImage(test, self.test_side, self.longest)
        with torch.random.fork_rng(devices=[store.device] if store.device.type == "cuda" else []):
            for index, image in one_by_one(example, test.files, store, name=self.name):
                if image is None:
                    rows.append({"image": index})
                    continue
                with torch.autocast(store.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    (found,) = network.detect([image])
                rows += rows_of(index, found, (image.shape[2], image.shape[1]), tuple(test.sizes[index].tolist()))
        return rows

    def _scores(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        test, known = self._set.test, self._set
        read = np.full(len(test), True)
        read[[row["image"] for row in rows if "label" not in row]] = False
        rows = [row for row in rows if "label" in row]
        # A stable sort keeps the order of an image's detections, highest score first.
        rows.sort(key=lambda row: row["image"])
        if self.dataset == "coco":
            assert known.truth is not None and known.category_ids is not None
            results = [coco_row(row, test.names, known.category_ids) for row in rows]
            images = test.names[read].tolist()
            return coco_scores(known.truth, results, masks=True, images=images, say=lambda line: self._store.say(line))
        found = Boxes(
            np.array([row["image"] for row in rows], dtype=np.int64),
            np.array([row["label"] for row in rows], dtype=np.int64),
            np.array([row["box"] for row in rows]).reshape(-1, 4),
        )
        of_image = np.repeat(np.arange(len(test)), np.diff(test.first))
        kept = read[of_image]
        truth = Boxes(of_image[kept], test.labels[kept], test.boxes[kept])
        return voc_scores(found, np.array([row["score"] for row in rows]), truth, test.difficult[kept])


class Training(Task):
    """The training images; the shorter side is drawn, and an image is flipped with probability 0.5."""

    def __init__(self, images: AnnotatedImages, short_sides: Sequence[int], longest: int, *, masks: bool) -> None:
        self.images, self.files, self.short_sides, self.longest, self.masks = (
            images,
            images.files,
            list(short_sides),
            longest,
            masks,
        )

    def example(self, index: int, seed: int) -> Example:
        draw = np.random.default_rng(seed)
        short, flip = self.short_sides[draw.integers(len(self.short_sides))], bool(draw.random() < 0.5)
        image, objects = self.images.files.image(index), self.images.objects(index)
        return example_of(image, objects, short=short, longest=self.longest, flip=flip, masks=self.masks, seed=seed)

    def loss(self, network: nn.Module, examples: list[Example]) -> Tensor:
        return torch.stack(list(network(examples).values())).sum()


class _TestImage:
    """Index -> the test image, resized, uint8 [3, H, W]. Workers call this."""

    def __init__(self, images: AnnotatedImages, short: int, longest: int) -> None:
        self.images, self.short, self.longest = images, short, longest

    def __call__(self, index: int) -> Tensor:
        image, none = self.images.files.image(index), self.images.objects(index)
        return example_of(image, none, short=self.short, longest=self.longest, flip=False, masks=False).image


@torch.no_grad()
def take_statistics(
    network: nn.Module, task: Task, images: int, count: int, store: FeatureStore, *, seed: int, precision: Precision
) -> None:
    """Replace the running statistics of every BatchNorm by their mean over `count` training batches. Afterwards the
    network is in eval mode. A collective.

    Source: detectron2's PRECISE_BN, which MoCo's configurations use.

    Args:
        images: number of images in a batch, over all ranks.
    """
    norms = [module for module in network.modules() if isinstance(module, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms if count else ():
        norm.reset_running_stats()
        norm.momentum = None  # makes BatchNorm compute the plain mean over all batches
    network.train()
    steps = batches(task, images, 0, count, store, seed=mixed_seed(seed, _STATISTICS))
    with (
        contextlib.closing(steps),
        torch.random.fork_rng(devices=[store.device] if store.device.type == "cuda" else []),
    ):
        for _ in range(count):
            examples = distributed.on_each(lambda: next(steps))
            with torch.autocast(store.device.type, torch.bfloat16, enabled=precision == "bf16"):
                task.loss(network, examples)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def require_pycocotools() -> None:
    """Check that pycocotools is installed.

    Raises:
        UserError: it is not.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"COCO's masks and scores need pycocotools, which is not installed{to_install('dense')}"
        ) from error
