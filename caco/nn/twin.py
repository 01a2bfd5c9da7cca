"""The momentum twin: an encoder that follows another one slowly and takes no gradient."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn


class MomentumTwin(nn.Module):
    """theta_k <- m theta_k + (1 - m) theta_q, for parameters only.

    Buffers are the twin's own: it runs in training mode, so its BatchNorm gathers statistics by itself, as in the
    published code.

    Args:
        encoder: what it follows.
        initialisation: "copy" begins with the encoder's parameters. "random" with others of the same law: in each tensor that is
            learned, the encoder's own values in another order, which for values that were drawn independently and alike is
            another draw, and leaves scales of 1 and biases of 0 what they are.
    """

    def __init__(self, encoder: nn.Module, *, initialisation: Literal["copy", "random"] = "copy"):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        if initialisation == "random":
            for p in (p.data for p in self.encoder.parameters() if p.requires_grad):
                p.copy_(p.flatten()[torch.randperm(p.numel(), device=p.device)].view_as(p))
        self.encoder.requires_grad_(False)

    @torch.no_grad()
    def update(self, encoder: nn.Module, momentum: float) -> None:
        """One step towards `encoder`; momentum 0 copies its parameters."""
        torch._foreach_lerp_(list(self.encoder.parameters()), list(encoder.parameters()), 1 - momentum)

    @torch.no_grad()
    def forward(self, images: Tensor, **how: bool) -> Tensor:
        return self.encoder(images, **how)
