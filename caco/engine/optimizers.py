"""Optimisers from libraries on the parameter groups of a method, and the changes over a run: learning rates, weight
decays, clipping, frozen parameters.
"""

from collections.abc import Sequence
from typing import Any, Literal

import timm.optim
import torch
from torch import nn

from caco.errors import UserError
from caco.methods.base import Now, ParameterGroup
from caco.nn.layerwise import LARC, LARS
from caco.ranges import Betas, Count, NonNegative, ShareBelowOne
from caco.schedules import RunShape, Table, cosine, drops, scaled_lr, warmup_and_cosine


def parameter_groups(
    groups: list[ParameterGroup], weight_decay: float, *, exclude_one_dimensional: bool
) -> list[dict[str, Any]]:
    """torch's parameter groups. Each group of the method is split into parameters that decay and one-dimensional ones
    (biases, BatchNorm) that do not, if the method or the optimiser excludes the latter from decay."""
    parts = []
    for group in groups:
        own = {"rate": group.rate, "frozen_steps": group.frozen_steps, "frozen_epochs": group.frozen_epochs}
        exclude = exclude_one_dimensional or not group.decay_one_dimensional
        excluded = [p for p in group.parameters if exclude and p.ndim <= 1]
        decaying = [p for p in group.parameters if not (exclude and p.ndim <= 1)]
        parts.append({"params": decaying, "weight_decay": weight_decay if group.decay else 0.0, **own})
        parts.append({"params": excluded, "weight_decay": 0.0, **own})
    return [part for part in parts if part["params"]]


def lars(
    groups: list[ParameterGroup],
    *,
    batch: Count,
    lr: NonNegative = 0.3,
    reference_batch: Count | None = 256,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 1.5e-6,
    trust_coefficient: NonNegative = 1e-3,
) -> torch.optim.Optimizer:
    """LARS as published (caco/nn/layerwise.py). The learning rate is lr * batch / reference_batch."""
    parts = parameter_groups(groups, weight_decay, exclude_one_dimensional=True)
    rate = scaled_lr(lr, batch, reference_batch)
    return LARS(parts, lr=rate, momentum=momentum, trust_coefficient=trust_coefficient)


def lars_timm(
    groups: list[ParameterGroup],
    *,
    batch: Count,
    lr: NonNegative = 0.3,
    reference_batch: Count | None = 256,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 1.5e-6,
    trust_coefficient: NonNegative = 1e-3,
    trust_clip: bool = False,
) -> torch.optim.Optimizer:
    """timm's LARS. Its trust ratio |p| / (|g| + wd |p|) differs from the published |p| / |g + wd p| by up to a
    hundredth.

    timm does not scale a group whose weight decay is 0, so one-dimensional parameters get neither decay nor scaling.

    trust_clip: limit a parameter's rate to the smaller of the learning rate and the trust ratio, instead of multiplying
        them (LARC's clipping, which solo-learn's LARS has).
    """
    if weight_decay <= 0:
        raise UserError(
            "optimizer.weight_decay must be positive with timm's LARS, which scales no group without weight decay; got"
            f" {weight_decay}; use optimizer=lars instead"
        )
    parts = parameter_groups(groups, weight_decay, exclude_one_dimensional=True)
    rate = scaled_lr(lr, batch, reference_batch)
    return timm.optim.Lars(parts, lr=rate, momentum=momentum, trust_coeff=trust_coefficient, trust_clip=trust_clip)


def sgd(
    groups: list[ParameterGroup],
    *,
    batch: Count,
    lr: NonNegative = 0.03,
    reference_batch: Count | None = 256,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 1e-4,
) -> torch.optim.Optimizer:
    """SGD with momentum; decay on every parameter, as in MoCo and AdCo. The learning rate is lr * batch /
    reference_batch.
    """
    parts = parameter_groups(groups, weight_decay, exclude_one_dimensional=False)
    return torch.optim.SGD(parts, lr=scaled_lr(lr, batch, reference_batch), momentum=momentum)


