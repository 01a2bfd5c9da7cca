"""The momentum twin: a copy of an encoder that follows the encoder slowly and takes no gradient."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from caco import devices, distributed


class MomentumTwin(nn.Module):
    """A copy of an encoder whose parameters follow the encoder's: theta_k <- m theta_k + (1 - m) theta_q.

    Buffers do not follow. The twin runs in training mode, so its BatchNorm gathers statistics of its own, as in the
    published code.

    Args:
        encoder: the module to follow.
        initialisation: "copy" begins with the encoder's parameters. "random" begins with another draw from the same
            distribution: each learned tensor gets the encoder's values in another, random order. For values drawn
            independently from one distribution that is a new draw, and it leaves scales of 1 and biases of 0 as they
            are.

    Source: arXiv 1911.05722 (MoCo), Eq. 2.
    """

    def __init__(self, encoder: nn.Module, *, initialisation: Literal["copy", "random"] = "copy"):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        if initialisation == "random":
            for p in (p.data for p in self.encoder.parameters() if p.requires_grad):
                p.copy_(p.flatten()[torch.randperm(p.numel(), device=p.device)].view_as(p))
        self.encoder.requires_grad_(False)
        self.shuffles = False  # whether `forward` shuffles the images of all ranks; set by caco/nn/norm.py: in_groups

    @torch.no_grad()
    def update(self, encoder: nn.Module, momentum: float) -> None:
        """One step towards the parameters of `encoder`, with m = `momentum`; 0 copies them."""
        step = get_ema_multi_avg_fn(momentum)  # it moves all tensors at once
        step(list(self.encoder.parameters()), list(encoder.parameters()), None)

    @torch.no_grad()
    def forward(self, images: Tensor | list[Tensor], **how: bool) -> Tensor:
        """The twin's output, without gradient, for images [B, 3, H, W] or for a list of several views of them. With
        several views their outputs follow one another.
        """
        return self._shuffled(images, **how) if self.shuffles else self.encoder(images, **how)

    def _shuffled(self, images: Tensor | list[Tensor], **how: bool) -> Tensor:
        """Send the images of all ranks through the twin in a new random order, and bring the outputs back into the
        images' own order. A collective.

        Source: _batch_shuffle_ddp and _batch_unshuffle_ddp of MoCo's code (moco/builder.py), which AdCo's has too.
        """
        views = [images] if isinstance(images, Tensor) else images
        own = len(views[0])
        # The order comes from rank 0's CPU generator, because a checkpoint holds the state of that generator.
        order = distributed.from_main(devices.sent(torch.randperm(own * distributed.world()), views[0].device))
        mixed = [distributed.own(distributed.gather(view)[order], own) for view in views]
        embeddings = self.encoder(mixed[0] if isinstance(images, Tensor) else mixed, **how)
        back = order.argsort()
        return torch.cat([distributed.own(distributed.gather(view)[back], own) for view in embeddings.split(own)])
