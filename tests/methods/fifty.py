"""Train a method for fifty steps as the Trainer does, for comparison with a loop that a test writes from the
publication.

Everything is float64. The network is small enough to be written as a formula: `backbone` below is the formula of the
backbone in `encoder`.
"""

import math
from typing import Literal

import torch
from tiny import batch_of
from torch import nn

from caco import distributed
from caco.engine.optimizers import Optimisation, OptimizerSchedule
from caco.methods.base import Method, Now
from caco.nn.heads import Encoder, Projector
from caco.nn.twin import MomentumTwin
from caco.schedules import RunShape

B, PIXELS, FEATURES, D = 8, 12, 14, 5  # enough features that a ReLU never sets all features of an image to 0
STEPS = 50
FROM_ZERO = {"warmup_epochs": 2, "warmup_start": 0.0, "warmup_end": "next"}


def encoder(**projector) -> Encoder:
    """A backbone of a linear layer on the pixels, BatchNorm and ReLU; then the projector."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU())
    return Encoder(
        backbone=backbone, projector=Projector(in_dim=FEATURES, **{"hidden_dim": 16, "dim": D} | projector)
    ).double()


def views_of(step: int, count: int = 2) -> list[torch.Tensor]:
    """Views in which those of one image are near one another."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(B, 3, 2, 2, generator=generator, dtype=torch.float64)
    return [images + 0.3 * torch.randn(images.shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def train(
    method: Method, optimizer: torch.optim.Optimizer, *, unit: Literal["step", "epoch"] = "step", count: int = 2,
    first=lambda step: 0,
    images=None,
    patches=lambda step: None, **schedule,
) -> list[float]:  # fmt: skip
    """Train fifty steps in the Trainer's order and return their losses. A step's batch are the images first(step),
    first(step) + 1, ...

    Args:
        images: what the method gets for passes over all images.
        patches: makes the patches of a step's images.
    """
    run = RunShape(epochs=10, steps_per_epoch=5, batch=B, unit=unit)
    optimisation, tables = Optimisation(optimizer, OptimizerSchedule(**schedule), run), method.schedules(run)
    method.train()
    losses = []
    for step in range(STEPS):
        values = {name: table[step] for name, table in tables.items()}
        now = Now(
            step,
            "training",
            step,
            step + 1 == STEPS,
            *divmod(step, run.steps_per_epoch),
            values,
            optimisation.rate(step, None),
        )
        optimisation.prepare(now, None)
        if now.step_in_epoch == 0:
            method.before_epoch(now, images)
        method.train().before_step(now, images)
        outputs = method(batch_of(views_of(step, count), first=first(step), patches=patches(step)), now)
        outputs.loss.backward()
        distributed.mean_gradients(optimisation.parameters)
        optimisation.step(now)
        method.after_step(now)
        losses.append(outputs.loss.item())
    return losses


# The same network as a formula of its weights, which are given by name.


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the learned parameters, by name."""
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters() if p.requires_grad}


def twin_of(twin: MomentumTwin) -> dict[str, torch.Tensor]:
    """Copies of the twin's parameters, under the encoder's names."""
    return {f"encoder.{name}": p.clone() for name, p in twin.encoder.named_parameters()}


def normed(x, scale=None, shift=None):
    """BatchNorm in training mode."""
    x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    return x if scale is None else x * scale + shift


def backbone(w, image):
    x = image.flatten(1) @ w["encoder.backbone.1.weight"].T + w["encoder.backbone.1.bias"]
    return normed(x, w["encoder.backbone.2.weight"], w["encoder.backbone.2.bias"]).clamp_min(0)


def from_zero(step: int, peak: float, final: float) -> float:
    """The rate lr t / T_w during the warm-up, then a cosine over the remaining steps."""
    warmup = 10
    if step < warmup:
        return peak * step / warmup
    return final + (peak - final) * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2


@torch.no_grad()
def lars(w, gradients, velocity, lr, decay, one_dimensional_lr=None):
    """One step of the published LARS, in place."""
    for name, g in gradients.items():
        p = w[name]
        if p.ndim > 1:
            g = g + decay * p
            g = 0.001 * p.norm() / g.norm() * g
        velocity[name] = 0.9 * velocity.get(name, 0.0) + g
        p -= (lr if p.ndim > 1 or one_dimensional_lr is None else one_dimensional_lr) * velocity[name]


@torch.no_grad()
def sgd(w, gradients, velocity, lrs, decay):
    """One SGD step with momentum 0.9 and weight decay on all parameters, in place; `lrs` maps prefixes of names to
    rates.
    """
    for name, g in gradients.items():
        velocity[name] = 0.9 * velocity.get(name, 0.0) + g + decay * w[name]
        w[name] -= next(lr for start, lr in lrs.items() if name.startswith(start)) * velocity[name]


def gradients_of(loss, w):
    return dict(zip(w, torch.autograd.grad(loss, w.values()), strict=True))


def cosine(a, b):
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


@torch.no_grad()
def follow(twin, w, momentum):
    """The twin's moving average, in place."""
    for name, value in twin.items():
        value.copy_(momentum * value + (1 - momentum) * w[name])


def assert_same_training(losses, method, by_hand, w, twin=None):
    """Compare the losses of all steps and the learned parameters to about ten digits; in fifty steps, the rounding
    error of float64 grows from 1e-16 to about 1e-13.
    """
    assert torch.allclose(
        torch.tensor(losses, dtype=torch.float64), torch.stack(by_hand).detach(), atol=1e-9, rtol=1e-9
    )
    assert len({round(loss, 9) for loss in losses}) > STEPS - 2, (
        "only the first step, with rate 0, may leave the loss unchanged"
    )
    for ours, theirs in ((weights_of(method), w), ({}, {}) if twin is None else (twin_of(method.twin), twin)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.allclose(ours[name], value, atol=1e-8, rtol=0), name
