"""VICReg: the embeddings of two views are near each other, each coordinate varies over the images, and no two
coordinates vary together (arXiv 2105.04906).

Shapes: B this rank's images, D width of the embedding, V views.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed
from caco.data.loaders.batches import Batch
from caco.methods.barlow import off_diagonal
from caco.methods.base import Costs, Method, Needs, Now, Outputs
from caco.methods.terms import pairs_of
from caco.nn.heads import Encoder
from caco.ranges import NonNegative, held


class VICReg(Method):
    """Trains embeddings by their invariance, variance and covariance, without normalising or predicting them, and
    without a momentum twin or negatives.

    L = 25 mean (x - y)^2 + 25 [ mean_d max(0, 1 - sd(x_d)) + mean_d max(0, 1 - sd(y_d)) ] / 2
        + [ sum_{d != e} Cov(x)_de^2 + sum_{d != e} Cov(y)_de^2 ] / D,
    where x and y are the embeddings of the two views, sd^2 = variance + 1e-4, and variance and Cov divide by one less
    than the number of all ranks' images. VICReg itself has no small views. With small views, the first term is the mean
    over all pairs of a large view and another view, the second the mean over all views, and the third twice the mean
    over all views; for two views this is the formula above.

    Args:
        encoder: its projector's output is the embedding.
        invariance_weight, variance_weight, covariance_weight: factors of the three terms; 25, 25 and 1 in the formula.

    Source: arXiv 2105.04906.
    """

    needs = Needs(whole_batch=True)

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        invariance_weight: NonNegative = 25.0,
        variance_weight: NonNegative = 25.0,
        covariance_weight: NonNegative = 1.0,
    ):
        super().__init__()
        self.weights = {"invariance": invariance_weight, "variance": variance_weight, "covariance": covariance_weight}
        self.encoder = encoder

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # as an attribute it would be in the state twice
        return self.encoder.backbone

    def forward(self, batch: Batch, now: Now) -> Outputs:
        x = [self.encoder(view, unit=False) for view in batch.views]
        pairs = pairs_of([view.shape[-1] for view in batch.views])
        with torch.autocast(x[0].device.type, enabled=False):
            covariances = [_covariance(x_BD) for x_BD in x]
        deviations = [(cov_DD.diagonal() + 1e-4).sqrt() for cov_DD in covariances]
        terms = {
            "invariance": torch.stack([F.mse_loss(x[a], x[b]) for a, b in pairs]).mean(),
            "variance": torch.stack([F.relu(1 - sd_D).mean() for sd_D in deviations]).mean(),
            "covariance": (
                2 * torch.stack([off_diagonal(cov_DD).square().sum() / len(cov_DD) for cov_DD in covariances]).mean()
            ),
        }
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return Outputs(loss, {name: term.detach() for name, term in terms.items()}, x[0])

    def costs(self, sizes: list[int]) -> Costs:
        """The ranks sum the means, with gradient, and the covariances."""
        views, dim = len(sizes), self.encoder.projector.dim
        return Costs(encoded=list(range(views)), matrices=views, summed_bytes=4 * views * (dim**2 + 2 * dim))


def _covariance(x_BD: Tensor) -> Tensor:
    """The unbiased covariance matrix of the coordinates over all ranks' images, [D, D], the same on every rank. A
    collective.
    """
    num_images = len(x_BD) * distributed.world()
    centred_BD = x_BD - distributed.sum_with_gradient(x_BD.sum(0)) / num_images
    return distributed.sum_for_all(centred_BD.T @ centred_BD / (num_images - 1))
