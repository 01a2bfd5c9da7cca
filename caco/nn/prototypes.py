"""Prototypes: K learned directions that unit embeddings are compared with. Scores are computed without autocast, in the
embeddings' own precision, float32 or higher.

Shapes: B embeddings, D their width, K prototypes.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco.errors import UserError


class Prototypes(nn.Module):
    """Scores z C^T, [B, K], of unit embeddings z, [B, D], with learned prototypes C, [K, D] (SwAV). They are cosines as
    long as the rows of C have norm 1, to which `normalise` scales them.

    Args:
        dim: width D.
        number: K.
    Raises:
        UserError: fewer than 2 prototypes.
    """

    def __init__(self, *, dim: int, number: int):
        super().__init__()
        self.weight = nn.Parameter(_as_linear(dim, number))
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> None:
        """Scale the rows to norm 1, in place. No gradient flows through this."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, z_BD: Tensor) -> Tensor:
        return _scores(z_BD, self.weight)


class NormedPrototypes(nn.Module):
    """Scores, [B, K], of unit embeddings, [B, D], with prototypes under weight normalisation: each row is g v / |v|,
    and the gradient flows through the normalisation (DINO).

    Args:
        dim, number: as in `Prototypes`.
        learn_norms: whether each row has a learned g of its own; if not, every g is 1.
    """

    def __init__(self, *, dim: int, number: int, learn_norms: bool = False):
        super().__init__()
        self.weight = nn.Parameter(_as_linear(dim, number))  # v
        self.norm = nn.Parameter(torch.ones(number, 1)) if learn_norms else None  # g

    def forward(self, z_BD: Tensor) -> Tensor:
        unit_KD = F.normalize(self.weight, dim=1)
        return _scores(z_BD, unit_KD if self.norm is None else self.norm * unit_KD)


def _as_linear(dim: int, number: int) -> Tensor:
    """Random rows [K, D], initialised as the weights of a torch linear layer."""
    if number < 2:
        raise UserError(f"method.num_prototypes must be at least 2; got {number}")
    return nn.Linear(dim, number, bias=False).weight.detach()


def _scores(z_BD: Tensor, weight_KD: Tensor) -> Tensor:
    """Scores [B, K], computed without autocast: bf16's eight bits are too coarse for a softmax at temperature 0.04."""
    kind = z_BD.device.type
    with (
        torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    ):  # the tensors of caco.plan, which have no contents, have no autocast
        return F.linear(z_BD, weight_KD)
