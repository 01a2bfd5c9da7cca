"""Transfer evaluation: logistic regression of frozen features on other image sets. Its strength is chosen on validation
images, and the test images are used once.

Shapes: N images, C classes.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from caco import distributed, metrics
from caco.data.sets.sources import Source, digest_together, labels_of
from caco.data.sets.transfer import MissingSet, TransferSet, load
from caco.data.views.augmentation import View, Views
from caco.errors import UserError
from caco.evals.base import Evaluator
from caco.evals.features import FeatureStore, require_classes
from caco.evals.logistic import Axes, choose_strength, fit_on_axes, largest, logits_of, objective, strengths
from caco.ranges import AboveZero, Count, Pixels, held
from caco.runs.paths import expanded

PUBLISHED = (
    "food101", "cifar10", "cifar100", "sun397", "cars", "aircraft", "voc2007", "dtd", "pets", "caltech101", "flowers",
)  # fmt: skip


class Transfer(Evaluator):
    """Each set's metric on its test images, percent: `<protocol>/<set>_<metric>`; also the chosen strength and the
    largest entry of the gradient at the optimum. The protocol is called `transfer`; changed settings appear in its name
    (caco/metrics.py).

    The protocol is that of SimCLR (arXiv 2002.05709, B.8) and BYOL (arXiv 2006.07733, D.1). Features are the frozen
    backbone's, for images whose shorter side is resized (bicubic) and whose centre is cropped, without augmentation. An
    L2-regularised multinomial logistic regression is fitted by L-BFGS with each of 45 strengths between 1e-6 and 1e5.
    The best on the validation images is taken, the strongest of equally good ones, and fitted again on training and
    validation images; the test images are scored once. For VOC2007 each class is regressed against the rest, and the
    metric is the mean of the classes' 11-point average precisions. A missing set is reported with what to download, and
    the others are evaluated.

    Args:
        root: the folder that holds the sets.
        sets: the published sets, or folders of your own below root (train/ and test/ of class folders).
        size: side of the centre crop in pixels.
        num_strengths, weakest, strongest: the values of lambda in sum_i loss_i + lambda / 2 |W|^2; they are evenly
            spaced in the logarithm.
        max_iterations, tolerance: L-BFGS stops when no entry of the mean loss's gradient is above tolerance, or after
            max_iterations.
        when: "epoch" (during training and at its end) or "end".
    Raises:
        UserError: sets are missing or repeated, or weakest is above strongest.
    """

    on_all_ranks = True  # the ranks share the reading of images
    # Its own photographs, so a backbone for data.channels cannot be evaluated (caco/config/channels_needed.py).
    reads_photographs = True

    @held
    def __init__(
        self,
        *,
        root: str | None = None,
        sets: Sequence[str] = PUBLISHED,
        size: Pixels = 224,
        num_strengths: Count = 45,
        weakest: AboveZero = 1e-6,
        strongest: AboveZero = 1e5,
        max_iterations: Count = 1000,
        tolerance: AboveZero = 1e-5,
        when: Literal["epoch", "end"] = "end",
    ) -> None:
        if not sets or len(set(sets)) < len(sets):
            raise UserError(f"transfer sets: expected at least one, each once, got {list(sets)}")
        if weakest > strongest:
            raise UserError(f"transfer: expected weakest <= strongest, got {weakest} and {strongest}")
        self.root, self.sets, self.size, self.when = root, list(sets), size, when
        self.strengths = strengths(num_strengths, weakest, strongest)
        self.max_iterations, self.tolerance = max_iterations, tolerance
        self.protocol = metrics.transfer(
            size=size,
            num_strengths=num_strengths,
            weakest=weakest,
            strongest=strongest,
            max_iterations=max_iterations,
            tolerance=tolerance,
        )

    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Find the sets and report the missing ones.

        Raises:
            UserError: there is no root, none of the sets is there, or a set is damaged, has a class only in its test
                images, or tests on images that it or the run trains on.
        """
        if self.root is None or not expanded(self.root).is_dir():
            raise UserError(
                f"root: expected the folder that holds the sets, as eval.transfer.root=PATH, got {self.root}"
            )
        self._store, self._found, missing = store, [], []
        for name in self.sets:
            try:
                self._found.append(load(name, expanded(self.root), seed=seed))
            except MissingSet as error:
                missing.append(str(error))
        for line in missing:
            store.say(f"transfer skips a set that is not there: {line}")
        if not self._found:
            raise UserError("none of the sets is there:\n" + "\n".join(missing))
        found = distributed.all_objects([one.name for one in self._found])
        if any(names != found[0] for names in found):
            raise UserError(f"root: expected every rank to see the same sets in {self.root}, got, by rank, {found}")
        for one in self._found:
            self._check(one)
        crop = View(scale=[1.0, 1.0])  # `Views` needs a kind of view, but none is drawn
        like = store.views
        self._views = Views(
            size=self.size, views={"none": crop}, mean=like.mean, std=like.std, plain_crop=1.0,
            plain_interpolation="bicubic",
            colours=like.colours,
        )  # fmt: skip

    def _check(self, found: TransferSet) -> None:
        if found.metric != "map11":
            require_classes(found.train, found.validation)
            require_classes(found.train, found.test)
        else:
            for source in (found.validation, found.test):
                there = (labels_of(source) == 1).any(axis=0)
                if not there.all():  # a class without an image has no precision
                    absent = [name for name, has_one in zip(source.classes or (), there, strict=True) if not has_one]
                    raise UserError(
                        f"{source.name}: expected an image at least of each class, got none of {', '.join(absent)}"
                    )
        for source in (found.train, found.validation, found.test):
            source.look(self._store.say)  # all ranks read together; otherwise one rank alone would, for the cache keys
        for source in (found.train, found.validation, self._store.splits.pretrain):
            self._store.refuse_shared(source, found.test)

    def inputs(self) -> list[Any]:
        """What the numbers depend on besides the arguments: the sets that were found, by name and cache key."""
        key = self._store.key_of
        return [[s.name, key(s.train), key(s.validation), key(s.test)] for s in self._found]

    def image_sets(self) -> dict[str, str]:
        return {s.name: digest_together([s.train, s.validation, s.test]) for s in self._found}

    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (`<protocol>/<set>_<metric>`, percent), (`<protocol>/<set>_strength`, lambda) and
        (`<protocol>/<set>_gradient`, largest entry).
        """
        for one in self._found:
            yield from self._one(backbone, one)

    def _one(self, backbone: nn.Module, one: TransferSet) -> Iterator[tuple[str, float]]:
        store = self._store
        train, validation, test = (
            store.of(backbone, source, self._views) for source in (one.train, one.validation, one.test)
        )
        if not distributed.is_main():
            return
        train, validation, test = (features.to(store.device) for features in (train, validation, test))
        known = labels_of(one.train)
        num_classes = known.shape[1] if one.metric == "map11" else int(known.max()) + 1
        settings: dict[str, Any] = {
            "num_classes": num_classes, "max_iterations": self.max_iterations, "tolerance": self.tolerance
        }  # fmt: skip

        def measured(strength: float, logits_NC: Tensor) -> float:
            value = dict(score(logits_NC, labels_of(one.validation), one.metric))[one.metric]
            store.say(f"{self.protocol}/{one.name}: strength {strength:.1e}, validation {value:.2f}", passing=True)
            return value

        labels = _labels(one.train, store)
        chosen, start = choose_strength(train, labels, validation, measured, strengths=self.strengths, **settings)

        everything, labels = torch.cat([train, validation]), torch.cat([labels, _labels(one.validation, store)])
        axes = Axes.of(everything)
        weight = fit_on_axes(axes, axes.turn(everything), labels, strength=chosen, start=axes.start(*start), **settings)
        weight_DC, bias_C = axes.back(*weight)
        l2 = chosen / len(everything)
        _, grad_DC, grad_C = objective(weight_DC, bias_C, everything.double(), labels, l2=l2)
        for metric, value in score(logits_of(test, weight_DC, bias_C), labels_of(one.test), one.metric):
            yield f"{self.protocol}/{one.name}_{metric}", value
        yield f"{self.protocol}/{one.name}_strength", chosen
        yield f"{self.protocol}/{one.name}_gradient", largest(grad_DC, grad_C)


def _labels(source: Source, store: FeatureStore) -> Tensor:
    return torch.from_numpy(labels_of(source)).to(store.device)


def score(logits_NC: Tensor, labels: np.ndarray, metric: str) -> Iterator[tuple[str, float]]:
    """Yields (metric, percent). For VOC2007 also (`ap_per_image`, percent), the variant that AdCo's code reports.

    Args:
        metric: top1, mean_per_class or map11.
    """
    if metric == "map11":
        yield (
            "map11",
            100
            * statistics.mean(
                average_precision_11(logits_NC[:, c].double().numpy(), labels[:, c]) for c in range(labels.shape[1])
            ),
        )
        # This ranks the classes of each image instead of the images of each class, so it cannot be compared with any
        # mean average precision.
        some = (labels == 1).any(axis=1)
        yield (
            "ap_per_image",
            100 * float(average_precision_score(labels[some] == 1, logits_NC.numpy()[some], average="samples")),
        )
        return
    right = logits_NC.argmax(dim=1).numpy() == labels
    if metric == "top1":
        yield "top1", 100 * float(right.mean())
    else:
        yield "mean_per_class", 100 * statistics.mean(float(right[labels == c].mean()) for c in np.unique(labels))


def average_precision_11(scores: np.ndarray, marks: np.ndarray) -> float:
    """Average precision as PASCAL VOC 2007 defines it: the mean, over the recalls 0, 0.1, ..., 1, of the best precision
    at this or a larger recall.

    Args:
        scores: [N]; images with equal scores are ranked in their order.
        marks: [N]; 1 present, 0 absent, -1 ignored.
    Raises:
        ValueError: the class is present in no image.
    """
    kept = marks >= 0
    order = np.argsort(-scores[kept], kind="stable")
    present = marks[kept][order] == 1
    if not present.any():
        raise ValueError("average precision: expected at least one image in which the class is present, got none")
    hits = np.cumsum(present)
    precision = hits / np.arange(1, len(hits) + 1)
    # Recalls are compared as integers, so that 3 of 10 images are a recall of exactly 0.3.
    return float(sum(precision[10 * hits >= tenth * hits[-1]].max() for tenth in range(11))) / 11
