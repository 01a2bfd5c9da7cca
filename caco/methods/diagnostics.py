"""Signs of collapse that every method can log, under one name each; cheap enough for every step.

embedding_spread: see `spread`; of this rank's images.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def spread(z_BD: Tensor) -> Tensor:
    """Standard deviation of unit embeddings, averaged over their coordinates, times sqrt(D): 1 where they are spread evenly, 0 where
    they coincide. As geometry/spread. A scalar without gradient.

    Args:
        z_BD: embeddings of any norm, made unit here.
    """
    return F.normalize(z_BD, dim=1).std(0, correction=0).mean() * math.sqrt(z_BD.shape[1])


def collapse(statistics: Mapping[str, Any], what_helps: str) -> str | None:
    """What an epoch's mean of embedding_spread says of a training that has collapsed; None where nothing is wrong."""
    value = statistics.get("embedding_spread")
    if value is None or value > 0.05:
        return None
    return f"The embedding has collapsed: embedding_spread {value:.3f}, where 1 is even and 0 one point. What helps: {what_helps}."