def adamw(
    groups: list[ParameterGroup],
    *,
    batch: Count,
    lr: NonNegative = 1e-3,
    reference_batch: Count | None = 256,
    betas: Betas = (0.9, 0.999),
    weight_decay: NonNegative = 0.05,
    decay_one_dimensional: bool = False,
) -> torch.optim.Optimizer:
    """AdamW, for ViTs. The learning rate is lr * batch / reference_batch.

    decay_one_dimensional: whether biases and norm parameters decay too (MoCo v3).
    """
    parts = parameter_groups(groups, weight_decay, exclude_one_dimensional=not decay_one_dimensional)
    first, second = betas
    return torch.optim.AdamW(parts, lr=scaled_lr(lr, batch, reference_batch), betas=(first, second))


def adam(
    groups: list[ParameterGroup],
    *,
    batch: Count,
    lr: NonNegative = 1e-3,
    reference_batch: Count | None = 256,
    betas: Betas = (0.9, 0.999),
    weight_decay: NonNegative = 0.0,
) -> torch.optim.Optimizer:
    """Adam. Weight decay is added to the gradient and applies to every parameter. The learning rate is lr * batch /
    reference_batch.
    """
    parts = parameter_groups(groups, weight_decay, exclude_one_dimensional=False)
    first, second = betas
    return torch.optim.Adam(parts, lr=scaled_lr(lr, batch, reference_batch), betas=(first, second))


def larc(
    groups: list[ParameterGroup],
    *,
    batch: Count,
    lr: NonNegative = 0.3,
    reference_batch: Count | None = 256,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 1e-6,
    trust_coefficient: NonNegative = 1e-3,
) -> torch.optim.Optimizer:
    """LARC (caco/nn/layerwise.py); decay on every parameter. The learning rate is lr * batch / reference_batch."""
    parts = parameter_groups(groups, weight_decay, exclude_one_dimensional=False)
    rate = scaled_lr(lr, batch, reference_batch)
    return LARC(parts, lr=rate, momentum=momentum, trust_coefficient=trust_coefficient)


class OptimizerSchedule:
    """The settings of what changes over a run, for any optimiser.

    Args:
        warmup_epochs: length of the learning rate's warm-up, which is W ticks.
        warmup_start: fraction of the learning rate at the first tick of the warm-up. None: 1 / W.
        warmup_end: the first tick with the full rate: the "last" of the warm-up (SwAV, DINO), or the "next" after it
            (BYOL, MoCo v3, Barlow Twins, VICReg, whose rate t / W starts at 0).
        final_fraction: the learning rate at the end, as a fraction of the full one; 0.01 in the paper. None if
            `final_lr` gives it.
        final_lr: the learning rate at the end as an absolute value, whatever the batch makes of the full one (DINO).
        drops: replaces the cosine and its end: shares of the run, rounded to whole epochs; from each on, the learning
            rate is multiplied by `drop_factor` (InstDisc, SeLa, CMC).
        final_weight_decay: the weight decay at the end, reached by a cosine from the optimiser's value; None keeps that
            value (DINO goes from 0.04 to 0.4).
        clip_gradient_norm: the largest norm of the gradient of all parameters together; None does not clip.
        clip_each_gradient_norm: the largest norm of each parameter's own gradient (DINO); None does not clip.
    """

    def __init__(
        self,
        *,
        warmup_epochs: float = 10,
        warmup_start: float | None = None,
        warmup_end: Literal["last", "next"] = "last",
        final_fraction: float | None = 0.01,
        final_lr: float | None = None,
        drops: Sequence[float] = (),
        drop_factor: float = 0.1,
        final_weight_decay: float | None = None,
        clip_gradient_norm: float | None = None,
        clip_each_gradient_norm: float | None = None,
    ):
        if warmup_epochs < 0 or not 0 <= (final_fraction or 0) <= 1 or not 0 <= (warmup_start or 0) <= 1:
            raise UserError(
                "schedule needs warmup_epochs >= 0, and warmup_start and final_fraction in [0, 1] or null; got "
                f"warmup_epochs={warmup_epochs}, warmup_start={warmup_start}, final_fraction={final_fraction}"
            )
        if [final_fraction is None, final_lr is None, not drops].count(False) != 1 or (final_lr or 0) < 0:
            raise UserError(
                "schedule needs exactly one of final_fraction, final_lr and drops, the others null (drops []); got "
                f"final_fraction={final_fraction}, final_lr={final_lr}, drops={list(drops)}"
            )
        if not all(0 < share < 1 for share in drops) or not 0 < drop_factor < 1:
            raise UserError(
                f"schedule needs drops and drop_factor between 0 and 1; got drops={list(drops)},"
                f" drop_factor={drop_factor}"
            )
        if warmup_end not in ("last", "next"):
            raise UserError(f"schedule needs warmup_end last or next; got {warmup_end!r}")
        clips = {"clip_gradient_norm": clip_gradient_norm, "clip_each_gradient_norm": clip_each_gradient_norm}
        if (final_weight_decay or 0) < 0 or any(clip is not None and clip <= 0 for clip in clips.values()):
            raise UserError(
                "schedule needs final_weight_decay >= 0 and clip_gradient_norm and clip_each_gradient_norm > 0, or"
                f" null; got final_weight_decay={final_weight_decay}, "
                + ", ".join(f"{name}={clip}" for name, clip in clips.items())
            )
        self.warmup_epochs, self.warmup_start, self.warmup_end = warmup_epochs, warmup_start, warmup_end
        self.final_fraction, self.final_lr = final_fraction, final_lr
        self.drops, self.drop_factor = drops, drop_factor
        self.final_weight_decay = final_weight_decay
        self.clip_gradient_norm, self.clip_each_gradient_norm = clip_gradient_norm, clip_each_gradient_norm

    def learning_rate(self, run: RunShape, base_lr: float = 1.0) -> Table:
        """The factor on the base rate at each tick: a line up to 1 during the warm-up, then a cosine down to the final
        fraction, or the drops.

        Raises:
            UserError: the warm-up is not shorter than the run.
        """
        if self.warmup_epochs >= run.epochs:
            raise UserError(
                f"schedule.warmup_epochs must be below epochs, {run.epochs}; got {self.warmup_epochs} "
                "(a short run needs a shorter warm-up: schedule.warmup_epochs=0)"
            )
        if self.drops:
            level = warmup_and_cosine(run, 1.0, 1.0, self.warmup_epochs, start=self.warmup_start, end=self.warmup_end)
            return [a * b for a, b in zip(level, drops(run, self.drops, self.drop_factor), strict=True)]
        final = self.final_lr / base_lr if self.final_lr is not None else self.final_fraction or 0.0
        return warmup_and_cosine(run, 1.0, final, self.warmup_epochs, start=self.warmup_start, end=self.warmup_end)


