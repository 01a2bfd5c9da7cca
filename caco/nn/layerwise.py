"""Optimisers whose learning rate adapts to each layer: LARS, for pre-training, and LARC, for SwAV and for linear
evaluations.
"""

from typing import Any

import torch
from torch import Tensor


class LayerWise(torch.optim.Optimizer):
    """SGD with momentum on gradients that are scaled for each parameter tensor: v <- momentum v + g', p <- p - lr v. A
    subclass computes the scaled gradient g'.

    A parameter without a gradient does not move, and its v does not change.

    Args:
        params: parameters or parameter groups, as torch's optimisers take them.
        lr: the learning rate.
        momentum: of v.
        weight_decay: wd in the formulas of the subclasses.
        trust_coefficient: trust in these formulas.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 1e-3,
    ):
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient},
        )

    def scaled(self, p: Tensor, g: Tensor, *, decay: float, trust_coefficient: float) -> Tensor:
        """The scaled gradient g' of a parameter p with gradient g, a new tensor."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # nothing here computes a loss anew
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                scaled = self.scaled(
                    p, p.grad, decay=group["weight_decay"], trust_coefficient=group["trust_coefficient"]
                )
                state = self.state[p]
                if "momentum_buffer" in state:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(scaled)
                else:
                    state["momentum_buffer"] = scaled
                p.sub_(group["lr"] * state["momentum_buffer"])


class LARS(LayerWise):
    """Layer-wise adaptive rates for parameters of more than one dimension: g' = trust |p| / |g + wd p| (g + wd p).

    If one of the two norms is 0, g' = g + wd p. Parameters of one dimension (biases, BatchNorm) have g' = g, without
    weight decay.

    Source: the published code of BYOL, MoCo v3, Barlow Twins, VICReg and DINO, which all do this arithmetic. timm's
    LARS (`lars_timm`) differs in its denominator, |g| + wd |p|; `LARC` also scales parameters of one dimension.
    """

    def scaled(self, p: Tensor, g: Tensor, *, decay: float, trust_coefficient: float) -> Tensor:
        if p.ndim <= 1:
            return g.clone()
        decayed = g + decay * p
        p_norm, norm = p.norm(), decayed.norm()
        return decayed * (trust_coefficient * p_norm / norm).masked_fill(~((p_norm > 0) & (norm > 0)), 1.0)


class LARC(LayerWise):
    """Layer-wise adaptive rates for every parameter, biases and BatchNorm included.

    g' = trust |p| / (|g| + wd |p| + 1e-8) (g + wd p). If |p| or |g| is 0, g' = g, without weight decay.

    Source: NVIDIA apex's LARC with clip=False, as SwAV (arXiv 2006.09882) and SimSiam's linear evaluation take it.
    """

    def scaled(self, p: Tensor, g: Tensor, *, decay: float, trust_coefficient: float) -> Tensor:
        p_norm, g_norm = p.norm(), g.norm()
        trust = trust_coefficient * p_norm / (g_norm + decay * p_norm + 1e-8)
        return torch.where((p_norm != 0) & (g_norm != 0), trust * (g + decay * p), g)
