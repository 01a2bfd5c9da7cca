"""Optimisers from libraries on the paper's parameter groups, and the schedules, computed once and visible."""

import math
from typing import Literal

import timm.optim
import torch
from torch import nn

from caco.errors import UserError


def parameter_groups(parameters: list[nn.Parameter], weight_decay: float, *, exclude_one_dimensional: bool) -> list[dict]:
    """Parameters that decay and, where excluded, those of one dimension (biases, BatchNorm), which do not.

    timm's LARS scales no group whose weight decay is 0, so the exclusion holds for its scaling too.
    """
    if not exclude_one_dimensional:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def scaled_lr(lr: float, batch: int, reference_batch: int | None) -> float:
    """lr * batch / reference_batch; unscaled where there is no reference batch."""
    if lr <= 0:
        raise UserError(f"optimizer.lr must be positive; got {lr}")
    return lr * batch / reference_batch if reference_batch else lr


def lars(
    parameters: list[nn.Parameter],
    *,
    batch: int,
    lr: float = 0.3,
    reference_batch: int | None = 256,
    momentum: float = 0.9,
    weight_decay: float = 1.5e-6,
    trust_coefficient: float = 1e-3,
) -> torch.optim.Optimizer:
    """Layer-wise adaptive rates (timm's): trust |p| / (|g| + wd |p|), the published |p| / |g + wd p| to about wd.

    Parameters of one dimension get neither decay nor scaling. The rate is lr * batch / reference_batch.
    """
    if weight_decay <= 0:
        raise UserError(
            f"optimizer.weight_decay must be positive with LARS, whose scaling timm ties to it; got {weight_decay}"
        )
    groups = parameter_groups(parameters, weight_decay, exclude_one_dimensional=True)
    rate = scaled_lr(lr, batch, reference_batch)
    return timm.optim.Lars(groups, lr=rate, momentum=momentum, trust_coeff=trust_coefficient)


def sgd(
    parameters: list[nn.Parameter],
    *,
    batch: int,
    lr: float = 0.03,
    reference_batch: int | None = 256,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> torch.optim.Optimizer:
    """SGD with momentum; decay on every parameter, as in MoCo and AdCo. The rate is lr * batch / reference_batch."""
    groups = parameter_groups(parameters, weight_decay, exclude_one_dimensional=False)
    return torch.optim.SGD(groups, lr=scaled_lr(lr, batch, reference_batch), momentum=momentum)


def adamw(
    parameters: list[nn.Parameter],
    *,
    batch: int,
    lr: float = 1e-3,
    reference_batch: int | None = 256,
    betas: list[float] = (0.9, 0.999),
    weight_decay: float = 0.05,
) -> torch.optim.Optimizer:
    """AdamW, for ViTs; parameters of one dimension do not decay. The rate is lr * batch / reference_batch."""
    groups = parameter_groups(parameters, weight_decay, exclude_one_dimensional=True)
    return torch.optim.AdamW(groups, lr=scaled_lr(lr, batch, reference_batch), betas=tuple(betas))


class Schedule:
    """Warm-up and cosine as tables with one number a step; made once, before the loop.

    Args:
        warmup_epochs: of the learning rate.
        final_fraction: of the learning rate, at the end; 0.01 in the paper.
        unit: "step" changes rates with every step; "epoch" holds them within an epoch, as the published code does.
    """

    def __init__(self, *, warmup_epochs: float = 10, final_fraction: float = 0.01, unit: Literal["step", "epoch"] = "step"):
        if warmup_epochs < 0 or not 0 <= final_fraction <= 1:
            raise UserError(
                "schedule needs warmup_epochs >= 0 and final_fraction in [0, 1]; got "
                f"warmup_epochs={warmup_epochs}, final_fraction={final_fraction}"
            )
        self.warmup_epochs, self.final_fraction, self.unit = warmup_epochs, final_fraction, unit

    def _ticks(self, epochs: int, steps_per_epoch: int) -> tuple[list[int], float]:
        """For each step, how many ticks have passed, and the ticks of an epoch."""
        if self.unit == "epoch":
            return [step // steps_per_epoch for step in range(epochs * steps_per_epoch)], 1
        return list(range(epochs * steps_per_epoch)), steps_per_epoch

    def learning_rate(self, epochs: int, steps_per_epoch: int) -> list[float]:
        """Factor on the base rate: (t + 1) / W in the warm-up's W ticks, then a cosine to `final_fraction`."""
        if self.warmup_epochs >= epochs:
            raise UserError(
                f"schedule.warmup_epochs must be below epochs, {epochs}; got {self.warmup_epochs} "
                "(a short run needs a shorter warm-up: schedule.warmup_epochs=0)"
            )
        return self.warmup_and_cosine(1.0, self.final_fraction, self.warmup_epochs, epochs, steps_per_epoch)

    def warmup_and_cosine(
        self, highest: float, final: float, warmup_epochs: float, epochs: int, steps_per_epoch: int
    ) -> list[float]:
        """A rate for each step: highest * (t + 1) / W in the warm-up's W ticks, then a half cosine from `highest` to `final`.

        `final` equal to `highest` keeps the rate constant after the warm-up. A warm-up may be longer than the run.
        """
        ticks, per_epoch = self._ticks(epochs, steps_per_epoch)
        warmup = warmup_epochs * per_epoch
        rest = max(epochs * per_epoch - warmup, 1)

        def rate(t: int) -> float:
            if t < warmup:
                return highest * min(1.0, (t + 1) / max(warmup, 1))
            return final + (highest - final) * 0.5 * (1 + math.cos(math.pi * (t - warmup) / rest))

        return [rate(t) for t in ticks]

    def momentum(self, start: float, end: float, epochs: int, steps_per_epoch: int) -> list[float]:
        """The twin's m: a half cosine from `start` to `end` over the run."""
        ticks, per_epoch = self._ticks(epochs, steps_per_epoch)
        total = epochs * per_epoch
        return [end - (end - start) * 0.5 * (1 + math.cos(math.pi * t / total)) for t in ticks]
