"""Signs of collapse, measured on the embeddings that a method returns (`Outputs.embedding`) and logged under the same
names for all methods:

    embedding_spread    at every step, of this rank's images; it costs one pass over [B, D]
    embedding_rank_me   at the end of every epoch, of up to 512 images of the last step, equally many from each rank; it
                        costs the eigenvalues of a matrix of at most 512 x 512: on one core a millisecond for D = 64,
                        and a tenth of a second for D = 8192

Methods with prototypes also log how these are used (`assignments.use_statistics`).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from caco import distributed

MOST_ROWS = 512  # images of all ranks that `rank_me` is computed from


@torch.no_grad()
def spread(z_BD: Tensor) -> Tensor:
    """The standard deviation of unit embeddings, averaged over their coordinates, times sqrt(D): 1 if they are spread
    evenly over the sphere, 0 if they coincide. The evaluator's geometry/spread is the same quantity. A scalar without
    gradient.

    Args:
        z_BD: embeddings of any norm; they are normalised here.
    """
    return F.normalize(z_BD, dim=1).std(0, correction=0).mean() * math.sqrt(z_BD.shape[1])


@torch.no_grad()
def rank_me(z_ND: Tensor) -> float:
    """`equations.rank_me` of unit embeddings: 1 if they coincide, up to min(N, D) if they fill all directions evenly.

    It is computed from the smaller of the products z z^T and z^T z, whose eigenvalues are the squares of the singular
    values.

    Source: RankMe (arXiv 2210.02885), Eq. 1.
    Args:
        z_ND: embeddings of any norm; they are normalised here.
    """
    z_ND = F.normalize(z_ND.double(), dim=1)
    product = z_ND @ z_ND.T if len(z_ND) < z_ND.shape[1] else z_ND.T @ z_ND
    value_R = torch.linalg.eigvalsh(product).clamp_min(0).sqrt()  # rounding makes some of the zeros negative
    share_R = value_R / value_R.sum() + 1e-7
    return torch.special.entr(share_R).sum().exp().item()


class Signs:
    """The signs of collapse that the Trainer logs for any method."""

    def __init__(self) -> None:
        self.newest: Tensor | None = None  # [N, D], embeddings of the last step

    def of_step(self, embedding_BD: Tensor | None) -> dict[str, Tensor]:
        """The signs that are logged at every step, as scalars; empty for a method that returns no embedding."""
        if embedding_BD is None:
            self.newest = None
            return {}
        z_BD = embedding_BD.detach()
        self.newest = z_BD[: max(1, MOST_ROWS // distributed.world())].clone()
        return {"embedding_spread": spread(z_BD)}

    def of_epoch(self) -> dict[str, float]:
        """The signs that are logged once an epoch, computed from its last step; empty if an embedding of that step is
        not finite or there is none. A collective.
        """
        if self.newest is None:
            return {}
        z_ND = distributed.gather(self.newest)
        return {"embedding_rank_me": rank_me(z_ND)} if z_ND.isfinite().all() else {}


def collapse(statistics: Mapping[str, Any], what_helps: str) -> str | None:
    """A warning, with remedies, if an epoch's mean of embedding_spread shows that the embedding has collapsed; None
    where nothing is wrong.
    """
    value = statistics.get("embedding_spread")
    if value is None or value > 0.05:
        return None
    return (
        f"The embedding has collapsed: embedding_spread {value:.3f}, where 1 is even and 0 one point. What helps:"
        f" {what_helps}."
    )
