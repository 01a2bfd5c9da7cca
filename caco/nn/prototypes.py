"""Prototypes: K learned directions that unit embeddings are compared with. Scores are float32 at least, whatever
autocast says.

Shapes: B embeddings, D their width, K prototypes.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco.errors import UserError


class Prototypes(nn.Module):
    """Scores z C^T of unit embeddings z [B, D]: cosines [B, K] while the rows of C are of unit norm, which `normalise`
    makes them (SwAV).

    Args:
        dim: width D.
        number: K.
    """

    def __init__(self, *, dim: int, number: int):
        super().__init__()
        self.weight = nn.Parameter(_as_linear(dim, number))
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> None:
        """Make the rows unit, in place: no part of what the gradient goes through."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, z_BD: Tensor) -> Tensor:
        return _scores(z_BD, self.weight)


class NormedPrototypes(nn.Module):
    """Scores of unit embeddings [B, D] with rows g v / |v|, through which the gradient goes: weight normalisation
    (DINO).

    Args:
        dim, number: as in `Prototypes`.
        learn_norms: whether each row has a g of its own that learns; else all are 1.
    """

    def __init__(self, *, dim: int, number: int, learn_norms: bool = False):
        super().__init__()
        self.weight = nn.Parameter(_as_linear(dim, number))  # v
        self.norm = nn.Parameter(torch.ones(number, 1)) if learn_norms else None  # g

    def forward(self, z_BD: Tensor) -> Tensor:
        unit_KD = F.normalize(self.weight, dim=1)
        return _scores(z_BD, unit_KD if self.norm is None else self.norm * unit_KD)


def _as_linear(dim: int, number: int) -> Tensor:
    """Random rows [K, D], those of a torch linear layer without bias."""
    if number < 2:
        raise UserError(f"method.num_prototypes must be at least 2; got {number}")
    return nn.Linear(dim, number, bias=False).weight.detach()


def _scores(z_BD: Tensor, weight_KD: Tensor) -> Tensor:
    """Without autocast: a softmax at temperature 0.04 does not survive bf16's eight bits."""
    kind = z_BD.device.type
    with (
        torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    ):  # none for caco.plan's tensors
        return F.linear(z_BD, weight_KD)
