"""SimSiam: from one view of an image, predict the embedding of another view, without a momentum twin and without
negatives (arXiv 2011.10566).

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
    """Makes the prediction p from one view point in the same direction as the embedding z of the other view. No
    gradient flows through z.

    L = -1/2 [ mean_i cos(p_1, z_2) + mean_i cos(p_2, z_1) ], from -1 to 1. SimSiam itself has no small views; here
    small views predict the large ones and are not predicted themselves.

    Args:
        encoder: its projector's output is z.
        predictor_hidden_dim: width of the predictor's hidden layer, narrower than the embedding.
        constant_predictor_rate: whether the predictor keeps its initial learning rate while the encoder's falls. The
            published top-1 of 68.1 was measured with it; 67.7 without.
        reduction: of the loss's terms, "mean" as published, or "sum"; see `pair_terms`.

    Source: arXiv 2011.10566, Eq. 4.
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
    def backbone(self) -> nn.Module:  # type: ignore[override] # as an attribute it would be in the state twice
        return self.encoder.backbone

    def schedules(self, run: RunShape) -> dict[str, Table]:
        return {"predictor_rate": constant(run, 1.0)} if self.constant_predictor_rate else {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """Two groups: the encoder, and the predictor, which may have a learning rate of its own."""
        return [
            ParameterGroup([p for p in self.encoder.parameters() if p.requires_grad]),
            ParameterGroup(
                list(self.predictor.parameters()), rate="predictor_rate" if self.constant_predictor_rate else 1.0
            ),
        ]

    def terms(self, sizes: list[int]) -> list[Term]:
        """The loss's terms for views of these sizes in pixels. The large views come first; they are the predicted
        ones.
        """
        return terms_of(sizes, reduction=self.reduction)

    def forward(self, batch: Batch, now: Now) -> Outputs:
        z = [self.encoder(view, unit=False) for view in batch.views]
        p = [at_least_float32(self.predictor(z_BD)) for z_BD in z]
        terms = self.terms([view.shape[-1] for view in batch.views])
        cosines = [F.cosine_similarity(p[term.query], z[term.key].detach(), dim=1, eps=1e-8).mean() for term in terms]
        return Outputs(-weighted_sum(terms, cosines), {}, z[0])

    def costs(self, sizes: list[int]) -> Costs:
        return Costs(encoded=list(range(len(sizes))), terms=len(self.terms(sizes)))
