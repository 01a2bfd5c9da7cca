"""Signs of collapse, under one name each for all methods: measured on the embeddings that a method hands out
(`Outputs.embedding`).

    embedding_spread    at every step, of this rank's images: a pass over [B, D]
    embedding_rank_me   at the end of every epoch, of up to 512 images of its last step, from all ranks alike: the
                        eigenvalues of a matrix that is at most 512 x 512, for one core a millisecond where D is
                        64 and a tenth of a second where it is 8192

Methods with prototypes log how these are used besides (`assignments.use_statistics`).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from caco import distributed

MOST_ROWS = 512


@torch.no_grad()
def spread(z_BD: Tensor) -> Tensor:
    """Standard deviation of unit embeddings, averaged over their coordinates, times sqrt(D): 1 where they are spread
    evenly, 0 where they coincide. As geometry/spread. A scalar without gradient.

    Args:
        z_BD: embeddings of any norm, made unit here.
    """
    return F.normalize(z_BD, dim=1).std(0, correction=0).mean() * math.sqrt(z_BD.shape[1])


@torch.no_grad()
def rank_me(z_ND: Tensor) -> float:
    """`equations.rank_me` of unit embeddings, from 1, where they coincide, to min(N, D), where they fill all directions
    alike.

    By way of the smaller of the products z z^T and z^T z, whose eigenvalues are the singular values' squares.

    Args:
        z_ND: embeddings of any norm, made unit here.
    """
    z_ND = F.normalize(z_ND.double(), dim=1)
    product = z_ND @ z_ND.T if len(z_ND) < z_ND.shape[1] else z_ND.T @ z_ND
    value_R = torch.linalg.eigvalsh(product).clamp_min(0).sqrt()  # rounding makes some of the zeros negative
    share_R = value_R / value_R.sum() + 1e-7
    return torch.special.entr(share_R).sum().exp().item()


class Signs:
    """What the Trainer logs of any method's embeddings."""

    def __init__(self) -> None:
        self.newest: Tensor | None = None  # [N, D] of the last step

    def of_step(self, embedding_BD: Tensor | None) -> dict[str, Tensor]:
        """Scalars of a step; none for a method that hands out no embedding."""
        if embedding_BD is None:
            self.newest = None
            return {}
        z_BD = embedding_BD.detach()
        self.newest = z_BD[: max(1, MOST_ROWS // distributed.world())].clone()
        return {"embedding_spread": spread(z_BD)}

    def of_epoch(self) -> dict[str, float]:
        """Of the step just made. A collective."""
        if self.newest is None:
            return {}
        z_ND = distributed.gather(self.newest)
        return {"embedding_rank_me": rank_me(z_ND)} if z_ND.isfinite().all() else {}


def collapse(statistics: Mapping[str, Any], what_helps: str) -> str | None:
    """What an epoch's mean of embedding_spread says of a training that has collapsed; None where nothing is wrong."""
    value = statistics.get("embedding_spread")
    if value is None or value > 0.05:
        return None
    return (
        f"The embedding has collapsed: embedding_spread {value:.3f}, where 1 is even and 0 one point. What helps:"
        f" {what_helps}."
    )
