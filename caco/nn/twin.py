"""The momentum twin: an encoder that follows another one slowly and takes no gradient."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from caco import devices, distributed


class MomentumTwin(nn.Module):
    """theta_k <- m theta_k + (1 - m) theta_q, for parameters only.

    Buffers are the twin's own: it runs in training mode, so its BatchNorm gathers statistics by itself, as in the
    published code.

    Args:
        encoder: what it follows.
        initialisation: "copy" begins with the encoder's parameters. "random" with others of the same law: in each
            tensor that is learned, the encoder's own values in another order, which for values that were drawn
            independently and alike is another draw, and leaves scales of 1 and biases of 0 what they are.
    """

    def __init__(self, encoder: nn.Module, *, initialisation: Literal["copy", "random"] = "copy"):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        if initialisation == "random":
            for p in (p.data for p in self.encoder.parameters() if p.requires_grad):
                p.copy_(p.flatten()[torch.randperm(p.numel(), device=p.device)].view_as(p))
        self.encoder.requires_grad_(False)
        self.shuffles = False  # see caco/nn/norm.py: in_groups

    @torch.no_grad()
    def update(self, encoder: nn.Module, momentum: float) -> None:
        """One step towards `encoder`; momentum 0 copies its parameters."""
        step = get_ema_multi_avg_fn(momentum)  # all tensors at once
        step(list(self.encoder.parameters()), list(encoder.parameters()), None)

    @torch.no_grad()
    def forward(self, images: Tensor | list[Tensor], **how: bool) -> Tensor:
        """What the encoder gives for images [B, 3, H, W], or for several views of them, one view after the other."""
        return self._shuffled(images, **how) if self.shuffles else self.encoder(images, **how)

    def _shuffled(self, images: Tensor | list[Tensor], **how: bool) -> Tensor:
        """The images of all ranks go through the encoder in an order drawn anew, and what comes of them goes back to
        where they were.

        Source: _batch_shuffle_ddp and _batch_unshuffle_ddp of MoCo's code (moco/builder.py), which AdCo's has too.
        """
        views = [images] if isinstance(images, Tensor) else images
        own = len(views[0])
        # From the generator of rank 0 on the CPU, whose state is in a checkpoint.
        order = distributed.from_main(devices.sent(torch.randperm(own * distributed.world()), views[0].device))
        mixed = [distributed.own(distributed.gather(view)[order], own) for view in views]
        embeddings = self.encoder(mixed[0] if isinstance(images, Tensor) else mixed, **how)
        back = order.argsort()
        return torch.cat([distributed.own(distributed.gather(view)[back], own) for view in embeddings.split(own)])
