"""Domain generalisation on PACS: a classifier learns from three domains and is tested on the fourth, each domain in its
turn.

Shapes: N images of all domains.
"""

import hashlib
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from caco import distributed, metrics
from caco.data.sets.domains import CLASSES, DOMAINS, others_than, read
from caco.data.sets.sources import digest_together, labels_of
from caco.data.views.augmentation import View, Views
from caco.errors import UserError
from caco.evals.base import Evaluator
from caco.evals.classifier import Recipe, train_classifier
from caco.evals.features import FeatureStore
from caco.evals.logistic import choose_strength, logits_of, strengths
from caco.ranges import (
    AboveZero,
    Count,
    Length,
    Natural,
    NonNegative,
    Pixels,
    Several,
    ShareBelowOne,
    ShareInterval,
    held,
)
from caco.runs.paths import expanded


class Domain(Evaluator):
    """Accuracy on each domain of a classifier that was trained on the three others, percent:
    `<protocol>/<domain>_top1`, and the mean over the four domains, `<protocol>/mean_top1`. The protocols are `pacs`, on
    frozen features, and `pacs_finetune`; changed settings appear in their names (caco/metrics.py).

    The published lists are used as in Dassl: train on the train lists of three domains, choose settings on their
    crossval lists, test once on all images of the fourth. Frozen: logistic regression by L-BFGS as in Transfer; its
    strength is chosen on the crossval lists, and it is not fitted again. Fine-tuned: JiGen's optimisation (SGD 0.001,
    batch 128, 30 epochs, a tenth of the rate after 24, crops and flips) but without JiGen's colour changes, evaluated
    after the last epoch; of several rates the best on the crossval lists is used.

    Args:
        root: a folder with PACS in one of the published layouts (caco/data/sets/domains.py).
        targets: the domains to test on. The mean is given only if these are all four.
        ways: frozen, finetune, or both.
        size: pixels to which the shorter side of an image is resized before its centre is cropped; square images stay
            whole.
        num_strengths, weakest, strongest, max_iterations, tolerance: see Transfer.
        lrs: learning rates of fine-tuning to choose from.
        epochs, batch, momentum, weight_decay, milestones, decay, scale: see Recipe.
        when: "epoch" (during training and at its end) or "end".
    Raises:
        UserError: targets or ways are unknown or repeated, weakest is above strongest, or a rate is repeated.
    """

    on_all_ranks = True
    # Its own photographs, so a backbone for data.channels cannot be evaluated (caco/config/channels_needed.py).
    reads_photographs = True

    @held
    def __init__(
        self,
        *,
        root: str | None = None,
        targets: Sequence[str] = DOMAINS,
        ways: Sequence[str] = ("frozen", "finetune"),
        size: Pixels = 224,
        num_strengths: Count = 45,
        weakest: AboveZero = 1e-6,
        strongest: AboveZero = 1e5,
        max_iterations: Count = 1000,
        tolerance: AboveZero = 1e-5,
        lrs: Annotated[Sequence[AboveZero], Length(least=1)] = (0.001,),
        epochs: Count = 30,
        batch: Several = 128,
        momentum: ShareBelowOne = 0.9,
        weight_decay: NonNegative = 5e-4,
        milestones: Sequence[Natural] = (24,),
        decay: NonNegative = 0.1,
        scale: ShareInterval = (0.8, 1.0),
        when: Literal["epoch", "end"] = "end",
    ) -> None:
        for name, chosen, known in (("targets", targets, DOMAINS), ("ways", ways, metrics.DOMAIN_WAYS)):
            if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
                raise UserError(f"domain {name}: expected some of {', '.join(known)}, each once, got {list(chosen)}")
        if weakest > strongest:
            raise UserError(f"domain: expected weakest <= strongest, got {weakest} and {strongest}")
        if len(set(lrs)) < len(lrs):
            raise UserError(f"domain lrs: expected each rate once, got {list(lrs)}")
        self.root, self.targets, self.size, self.when, self.lrs = root, list(targets), size, when, list(lrs)
        self.solver: dict[str, Any] = {
            "strengths": strengths(num_strengths, weakest, strongest), "max_iterations": max_iterations,
            "tolerance": tolerance
        }  # fmt: skip
        self.recipe = Recipe(
            epochs=epochs, batch=batch, lr=self.lrs[0], reference_batch=None, momentum=momentum,
            weight_decay=weight_decay,
            schedule="steps", milestones=list(milestones), decay=decay, scale=list(scale), drop_last=True,
        )  # fmt: skip
        self.protocols = metrics.domain(
            ways=ways, size=size, num_strengths=num_strengths, weakest=weakest, strongest=strongest,
            max_iterations=max_iterations,
            tolerance=tolerance, lrs=lrs, epochs=epochs, batch=batch, momentum=momentum, weight_decay=weight_decay,
            milestones=milestones, decay=decay, scale=scale,
        )  # fmt: skip
        self._protocol_of = dict(zip(ways, self.protocols, strict=True))

    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Find the images and their lists, and report differences from the published ones.

        Raises:
            UserError: there is no root, PACS is not there or incomplete, or the encoder was pre-trained on images of a
                target.
        """
        if self.root is None or not expanded(self.root).is_dir():
            raise UserError(f"root: expected the folder that holds PACS, as eval.domain.root=PATH, got {self.root}")
        self._store, self._seed = store, seed
        self._pacs = read(expanded(self.root), key="eval.domain.root", say=store.say)
        self._pacs.every.look(store.say)
        for target in self.targets:
            try:
                store.refuse_shared(store.splits.pretrain, self._pacs.part([target]))
            except UserError as error:
                raise UserError(
                    f"{error}. Test an encoder that was pre-trained on domains of PACS only on a domain that it has not"
                    " seen: eval.domain.targets=[DOMAIN]"
                ) from error
        like, crop = store.views, View(scale=[1.0, 1.0])  # `Views` needs a kind of view, but none is drawn
        self._views = Views(size=self.size, views={"none": crop}, mean=like.mean, std=like.std, plain_crop=1.0)

    def inputs(self) -> list[Any]:
        """What the numbers depend on besides the arguments: the images, and the lists that they are on."""
        lists = hashlib.sha256(self._pacs.train.tobytes() + self._pacs.domain.tobytes()).hexdigest()[:16]
        return [["pacs", self._store.key_of(self._pacs.every), lists]]

    def image_sets(self) -> dict[str, str]:
        return {"pacs": digest_together([self._pacs.every])}

    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (`<protocol>/<domain>_top1`, percent); for each domain the chosen setting, (`..._strength`, lambda)
        or, with several rates, (`..._lr`, rate); and (`<protocol>/mean_top1`, percent)."""
        for way, protocol in self._protocol_of.items():
            found = list(self._frozen(backbone) if way == "frozen" else self._finetuned(backbone, protocol))
            for target, accuracy, chosen in found:
                yield f"{protocol}/{target}_top1", accuracy
                for name, value in chosen.items():
                    yield f"{protocol}/{target}_{name}", value
            if len(found) == len(DOMAINS):
                yield f"{protocol}/mean_top1", statistics.mean(accuracy for _, accuracy, _ in found)

    def _frozen(self, backbone: nn.Module) -> Iterator[tuple[str, float, dict[str, float]]]:
        """Yields (target, percent, chosen setting) of logistic regression, on rank 0."""
        store, pacs = self._store, self._pacs
        x_ND = store.of(backbone, pacs.every, self._views)  # once for all four targets
        if not distributed.is_main():
            return
        x_ND = x_ND.to(store.device)
        label_N = torch.from_numpy(labels_of(pacs.every))
        for target in self.targets:
            train, crossval = (torch.from_numpy(pacs.at(others_than(target), which)) for which in ("train", "crossval"))
            test = torch.from_numpy(pacs.at([target]))

            def measured(
                strength: float, logits_MC: Tensor, target: str = target, crossval: Tensor = crossval
            ) -> float:
                value = _percent(logits_MC, label_N[crossval])
                store.say(
                    f"{self._protocol_of['frozen']}/{target}: strength {strength:.1e}, crossval {value:.2f}",
                    passing=True,
                )
                return value

            strength, classifier = choose_strength(
                x_ND[train],
                label_N[train].to(store.device),
                x_ND[crossval],
                measured,
                num_classes=len(CLASSES),
                **self.solver,
            )
            yield target, _percent(logits_of(x_ND[test], *classifier), label_N[test]), {"strength": strength}

    def _finetuned(self, backbone: nn.Module, protocol: str) -> Iterator[tuple[str, float, dict[str, float]]]:
        """Yields (target, percent, chosen setting) of a copy of the backbone fine-tuned for each target, on rank 0."""
        store, pacs, world = self._store, self._pacs, distributed.world()
        for target in self.targets:
            train, crossval = pacs.part(others_than(target), "train"), pacs.part(others_than(target), "crossval")
            batch = min(self.recipe.batch, len(train) // world * world)
            best, network, chosen = -math.inf, None, 0.0
            for lr in self.lrs:
                trained = train_classifier(
                    backbone, train, replace(self.recipe, lr=lr, batch=batch), store, num_classes=len(CLASSES),
                    frozen=False,
                    seed=self._seed, name=f"{protocol}-{target}", like=self._views,
                )  # fmt: skip
                value = 0.0
                if len(self.lrs) > 1:
                    logits_MC = store.outputs(trained, crossval, self._views)
                    labels = torch.from_numpy(labels_of(crossval))
                    value = distributed.shared_object(
                        _percent(logits_MC, labels) if distributed.is_main() else None, patient=True
                    )
                if value > best:
                    best, network, chosen = value, trained, lr
            assert network is not None, "at least one rate was tried"
            test = pacs.part([target])
            logits_NC = store.outputs(network, test, self._views)
            if distributed.is_main():
                accuracy = _percent(logits_NC, torch.from_numpy(labels_of(test)))
                yield target, accuracy, {"lr": chosen} if len(self.lrs) > 1 else {}


def _percent(logits_NC: Tensor, label_N: Tensor) -> float:
    return 100 * (logits_NC.argmax(dim=1) == label_N).double().mean().item()
