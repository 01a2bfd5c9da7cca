"""Training a linear classifier on a backbone, frozen or not: what linear evaluation and fine-tuning have in common.

An epoch, in order: rates, features, head, loss, gradients' mean over the ranks, optimiser; a checkpoint after each
epoch.
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
        epochs, batch: `batch` is global, all ranks together.
        lr, reference_batch: the rate is lr * batch / reference_batch.
        larc: scale each parameter's gradient by trust * |p| / |g| (apex's LARC without clipping); a parameter that is
            still zero is not scaled.
        schedule, milestones, decay: "cosine" to 0, or "steps": times `decay` after each of the epochs `milestones`.
        unit: "epoch" holds the rate within an epoch, "step" changes it with every step.
        scale, interpolation: of the random resized crop; the flip has probability 0.5. There is no other augmentation.
        drop_last: whether an epoch ends with its last whole batch; else with a smaller one of the images that are left.
    Raises:
        ValueError: a value out of its range.
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
            raise UserError(f"milestones: belong to schedule=steps; got {list(self.milestones)} with {self.schedule}")
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
        """Factor on the rate, one number a step."""
        if self.schedule == "cosine":
            return cosine(RunShape(self.epochs, steps_per_epoch, self.batch, self.unit), 1.0, 0.0)
        passed = [sum(epoch >= m for m in self.milestones) for epoch in range(self.epochs)]
        return [self.decay ** passed[step // steps_per_epoch] for step in range(self.epochs * steps_per_epoch)]

    def views(self, like: Views) -> Views:
        """One random crop, perhaps flipped, of the size and normalisation that pre-training used."""
        crop = View(
            scale=list(self.scale), interpolation=self.interpolation, jitter_p=0.0, gray_p=0.0, blur_p=0.0, flip_p=0.5
        )
        return like.with_views({"crop": crop})


def new_head(width: int, num_classes: int, *, seed: int) -> nn.Linear:
    """A linear layer: weights normal with spread 0.01, biases zero, as in the published evaluations."""
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
    """Backbone and head trained on augmented views of a labelled source. A collective.

    Deterministic: views depend on (seed, epoch, image). With a folder in the store, as a run has while it trains, each
    epoch ends with a checkpoint, and a call with the same backbone, images and settings goes on from the last one to
    the same bits.

    Args:
        frozen: only the head learns, on the eval-mode backbone; else a copy of the backbone learns too, in train mode.
        name: what its lines and its checkpoints are called.
        like: views whose size and normalisation it takes; the store's without.
    Returns:
        nn.Sequential of the backbone (itself if frozen, else the trained copy) and the head.
    Raises:
        UserError: the loss is not finite.
        ValueError: from the loader: fewer images than one batch, a batch that the ranks cannot share evenly.
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
            torch.manual_seed(mixed_seed(seed, epoch, distributed.rank()))  # dropout and the like
            batches = loader.epoch(epoch)

            def learn(step: int) -> None:
                batch = next(batches)
                features_BD = _features(backbone, batch.views[0], store, frozen=frozen)
                # Of a smaller last batch the ranks may have one image more or less: each image counts the same.
                share = len(batch.label) * distributed.world() / loader.images_of(step)
                loss = share * F.cross_entropy(head(features_BD), batch.label)
                loss.backward()
                total.add_(loss.detach())

            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factors[epoch * steps + step]
                distributed.together(
                    partial(learn, step)
                )  # an image that one rank cannot read must not leave the others waiting
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
    """Features [B, D] float32; of a frozen backbone in pieces, so that a batch of thousands needs no more memory."""
    with torch.autocast(store.device.type, torch.bfloat16, enabled=store.precision == "bf16"):
        if not frozen:
            return backbone(images.contiguous(memory_format=torch.channels_last)).float()
        with torch.no_grad():
            pieces = images.split(store.batch)
            return torch.cat(
                [backbone(piece.contiguous(memory_format=torch.channels_last)).float() for piece in pieces]
            )


def width_of(backbone: nn.Module, store: FeatureStore) -> int:
    """The width of a backbone's features: its `num_features`, else that of what it gives for one image."""
    width = getattr(backbone, "num_features", None)
    if isinstance(width, int):
        return width
    image = torch.zeros(1, 3, store.views.size, store.views.size)
    return extract(backbone, [(image, torch.zeros(1))], device=store.device, precision=store.precision)[0].shape[1]


def accuracies(logits_NC: Tensor, label_N: Tensor, name: str) -> Iterator[tuple[str, float]]:
    """(`<name>_top1`, percent), and `<name>_top5` where there are more than five classes."""
    for k in (1, 5):
        if k == 1 or logits_NC.shape[1] > 5:
            hit = (logits_NC.topk(k, dim=1).indices == label_N[:, None]).any(dim=1)
            yield f"{name}_top{k}", 100 * hit.double().mean().item()


def classify(head: nn.Linear, features_ND: Tensor, *, block: int = 8192) -> Tensor:
    """Logits [N, C] float32 on the CPU, in blocks of rows."""
    device = head.weight.device
    with torch.no_grad():
        return torch.cat([head(x.to(device, torch.float32)).cpu() for x in features_ND.split(block)])
