"""How long a dense evaluator fine-tunes a network, with which learning rates and with which optimiser."""

from dataclasses import dataclass, field

import torch
from torch import nn

from caco import distributed
from caco.errors import UserError
from caco.nn.norm import BATCH_NORMS
from caco.saying import amount
from caco.schedules import Table

_NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long a network is fine-tuned, and with which learning rate.

    `steps` and `rate` are meant for `reference_images` images in a step, as published. With another number of `images`
    both are scaled so that as many images are seen: half the images mean half the rate and twice the steps, warm-up
    included.

    Args:
        steps, rate: number of steps and learning rate at `reference_images` images in a step.
        images: number of images in a step, over all ranks.
        reference_images: number of images in a step for which steps, rate and warmup_steps are given.
        milestones: ascending shares of the steps; after each of them the rate is multiplied by `decay`.
        decay: see milestones.
        warmup_steps, warmup_start: in the first warmup_steps steps (given for `reference_images`) the rate rises
            linearly; it starts at warmup_start times its value.
        momentum: of SGD.
        weight_decay, decay_norms: weight decay of the weights. It also applies to the scales and shifts of
            normalisation layers if decay_norms is True.
    Raises:
        UserError: a value is out of its range.
    """

    steps: int
    images: int
    rate: float
    reference_images: int = 16
    milestones: list[float] = field(default_factory=list)
    decay: float = 0.1
    warmup_steps: int = 0
    warmup_start: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norms: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected {wanted}, got {value}"
            for name, value, fine, wanted in (
                ("steps", self.steps, self.steps >= 1, "at least 1"),
                ("images", self.images, self.images >= 1, "at least 1 a step"),
                ("rate", self.rate, self.rate > 0, "a positive learning rate"),
                ("milestones", self.milestones, self._in_order(), "ascending shares of the steps between 0 and 1"),
                ("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more"),
            )
            if not fine
        ]
        if problems:
            raise UserError("; ".join(problems))

    def _in_order(self) -> bool:
        return list(self.milestones) == sorted(self.milestones) and all(0 < share < 1 for share in self.milestones)

    @property
    def num_steps(self) -> int:
        """The number of steps of `images` in which as many images are seen as in `steps` of `reference_images`."""
        return max(1, round(self.steps * self.reference_images / self.images))

    @property
    def highest_rate(self) -> float:
        return self.rate * self.images / self.reference_images

    def refuse_more_ranks_than_images(self) -> None:
        """Check that every rank has an image in every step.

        Raises:
            UserError: there are more ranks than images in a step.
        """
        if self.images < distributed.world():
            raise UserError(
                f"images: expected at least one a step for each of the {distributed.world()} processes, got"
                f" {self.images}"
            )

    def rates(self) -> Table:
        """The learning rate of each step, [num_steps]."""
        drops = [round(share * self.num_steps) for share in self.milestones]
        warmup = round(self.warmup_steps * self.reference_images / self.images)

        def rate(step: int) -> float:
            rising = self.warmup_start + (1 - self.warmup_start) * step / warmup if step < warmup else 1.0
            return self.highest_rate * rising * self.decay ** sum(step >= drop for drop in drops)

        return [rate(step) for step in range(self.num_steps)]

    def optimizer(self, network: nn.Module) -> torch.optim.SGD:
        """SGD on the parameters that require a gradient, in two groups: with weight decay and without."""
        norms = {
            id(p)
            for module in network.modules()
            if isinstance(module, _NORMS)
            for p in module.parameters(recurse=False)
        }
        learning = [p for p in network.parameters() if p.requires_grad]
        without = [] if self.decay_norms else [p for p in learning if id(p) in norms]
        chosen = {id(p) for p in without}
        groups = [
            {"params": [p for p in learning if id(p) not in chosen], "weight_decay": self.weight_decay},
            {"params": without, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(
            [group for group in groups if group["params"]], lr=self.highest_rate, momentum=self.momentum
        )

    def shown(self) -> str:
        """Steps, images and rate after scaling, for messages."""
        return f"{amount(self.num_steps, 'step')} of {amount(self.images, 'image')}, rate {self.highest_rate:g}"
