"""Barlow Twins: over the images, each coordinate of one view's embedding correlates with the same coordinate of the
other view's and with no other coordinate (arXiv 2103.03230).

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
    """Makes the correlation matrix c, of the coordinates of one view's embedding with those of the other's over all
    ranks' images, the identity matrix.

    L = sum_d (c_dd - 1)^2 + lambda sum_{d != e} c_de^2, where c_de is the mean over the images of the product of two
    coordinates, each brought to mean 0 and variance 1 by a BatchNorm without scale and shift. Barlow Twins itself has
    no small views; with small views the loss is the mean of L over all pairs of a large view and another view.

    The published code sums c over W = 16 ranks without the gradient of that sum, and so gets 1 / W of the gradient.
    LARS is invariant to that factor, except for parameters of one dimension and for the weight decay. loss_scale=0.0625
    has the same effect.

    Args:
        encoder: its projector's output is the embedding.
        off_diagonal_weight: lambda.
        loss_scale: a factor on the loss. Other implementations have 0.1, or 0.024 in place of the second rate.
        one_dimensional_rate: a factor on the learning rate of biases and BatchNorm parameters; published are 0.0048 for
            these and 0.2 for the weights.

    Source: arXiv 2103.03230.
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
    def backbone(self) -> nn.Module:  # type: ignore[override] # as an attribute it would be in the state twice
        return self.encoder.backbone

    def parameter_groups(self) -> list[ParameterGroup]:
        """Two groups: the weights, and the parameters of one dimension, which have a learning rate of their own."""
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
        """The sums of squares of c's diagonal minus 1 and of c's other elements; the same on every rank. A
        collective.
        """
        c_DD = distributed.sum_for_all(z_BD.T @ other_BD / (len(z_BD) * distributed.world()))
        return (c_DD.diagonal() - 1).square().sum(), off_diagonal(c_DD).square().sum()

    def costs(self, sizes: list[int]) -> Costs:
        """The bytes to sum over the ranks are those of c, D x D for each pair of views."""
        pairs = len(pairs_of(sizes))
        return Costs(
            encoded=list(range(len(sizes))), matrices=pairs, summed_bytes=4 * pairs * self.norm.num_features**2
        )


def off_diagonal(x_DD: Tensor) -> Tensor:
    """All elements of a square matrix except its diagonal, [D - 1, D], without a copy. After its first element the
    matrix is D - 1 times D elements off the diagonal followed by one of the diagonal.
    """
    dim = len(x_DD)
    return x_DD.flatten()[1:].view(dim - 1, dim + 1)[:, :-1]