class Optimisation:
    """torch's optimiser, with its learning rate and weight decay at each step of the training.

    Args:
        optimizer: made by `lars`, `lars_timm`, `larc`, `sgd`, `adam` or `adamw`.
        schedule: what changes over the run.
        run: the length of the training.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: OptimizerSchedule, run: RunShape):
        self.optimizer = optimizer
        self.clip_gradient_norm, self.clip_each_gradient_norm = (
            schedule.clip_gradient_norm,
            schedule.clip_each_gradient_norm,
        )
        self.base_lr = [group["lr"] for group in optimizer.param_groups]
        self.lr_factor = run.placed(schedule.learning_rate(run.of_schedules(), self.base_lr[0]))
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        final = schedule.final_weight_decay
        self.weight_decay = (
            None
            if final is None
            else [run.placed(cosine(run.of_schedules(), decay, final)) if decay else None for decay in decays]
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def lr(self) -> float:
        """The learning rate of the first group, at the step that was prepared last."""
        return self.optimizer.param_groups[0]["lr"]

    def rate(self, training_step: int, lr_factor: float | None) -> float:
        """The learning rate of groups without a factor or schedule of their own; for lr_factor see `prepare`."""
        return self.base_lr[0] * (self.lr_factor[training_step] if lr_factor is None else lr_factor)

    def prepare(self, now: Now, lr_factor: float | None) -> None:
        """Set the learning rates and weight decays of a step.

        Args:
            lr_factor: factor on the base rate in a phase before the training, whose weight decays are those of the
                first training step; None in the training.
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
        """Move the parameters along their gradients, which must be means over the ranks, and clear the gradients."""
        for group in self.optimizer.param_groups:
            if now.step < group["frozen_steps"] or (0 if now.epoch is None else now.epoch) < group["frozen_epochs"]:
                for p in group["params"]:
                    p.grad = None
        if self.clip_each_gradient_norm is not None:
            for p in self.parameters:
                torch.nn.utils.clip_grad_norm_(p, self.clip_each_gradient_norm)
        if self.clip_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
