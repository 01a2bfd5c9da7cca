"""Optimisers from libraries on the paper's parameter groups, and what a step does with them: rates, clipping, freezing."""

from collections.abc import Sequence
from typing import Any

import timm.optim
import torch
from torch import nn

from caco.errors import UserError
from caco.methods.base import Now, ParameterGroup
from caco.schedules import RunShape, Table, cosine, scaled_lr, warmup_and_cosine


def parameter_groups(groups: list[ParameterGroup], weight_decay: float, *, exclude_one_dimensional: bool) -> list[dict[str, Any]]:
    """torch's groups: of each of the method's the parameters that decay and, where excluded, those of one dimension (biases,
    BatchNorm), which do not.

    timm's LARS scales no group whose weight decay is 0, so the exclusion holds for its scaling too.
    """
    parts = []
    for group in groups:
        own = {"rate": group.rate, "frozen_steps": group.frozen_steps}
        excluded = [p for p in group.parameters if exclude_one_dimensional and p.ndim <= 1]
        decaying = [p for p in group.parameters if not (exclude_one_dimensional and p.ndim <= 1)]
        parts.append({"params": decaying, "weight_decay": weight_decay if group.decay else 0.0, **own})
        parts.append({"params": excluded, "weight_decay": 0.0, **own})
    return [part for part in parts if part["params"]]


def lars(
    groups: list[ParameterGroup],
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
    parts = parameter_groups(groups, weight_decay, exclude_one_dimensional=True)
    rate = scaled_lr(lr, batch, reference_batch)
    return timm.optim.Lars(parts, lr=rate, momentum=momentum, trust_coeff=trust_coefficient)


def sgd(
    groups: list[ParameterGroup],
    *,
    batch: int,
    lr: float = 0.03,
    reference_batch: int | None = 256,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> torch.optim.Optimizer:
    """SGD with momentum; decay on every parameter, as in MoCo and AdCo. The rate is lr * batch / reference_batch."""
    parts = parameter_groups(groups, weight_decay, exclude_one_dimensional=False)
    return torch.optim.SGD(parts, lr=scaled_lr(lr, batch, reference_batch), momentum=momentum)


def adamw(
    groups: list[ParameterGroup],
    *,
    batch: int,
    lr: float = 1e-3,
    reference_batch: int | None = 256,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.05,
) -> torch.optim.Optimizer:
    """AdamW, for ViTs; parameters of one dimension do not decay. The rate is lr * batch / reference_batch."""
    parts = parameter_groups(groups, weight_decay, exclude_one_dimensional=True)
    first, second = betas
    return torch.optim.AdamW(parts, lr=scaled_lr(lr, batch, reference_batch), betas=(first, second))


class Schedule:
    """Settings of what changes over the run in an optimiser of any kind.

    Args:
        warmup_epochs: of the learning rate.
        final_fraction: of the learning rate, at the end; 0.01 in the paper.
        final_weight_decay: at the end of a cosine from the optimiser's; None keeps that (DINO goes from 0.04 to 0.4).
        clip_gradient_norm: the gradient's largest norm over all parameters together; None does not clip.
    """

    def __init__(
        self,
        *,
        warmup_epochs: float = 10,
        final_fraction: float = 0.01,
        final_weight_decay: float | None = None,
        clip_gradient_norm: float | None = None,
    ):
        if warmup_epochs < 0 or not 0 <= final_fraction <= 1:
            raise UserError(
                "schedule needs warmup_epochs >= 0 and final_fraction in [0, 1]; got "
                f"warmup_epochs={warmup_epochs}, final_fraction={final_fraction}"
            )
        if (final_weight_decay or 0) < 0 or (clip_gradient_norm is not None and clip_gradient_norm <= 0):
            raise UserError(
                "schedule needs final_weight_decay >= 0 and clip_gradient_norm > 0, or null; got "
                f"final_weight_decay={final_weight_decay}, clip_gradient_norm={clip_gradient_norm}"
            )
        self.warmup_epochs, self.final_fraction = warmup_epochs, final_fraction
        self.final_weight_decay, self.clip_gradient_norm = final_weight_decay, clip_gradient_norm

    def learning_rate(self, run: RunShape) -> Table:
        """Factor on the base rate: (t + 1) / W in the warm-up's W ticks, then a cosine to `final_fraction`."""
        if self.warmup_epochs >= run.epochs:
            raise UserError(
                f"schedule.warmup_epochs must be below epochs, {run.epochs}; got {self.warmup_epochs} "
                "(a short run needs a shorter warm-up: schedule.warmup_epochs=0)"
            )
        return warmup_and_cosine(run, 1.0, self.final_fraction, self.warmup_epochs)


class Optimisation:
    """torch's optimiser, and the rates and decays that it has at each step of the training.

    Args:
        optimizer: of `lars`, `sgd` or `adamw`.
        schedule: see there.
        run: how long the training is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule, run: RunShape):
        self.optimizer, self.clip_gradient_norm = optimizer, schedule.clip_gradient_norm
        self.lr_factor = schedule.learning_rate(run)
        self.base_lr = [group["lr"] for group in optimizer.param_groups]
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        final = schedule.final_weight_decay
        self.weight_decay = None if final is None else [cosine(run, decay, final) if decay else None for decay in decays]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def lr(self) -> float:
        """Of the first group, at the step that was prepared last."""
        return self.optimizer.param_groups[0]["lr"]

    def prepare(self, now: Now, lr_factor: float | None) -> None:
        """Set the rates and decays of a step.

        Args:
            lr_factor: of a phase before the training, whose decays are those of the training's first step; None in the training.
        """
        training_step = now.step_in_phase if lr_factor is None else 0
        factor = self.lr_factor[training_step] if lr_factor is None else lr_factor
        for number, group in enumerate(self.optimizer.param_groups):
            own = now[group["rate"]] if isinstance(group["rate"], str) else factor * group["rate"]
            group["lr"] = self.base_lr[number] * own
            decays = None if self.weight_decay is None else self.weight_decay[number]
            if decays is not None:
                group["weight_decay"] = decays[training_step]

    def step(self, now: Now) -> None:
        """Move the parameters along their gradients, which are the mean over the ranks, and drop these."""
        for group in self.optimizer.param_groups:
            if now.step < group["frozen_steps"]:
                for p in group["params"]:
                    p.grad = None
        if self.clip_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
