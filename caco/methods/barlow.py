"""Barlow Twins: the coordinates of two views' embeddings agree with themselves and with no other (arXiv 2103.03230).

Shapes: B this rank's images, D width of the embedding.
"""

import torch
from torch import Tensor, nn

from caco import distributed
from caco.data.loaders.batches import Batch
from caco.methods.base import Costs, Method, Needs, Now, Outputs, ParameterGroup
from caco.methods.terms import pairs_of
from caco.nn.heads import Encoder
from caco.ranges import AboveZero, NonNegative, held


class BarlowTwins(Method):
    """The correlations c of the coordinates of one view's embedding with the other's, over all ranks' images, are the
    identity matrix.

    L = sum_d (c_dd - 1)^2 + lambda sum_{d != e} c_de^2, where c is a mean over images of products of coordinates that a
    BatchNorm without scale and shift has made of mean 0 and variance 1. With small views, which Barlow Twins itself has
    not: the mean of L over all pairs of a large view and another.

    The published code adds up c over W ranks without the gradient of the sum, so that it gets 1 / W of the gradient (W
    = 16), to which LARS is blind but for parameters of one dimension and the decay: loss_scale=0.0625 does the same.

    Args:
        encoder: its projector's output is the embedding.
        off_diagonal_weight: lambda.
        loss_scale: a factor on the loss. Other implementations have 0.1, or 0.024 in place of the second rate.
        one_dimensional_rate: a factor on the learning rate of biases and BatchNorm; published 0.0048 of 0.2.
    """

    needs = Needs(whole_batch=True)

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        off_diagonal_weight: NonNegative = 0.0051,
        loss_scale: AboveZero = 1.0,
        one_dimensional_rate: AboveZero = 0.024,
    ):
        super().__init__()
        self.encoder, self.norm = encoder, nn.BatchNorm1d(encoder.projector.dim, affine=False)
        self.off_diagonal_weight, self.loss_scale, self.one_dimensional_rate = (
            off_diagonal_weight,
            loss_scale,
            one_dimensional_rate,
        )

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # the encoder's; an attribute would be a second part of the state
        return self.encoder.backbone

    def parameter_groups(self) -> list[ParameterGroup]:
        """Weights, and parameters of one dimension at a rate of their own."""
        learning = [p for p in self.encoder.parameters() if p.requires_grad]
        return [
            ParameterGroup([p for p in learning if p.ndim > 1]),
            ParameterGroup([p for p in learning if p.ndim <= 1], rate=self.one_dimensional_rate),
        ]

    def forward(self, batch: Batch, now: Now) -> Outputs:
        projected = [self.encoder(view, unit=False) for view in batch.views]
        with torch.autocast(projected[0].device.type, enabled=False):
            z = [self.norm(x_BD) for x_BD in projected]
            parts = [self._terms(z[a], z[b]) for a, b in pairs_of([view.shape[-1] for view in batch.views])]
        invariance, redundancy = (torch.stack(part).mean() for part in zip(*parts, strict=True))
        metrics = {"invariance": invariance.detach(), "redundancy": redundancy.detach()}
        loss = self.loss_scale * (invariance + self.off_diagonal_weight * redundancy)
        return Outputs(loss, metrics, projected[0])

    @staticmethod
    def _terms(z_BD: Tensor, other_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Of the diagonal and of the rest of c; the same on every rank."""
        c_DD = distributed.sum_for_all(z_BD.T @ other_BD / (len(z_BD) * distributed.world()))
        return (c_DD.diagonal() - 1).square().sum(), off_diagonal(c_DD).square().sum()

    def costs(self, sizes: list[int]) -> Costs:
        """The ranks add up c."""
        pairs = len(pairs_of(sizes))
        return Costs(
            encoded=list(range(len(sizes))), matrices=pairs, summed_bytes=4 * pairs * self.norm.num_features**2
        )


def off_diagonal(x_DD: Tensor) -> Tensor:
    """All but the diagonal, [D - 1, D], without a copy: behind its first element a matrix is rows of D elements and one
    of the diagonal.
    """
    dim = len(x_DD)
    return x_DD.flatten()[1:].view(dim - 1, dim + 1)[:, :-1]
