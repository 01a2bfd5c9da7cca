"""The momentum twin: an encoder that follows another one slowly and takes no gradient."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MomentumTwin(nn.Module):
    """theta_k <- m theta_k + (1 - m) theta_q, for parameters only.

    Buffers are the twin's own: it runs in training mode, so its BatchNorm gathers statistics by itself, as in the
    published code.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)

    @torch.no_grad()
    def update(self, encoder: nn.Module, momentum: float) -> None:
        """One step towards `encoder`; momentum 0 copies its parameters."""
        step = get_ema_multi_avg_fn(momentum)  # all tensors at once
        step(list(self.encoder.parameters()), list(encoder.parameters()), None)

    @torch.no_grad()
    def forward(self, images):
        return self.encoder(images)
