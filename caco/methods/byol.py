"""BYOL: from one view of an image, predict the momentum twin's embedding of another view (arXiv 2006.07733).

Shapes: B this rank's images, D width of the embedding.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from caco.data.loaders.batches import Batch
from caco.methods.base import Costs, Method, Now, Outputs
from caco.methods.terms import Term, terms_of, weighted_sum
from caco.nn.heads import Encoder, Projector, at_least_float32
from caco.nn.twin import MomentumTwin
from caco.ranges import Share, Width, held
from caco.schedules import RunShape, Table, cosine


class BYOL(Method):
    """Brings the prediction p from one view close to the twin's embedding z' of the other view, both scaled to norm 1.

    L = mean_i |n(p_1) - n(z'_2)|^2 + mean_i |n(p_2) - n(z'_1)|^2 = 4 - 2 cos(p_1, z'_2) - 2 cos(p_2, z'_1), from 0 to
    8, where n(x) = x / sqrt(max(|x|^2, 1e-12)). BYOL itself has no small views; here small views predict the large ones
    and are not predicted themselves.

    The published code also trains a linear classifier on the features, as a part of the same loss but without a
    gradient to the features. Here an evaluator does that (eval=[probe]).

    Args:
        encoder: its projector's output is the predictor's input; the twin's output, which is predicted, is as wide.
        predictor_hidden_dim: width of the predictor's hidden layer.
        predictor_initialisation: of the predictor's linear layers, as in `Projector`.
        momentum, final_momentum: the twin's m at the start and the end of its cosine; the twin moves after the
            optimiser's step.
        twin_initialisation: "random" draws the twin's first parameters anew, as published; "copy" takes the encoder's.
        reduction: of the loss's terms, "sum" as published, or "mean"; see `pair_terms`.

    Source: arXiv 2006.07733.
    """

    against_collapse = "a twin that follows more slowly (method.momentum), a longer warm-up, a lower optimizer.lr"

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        predictor_hidden_dim: Width = 4096,
        predictor_initialisation: Literal["torch", "truncated_normal_fan_in"] = "truncated_normal_fan_in",
        momentum: Share = 0.996,
        final_momentum: Share = 1.0,
        twin_initialisation: Literal["random", "copy"] = "random",
        reduction: Literal["sum", "mean"] = "sum",
    ):
        super().__init__()
        dim = encoder.projector.dim
        self.encoder, self.twin = encoder, MomentumTwin(encoder, initialisation=twin_initialisation)
        self.predictor = Projector(
            in_dim=dim, hidden_dim=predictor_hidden_dim, dim=dim, layers=2, bias=True, last_bias=False,
            initialisation=predictor_initialisation,
        )  # fmt: skip
        self.momentum, self.final_momentum, self.reduction = momentum, final_momentum, reduction

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # as an attribute it would be in the state twice
        return self.encoder.backbone

    def schedules(self, run: RunShape) -> dict[str, Table]:
        return {"twin_momentum": cosine(run, self.momentum, self.final_momentum)}

    def terms(self, sizes: list[int]) -> list[Term]:
        """The loss's terms for views of these sizes in pixels. The large views come first; they are the predicted
        ones.
        """
        return terms_of(sizes, reduction=self.reduction)

    def forward(self, batch: Batch, now: Now) -> Outputs:
        terms = self.terms([view.shape[-1] for view in batch.views])
        z = [self.encoder(view, unit=False) for view in batch.views]
        p = [_unit(self.predictor(z_BD)) for z_BD in z]
        aims = {key: _unit(self.twin(batch.views[key], unit=False)) for key in sorted({term.key for term in terms})}
        distances = [(p[term.query] - aims[term.key]).square().sum(1).mean() for term in terms]
        return Outputs(weighted_sum(terms, distances), {}, z[0])

    def after_step(self, now: Now) -> None:
        self.twin.update(self.encoder, now["twin_momentum"])

    def costs(self, sizes: list[int]) -> Costs:
        terms = self.terms(sizes)
        return Costs(encoded=list(range(len(sizes))), followed=sorted({term.key for term in terms}), terms=len(terms))


def _unit(x_BD: Tensor) -> Tensor:
    return F.normalize(at_least_float32(x_BD), dim=1, eps=1e-6)
