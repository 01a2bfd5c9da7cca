"""Drive a method through the steps of a run in the Trainer's order, in float64, on views made by a test. Tests compare
the result with a plain loop that follows the publication.
"""

import torch
from tiny import batch_of
from torch import nn

from caco.engine.optimizers import Optimisation, OptimizerSchedule
from caco.methods.base import Now
from caco.nn.heads import Encoder, Projector
from caco.schedules import RunShape

SIDES = (6, 6, 4)  # sizes of the views in pixels: two large views and a small one


class Trunk(nn.Sequential):
    num_features = 6


def tiny_encoder(**projector) -> Encoder:
    """An encoder with BatchNorm in backbone and projector, so that results show which views pass through together."""
    torch.manual_seed(0)
    backbone = Trunk(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return Encoder(
        backbone=backbone,
        projector=Projector(**{"in_dim": 6, "hidden_dim": 10, "dim": 5, "layers": 2, "bias": True, **projector}),
    ).double()


def views_of(step: int, batch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64) for side in SIDES]


def drive(
    method, optimizer, schedule: OptimizerSchedule, run: RunShape, steps: int, after=lambda step: None, batch_at=None
) -> list[float]:
    """Train `steps` steps and return their losses.

    Args:
        after: called as after(step) when a step is done.
        batch_at: batch_at(step) makes the batch of a step; None for a batch of `views_of`.
    """
    batch_at = batch_at or (lambda step: batch_of(views_of(step, run.batch)))
    optimisation, tables = Optimisation(optimizer, schedule, run), method.schedules(run)
    method.phases(run)
    losses = []
    for step in range(steps):
        values = {name: table[step] for name, table in tables.items()}
        place = (step, "training", step, step + 1 == run.steps, *divmod(step, run.steps_per_epoch))
        now = Now(*place, values, optimisation.rate(step, None))
        optimisation.prepare(now, None)
        method.train().before_step(now, None)
        loss = method(batch_at(step), now).loss
        loss.backward()
        optimisation.step(now)
        method.after_step(now)
        losses.append(loss.item())
        after(step)
    return losses
