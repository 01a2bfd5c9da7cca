"""NNCLR as published, with a predictor and without a momentum encoder: positives are nearest neighbours from a queue
(arXiv 2104.14548).

Shapes: B this rank's images, D width of the embedding.
"""

import dataclasses

from torch import Tensor
from torch.nn import functional as F

from caco import distributed
from caco.banks.base import Bank
from caco.methods.base import Costs, Outputs
from caco.methods.contrast import contrast, weighted
from caco.methods.contrastive import Contrastive
from caco.methods.sources import BatchKeys, NearestKey, Positive, Step
from caco.methods.treatments import Treatment
from caco.nn.heads import Encoder, Projector, at_least_float32
from caco.ranges import AboveZero, Natural, Width, held


class NNCLR(Contrastive):
    """The past embedding nn(z_i, Q) that is nearest to one view's embedding z_i has to identify the prediction p_i from
    the image's other view among the predictions from all images of the batch.

    L = -log [ exp(nn(z_i, Q) . p_i / tau) / sum_k exp(nn(z_i, Q) . p_k / tau) ], averaged over both directions. Small
    views give predictions only. The predictor takes z before its norm is scaled to 1. The queue takes the first view's
    embeddings.

    Args:
        encoder, bank: as in `Contrastive`; the bank is the queue Q.
        predictor_hidden_dim: width of the predictor's hidden layer.
        treatment: as in `Contrastive`; the negatives are the predictions from other images.
        temperature: tau.
        warm_start_temperature, warm_start_steps, warm_start_passes: as in `Contrastive`; the warm start does not train
            the predictor.

    Source: arXiv 2104.14548.
    """

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        bank: Bank,
        predictor_hidden_dim: Width = 4096,
        treatment: Treatment | None = None,
        temperature: AboveZero = 0.1,
        warm_start_temperature: AboveZero = 0.2,
        warm_start_steps: Natural | None = None,
        warm_start_passes: Natural | None = None,
    ):
        super().__init__(
            encoder=encoder,
            bank=bank,
            positives=NearestKey(),
            negatives=BatchKeys(),
            treatment=treatment,
            temperature=temperature,
            momentum=None,
            reduction="mean",
            warm_start_temperature=warm_start_temperature,
            warm_start_steps=warm_start_steps,
            warm_start_passes=warm_start_passes,
        )
        dim = encoder.projector.dim
        self.predictor = Projector(in_dim=dim, hidden_dim=predictor_hidden_dim, dim=dim, layers=2, bias=True)

    def loss(self, views: list[Tensor], step: Step | None = None) -> Outputs:
        """The loss of one batch of views, each [B, 3, H, W], the large ones first."""
        terms = self.terms([view.shape[-1] for view in views])
        projected = [self.encoder(view, unit=False) for view in views]
        p = [F.normalize(at_least_float32(self.predictor(x_BD)), dim=1) for x_BD in projected]
        z = [F.normalize(x_BD.detach(), dim=1) for x_BD in projected]
        everyone = [distributed.gather_with_gradient(p_BD) for p_BD in p]
        neighbours = {view: one for view, [one] in self.positives_of(dict(enumerate(z)), terms).items()}
        # The neighbour is the query and the predictions are the keys: the prediction from the same image is the
        # positive, the predictions from other images are the negatives.
        score = contrast(
            [vector_BD for term in terms if (vector_BD := neighbours[term.key].vector_BD) is not None],
            [everyone[term.query] for term in terms],
            [Positive(p[term.query]) for term in terms], self.negatives, None, self.temperature,
            treatment=self.treatment, step=step,
        )  # fmt: skip
        self.keys.append([distributed.gather(z[0])])
        return Outputs(weighted(score, terms), {"positive_probability": (-score.loss_B.detach()).exp().mean()}, z[0])

    def costs(self, sizes: list[int]) -> Costs:
        """As of `Contrastive`, but the predictions from every view are gathered, and the first view's embeddings for
        the queue.
        """
        return dataclasses.replace(super().costs(sizes), gathers=len(sizes) + 1, gathers_with_gradient=len(sizes))
