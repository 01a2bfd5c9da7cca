"""Trains a linear classifier on a backbone, frozen or not: the common part of linear evaluation and fine-tuning.

Each step of an epoch, in order: learning rates, features, head, loss, mean of the gradients over the ranks, optimiser.
A checkpoint follows each epoch.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed
from caco.data.loaders.batches import mixed_seed
from caco.data.loaders.bound import BoundLoader
from caco.data.sets.sources import Source
from caco.data.views.augmentation import View, Views
from caco.errors import UserError
from caco.evals.extraction import extract
from caco.evals.features import FeatureStore
from caco.nn.layerwise import LARC
from caco.nn.norm import over_all_ranks
from caco.saying import counting
from caco.schedules import RunShape, cosine, scaled_lr


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a classifier is trained.

    Args:
        epochs: number of passes over the training images.
        batch: number of images in a step, over all ranks.
        lr, reference_batch: the learning rate is lr * batch / reference_batch; it is lr if reference_batch is None.
        momentum, nesterov, weight_decay: of SGD, or of LARC (without nesterov).
        larc: scale each parameter's gradient by trust_coefficient * |p| / |g| (apex's LARC without clipping); a
            parameter that is still zero is not scaled.
        trust_coefficient: see larc.
        schedule: "cosine" to 0, or "steps".
        milestones, decay: with "steps", the rate is multiplied by `decay` after each of the epochs `milestones`.
        unit: "epoch" holds the rate of "cosine" within an epoch, "step" changes it with every step.
        scale, interpolation: of the random resized crop. Besides it there is only a flip with probability 0.5.
        drop_last: True ends an epoch with its last whole batch, False with a smaller batch of the remaining images.
    Raises:
        UserError: two settings contradict each other.
    """

    epochs: int
    batch: int
    lr: float
    reference_batch: int | None = 256
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    larc: bool = False
    trust_coefficient: float = 1e-3
    schedule: Literal["cosine", "steps"] = "cosine"
    milestones: list[int] = field(default_factory=list)
    decay: float = 0.1
    unit: Literal["epoch", "step"] = "epoch"
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    drop_last: bool = True

    def __post_init__(self) -> None:
        if self.milestones and self.schedule != "steps":
            raise UserError(
                f"milestones: expected none without schedule=steps, got {list(self.milestones)} with {self.schedule}"
            )
        if self.nesterov and self.larc:
            raise UserError("nesterov: expected false with larc")

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        rate = scaled_lr(self.lr, self.batch, self.reference_batch)
        if self.larc:
            return LARC(
                parameters,
                lr=rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                trust_coefficient=self.trust_coefficient,
            )
        return torch.optim.SGD(
            parameters, lr=rate, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )

    def lr_factors(self, steps_per_epoch: int) -> list[float]:
        """The factor on the learning rate for each step, over all epochs."""
        if self.schedule == "cosine":
            return cosine(RunShape(self.epochs, steps_per_epoch, self.batch, self.unit), 1.0, 0.0)
        passed = [sum(epoch >= m for m in self.milestones) for epoch in range(self.epochs)]
        return [self.decay ** passed[step // steps_per_epoch] for step in range(self.epochs * steps_per_epoch)]

    def views(self, like: Views) -> Views:
        """A view that is randomly cropped and flipped, with the size and normalisation of `like`."""
        crop = View(
            scale=list(self.scale), interpolation=self.interpolation, jitter_p=0.0, gray_p=0.0, blur_p=0.0, flip_p=0.5
        )
        return like.with_views({"crop": crop})


def new_head(width: int, num_classes: int, *, seed: int) -> nn.Linear:
    """A linear layer whose weights are normal with standard deviation 0.01 and whose biases are zero, as in the
    published evaluations."""
    head = nn.utils.skip_init(nn.Linear, width, num_classes)
    with torch.no_grad():
        head.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return head


def train_classifier(
    backbone: nn.Module,
    source: Source,
    recipe: Recipe,
    store: FeatureStore,
    *,
    num_classes: int,
    frozen: bool,
    seed: int,
    name: str,
    like: Views | None = None,
) -> nn.Sequential:
    """Train a linear head, and the backbone unless it is frozen, on augmented views of a labelled source. A collective.

    The result is deterministic: views depend on (seed, epoch, image). If the store has a folder, as in a training run,
    each epoch ends with a checkpoint. A call with the same backbone, images and settings resumes from the last
    checkpoint, with the same bits as without interruption.

    Args:
        num_classes: number of outputs of the head.
        frozen: True trains only the head, on the backbone in eval mode; False also trains a copy of the backbone, in
            train mode.
        seed: seed of the head, of the order and of the views.
        name: name in messages and of the checkpoints.
        like: views whose size and normalisation are used; None uses the store's.
    Returns:
        nn.Sequential of the backbone (the given one if frozen, else the trained copy) and the head.
    Raises:
        UserError: the loss is not finite, there are fewer images than one batch, or the ranks cannot share a batch
            evenly.
    """
    device = store.device
    backbone_digest = store.digest_of(backbone)
    if not frozen:
        backbone = over_all_ranks(copy.deepcopy(backbone), device).requires_grad_(True)
    head = new_head(width_of(backbone, store), num_classes, seed=seed)
    network = nn.Sequential(backbone, head).to(device).to(memory_format=torch.channels_last)
    learning = head if frozen else network
    parameters = list(learning.parameters())
    optimizer = recipe.optimizer(parameters)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    views = recipe.views(like or store.views)
    loader = store.loader.bind(
        source, views, batch=recipe.batch, seed=seed, rank=distributed.rank(), world=distributed.world(), device=device,
        drop_last=recipe.drop_last,
    )  # fmt: skip
    factors = recipe.lr_factors(loader.steps_per_epoch)
    first_epoch = 0
    made_from = {"recipe": vars(recipe), "backbone": backbone_digest,
    "images": "" if store.folder is None else source.digest(),
                 "seed": seed, "frozen": frozen, "precision": store.precision, "size": views.size, "mean": views.mean,
                 "std": views.std, "world": distributed.world()}  # fmt: skip
    checkpoints = store.checkpoints(name, made_from)
    if checkpoints is not None:
        newest = checkpoints.load_newest()
        if newest is not None:
            state, path = newest
            learning.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            first_epoch = state["epoch"]
            store.say(f"{name}: going on from {path}, epoch {first_epoch} of {recipe.epochs}")
    try:
        for epoch in range(first_epoch, recipe.epochs):
            loss = _epoch(
                network, parameters, optimizer, loader, epoch, factors, store, frozen=frozen, seed=seed, name=name
            )
            store.say(
                f"{name}: epoch {epoch + 1} of {recipe.epochs}, loss {loss:.4f}", passing=epoch + 1 < recipe.epochs
            )
            if checkpoints is not None and distributed.is_main():
                state = {"epoch": epoch + 1, "network": learning.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoints.save(state, epoch + 1)
    finally:
        loader.close()
    return network


def _epoch(
    network: nn.Sequential,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loader: BoundLoader,
    epoch: int,
    factors: list[float],
    store: FeatureStore,
    *,
    frozen: bool,
    seed: int,
    name: str,
) -> float:
    """One epoch; returns its mean loss over all ranks."""
    backbone, head = network
    device = store.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    steps = loader.steps_per_epoch
    count = counting(store.say, f"{name}: epoch {epoch + 1}, images", sum(map(loader.images_of, range(steps))))
    modes = {module: module.training for module in network.modules()}
    backbone.train(not frozen)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(mixed_seed(seed, epoch, distributed.rank()))  # for dropout and similar layers
            batches = loader.epoch(epoch)

            def learn(step: int) -> None:
                batch = next(batches)
                features_BD = _features(backbone, batch.views[0], store, frozen=frozen)
                # In a smaller last batch one rank may have an image more than another; the factor makes all images
                # count equally.
                share = len(batch.label) * distributed.world() / loader.images_of(step)
                loss = share * F.cross_entropy(head(features_BD), batch.label)
                loss.backward()
                total.add_(loss.detach())

            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factors[epoch * steps + step]
                # `together`, because an image that one rank cannot read must not leave the other ranks waiting.
                distributed.together(partial(learn, step))
                distributed.mean_gradients(parameters)
                optimizer.step()
                optimizer.zero_grad()
                count(loader.images_of(step))
    finally:
        for module, training in modes.items():
            module.training = training
    mean = (distributed.sum_(total) / (steps * distributed.world())).item()
    if not math.isfinite(mean):
        raise UserError(f"{name}: the loss became {mean} in epoch {epoch + 1}; a lower lr may help, or precision=fp32")
    return mean


def _features(backbone: nn.Module, images: Tensor, store: FeatureStore, *, frozen: bool) -> Tensor:
    """Features [B, D] float32. A frozen backbone computes them in pieces, so that a batch of thousands of images needs
    no more memory."""
    with torch.autocast(store.device.type, torch.bfloat16, enabled=store.precision == "bf16"):
        if not frozen:
            return backbone(images.contiguous(memory_format=torch.channels_last)).float()
        with torch.no_grad():
            pieces = images.split(store.batch)
            return torch.cat(
                [backbone(piece.contiguous(memory_format=torch.channels_last)).float() for piece in pieces]
            )


def width_of(backbone: nn.Module, store: FeatureStore) -> int:
    """The width of a backbone's features: its `num_features`, or else measured with one image."""
    width = getattr(backbone, "num_features", None)
    if isinstance(width, int):
        return width
    image = torch.zeros(1, 3, store.views.size, store.views.size)
    return extract(backbone, [(image, torch.zeros(1))], device=store.device, precision=store.precision)[0].shape[1]


def accuracies(logits_NC: Tensor, label_N: Tensor, name: str) -> Iterator[tuple[str, float]]:
    """Yields (`<name>_top1`, percent), and (`<name>_top5`, percent) if there are more than five classes."""
    for k in (1, 5):
        if k == 1 or logits_NC.shape[1] > 5:
            hit = (logits_NC.topk(k, dim=1).indices == label_N[:, None]).any(dim=1)
            yield f"{name}_top{k}", 100 * hit.double().mean().item()


def classify(head: nn.Linear, features_ND: Tensor, *, block: int = 8192) -> Tensor:
    """Logits [N, C] float32 on the CPU, computed in blocks of rows."""
    device = head.weight.device
    with torch.no_grad():
        return torch.cat([head(x.to(device, torch.float32)).cpu() for x in features_ND.split(block)])
