"""SimSiam: from one view of an image, predict the embedding of another, without twin or negatives (arXiv 2011.10566).

Shapes: B this rank's images, D width of the embedding.
"""

from typing import Literal

from torch import nn
from torch.nn import functional as F

from caco.data.loaders.batches import Batch
from caco.methods.base import Costs, Method, Now, Outputs, ParameterGroup
from caco.methods.terms import Term, terms_of, weighted_sum
from caco.nn.heads import Encoder, Projector, at_least_float32
from caco.ranges import Width, held
from caco.schedules import RunShape, Table, constant


class SimSiam(Method):
    """The prediction p of one view points where the other's embedding z does, through which no gradient goes.

    L = -1/2 [ mean_i cos(p_1, z_2) + mean_i cos(p_2, z_1) ], from -1 to 1. Small views predict too and are not
    predicted; SimSiam itself has none.

    Args:
        encoder: its projector's output is z.
        predictor_hidden_dim: width of the predictor's hidden layer, narrower than the embedding.
        constant_predictor_rate: whether the predictor keeps the learning rate of the start while the encoder's falls.
            The published 68.1 needs it; without it 67.7.
        reduction: of the terms, "mean" as published, or "sum"; see `pair_terms`.
    """

    against_collapse = "BatchNorm at the projector's end (projector.last_batch_norm=true), a lower optimizer.lr"

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        predictor_hidden_dim: Width = 512,
        constant_predictor_rate: bool = True,
        reduction: Literal["sum", "mean"] = "mean",
    ):
        super().__init__()
        dim = encoder.projector.dim
        self.encoder = encoder
        self.predictor = Projector(in_dim=dim, hidden_dim=predictor_hidden_dim, dim=dim, layers=2, last_bias=True)
        self.constant_predictor_rate, self.reduction = constant_predictor_rate, reduction

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # the encoder's; an attribute would be a second part of the state
        return self.encoder.backbone

    def schedules(self, run: RunShape) -> dict[str, Table]:
        return {"predictor_rate": constant(run, 1.0)} if self.constant_predictor_rate else {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The encoder, and the predictor, which may have a rate of its own."""
        return [
            ParameterGroup([p for p in self.encoder.parameters() if p.requires_grad]),
            ParameterGroup(
                list(self.predictor.parameters()), rate="predictor_rate" if self.constant_predictor_rate else 1.0
            ),
        ]

    def terms(self, sizes: list[int]) -> list[Term]:
        """Of the loss on views of these sizes; the large ones come first and are predicted."""
        return terms_of(sizes, reduction=self.reduction)

    def forward(self, batch: Batch, now: Now) -> Outputs:
        z = [self.encoder(view, unit=False) for view in batch.views]
        p = [at_least_float32(self.predictor(z_BD)) for z_BD in z]
        terms = self.terms([view.shape[-1] for view in batch.views])
        cosines = [F.cosine_similarity(p[term.query], z[term.key].detach(), dim=1, eps=1e-8).mean() for term in terms]
        return Outputs(-weighted_sum(terms, cosines), {}, z[0])

    def costs(self, sizes: list[int]) -> Costs:
        return Costs(encoded=list(range(len(sizes))), terms=len(self.terms(sizes)))
