"""How features are distributed on the unit sphere, without labels: alignment, uniformity, effective rank, signs of
collapse.

Shapes: N images, D feature width.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed, metrics
from caco.data.sets.choosing import choose
from caco.equations import rank_me
from caco.evals.base import Evaluator
from caco.evals.extraction import extract, full_float32
from caco.evals.features import FeatureStore
from caco.ranges import Several, held


def alignment(a_ND: Tensor, b_ND: Tensor) -> float:
    """Mean squared distance between the unit features of two views of an image: 0 if they agree, 2 if they are
    unrelated.

    Source: Wang and Isola (arXiv 2005.10242), alpha = 2.
    """
    return (F.normalize(a_ND, dim=1) - F.normalize(b_ND, dim=1)).square().sum(dim=1).mean().item()


@full_float32()
def uniformity(x_ND: Tensor, *, block: int = 1024) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of different images' unit features: 0 if all coincide, about -4
    if they are spread evenly in many dimensions.

    Source: Wang and Isola (arXiv 2005.10242), t = 2.
    """
    x_ND = F.normalize(x_ND, dim=1)
    total = sum(((2 - 2 * (x @ x_ND.T)) * -2).exp().double().sum() for x in x_ND.split(block))
    return ((total - len(x_ND)) / (len(x_ND) * (len(x_ND) - 1))).log().item()


class Geometry(Evaluator):
    """Label-free measures of the features of some of the pre-training images:

    - geometry/alignment: of two augmented views, see `alignment`;
    - geometry/uniformity: see `uniformity`;
    - geometry/rank_me: the effective rank, at most D; geometry/rank_share is rank_me / D;
    - geometry/spread: mean over dimensions of the unit features' standard deviation, times sqrt(D): 1 if the features
      are spread evenly, 0 if they coincide;
    - geometry/mean_cosine: over pairs of different images: 1 if all features point the same way;
    - geometry/dead_dimensions: percent of the dimensions that hardly vary.

    Another number of images appears in the names: geometry_images-512/... (caco/metrics.py).

    Args:
        images: number of images, drawn by the seed; all if there are fewer.
        when: "epoch" (during training and at its end) or "end".
    """

    on_all_ranks = True  # the ranks share the reading of images

    @held
    def __init__(self, *, images: Several = 2048, when: Literal["epoch", "end"] = "end") -> None:
        self.images, self.when = images, when
        self.protocol = metrics.geometry(images=images)

    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Draw the images; no labels are needed."""
        source = store.splits.pretrain
        chosen = choose(None, min(self.images, len(source)), len(source), seed=seed, balanced=False)
        self._store, self._seed = store, seed
        self._source = source.part(chosen, source.name)

    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (`<protocol>/<name>`, number)."""
        store = self._store
        x_ND = store.of(backbone, self._source, store.views)
        if not distributed.is_main():
            return
        x_ND = x_ND.to(torch.float64)
        width = x_ND.shape[1]
        unit_ND = F.normalize(x_ND, dim=1)
        mean_D = unit_ND.mean(dim=0)
        std_D = unit_ND.std(dim=0, correction=0)
        num = len(unit_ND)
        rank = rank_me(x_ND).item()
        if store.views.num_views > 1:
            yield f"{self.protocol}/alignment", alignment(*self._two_views(backbone))
        yield f"{self.protocol}/uniformity", uniformity(x_ND)
        yield f"{self.protocol}/rank_me", rank
        yield f"{self.protocol}/rank_share", rank / width
        yield f"{self.protocol}/spread", std_D.mean().item() * math.sqrt(width)
        yield f"{self.protocol}/mean_cosine", ((num * mean_D.square().sum() - 1) / (num - 1)).item()
        yield f"{self.protocol}/dead_dimensions", 100 * (std_D < 1e-3 / math.sqrt(width)).double().mean().item()

    def _two_views(self, backbone: nn.Module) -> tuple[Tensor, Tensor]:
        """Features of the first two views, [M, D] float64 each; row i of both is of the same image."""
        store = self._store
        batch = min(store.batch, len(self._source))
        loader = store.loader.bind(self._source, store.views, batch=batch, seed=self._seed)
        try:
            # The two views of a batch come one after the other. The last, partial batch of images is left out.
            pieces = ((view, one.index) for one in loader.epoch(0) for view in one.views[:2])
            x_MD, _ = extract(backbone, pieces, device=store.device, precision=store.precision)
        finally:
            loader.close()
        x_SVBD = x_MD.double().view(-1, 2, batch, x_MD.shape[1])
        return x_SVBD[:, 0].flatten(0, 1), x_SVBD[:, 1].flatten(0, 1)
