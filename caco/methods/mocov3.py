"""MoCo v3: among the keys of a batch's images, find the key of the same image's other view (arXiv 2104.02057).

Shapes: B this rank's images, G all ranks' images, D width of the embedding.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed
from caco.data.loaders.batches import Batch
from caco.data.loaders.images import Images
from caco.methods.base import Costs, Method, Needs, Now, Outputs
from caco.methods.terms import Term, terms_of, weighted_sum
from caco.nn.heads import Encoder, Projector, at_least_float32
from caco.nn.twin import MomentumTwin
from caco.ranges import AboveZero, Share, Width, held
from caco.schedules import RunShape, Table, cosine


class MoCoV3(Method):
    """For the prediction q from a view, the twin's key k of the image's other view is the positive, and the keys of the
    other images are the negatives.

    L = 2 tau CE(n(q_1) n(k_2)^T / tau) + 2 tau CE(n(q_2) n(k_1)^T / tau), over the keys of all ranks, where n(x) = x /
    |x|. MoCo v3 itself has no small views; here small views query too, but give no keys.

    Args:
        encoder: its projector's output is the predictor's input.
        temperature: tau; 1.0 for ResNets, 0.2 for ViTs.
        predictor_hidden_dim: width of the predictor's hidden layer.
        predictor_last_batch_norm: whether a BatchNorm without scale and shift ends the predictor: yes for ViTs, no for
            ResNets.
        momentum, final_momentum: the twin's m at the start and the end of its cosine; the twin moves before it computes
            the keys.
        reduction: of the loss's terms, "sum" as published, or "mean"; see `pair_terms`.

    Source: arXiv 2104.02057.
    """

    needs = Needs(whole_batch=True)

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        temperature: AboveZero = 1.0,
        predictor_hidden_dim: Width = 4096,
        predictor_last_batch_norm: bool = False,
        momentum: Share = 0.99,
        final_momentum: Share = 1.0,
        reduction: Literal["sum", "mean"] = "sum",
    ):
        super().__init__()
        dim = encoder.projector.dim
        self.encoder, self.twin = encoder, MomentumTwin(encoder)
        self.predictor = Projector(
            in_dim=dim, hidden_dim=predictor_hidden_dim, dim=dim, layers=2,
            last_batch_norm=predictor_last_batch_norm, last_affine=not predictor_last_batch_norm,
        )  # fmt: skip
        self.temperature, self.momentum, self.final_momentum, self.reduction = (
            temperature,
            momentum,
            final_momentum,
            reduction,
        )

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # as an attribute it would be in the state twice
        return self.encoder.backbone

    def schedules(self, run: RunShape) -> dict[str, Table]:
        return {"twin_momentum": cosine(run, self.momentum, self.final_momentum)}

    def before_step(self, now: Now, images: Images) -> None:
        self.twin.update(self.encoder, now["twin_momentum"])

    def terms(self, sizes: list[int]) -> list[Term]:
        """The loss's terms for views of these sizes in pixels. The large views come first; they give the keys."""
        return terms_of(sizes, reduction=self.reduction)

    def forward(self, batch: Batch, now: Now) -> Outputs:
        terms = self.terms([view.shape[-1] for view in batch.views])
        z = [self.encoder(view, unit=False) for view in batch.views]
        q = [F.normalize(at_least_float32(self.predictor(z_BD)), dim=1) for z_BD in z]
        keys = {key: distributed.gather(self.twin(batch.views[key])) for key in sorted({term.key for term in terms})}
        losses = [self._loss(q[term.query], keys[term.key]) for term in terms]
        loss = 2 * self.temperature * weighted_sum(terms, [loss_B.mean() for loss_B in losses])
        probability = (-torch.stack(losses).detach()).exp().mean()
        return Outputs(loss, {"positive_probability": probability}, z[0])

    def _loss(self, q_BD: Tensor, k_GD: Tensor) -> Tensor:
        """The cross entropy, [B], of finding the key of each query's own image among all ranks' keys."""
        own_B = torch.arange(len(q_BD), device=q_BD.device) + distributed.rank() * len(q_BD)
        with torch.autocast(q_BD.device.type, enabled=False):
            return F.cross_entropy(q_BD @ k_GD.T / self.temperature, own_B, reduction="none")

    def costs(self, sizes: list[int]) -> Costs:
        terms = self.terms(sizes)
        keys = sorted({term.key for term in terms})
        return Costs(
            encoded=list(range(len(sizes))), followed=keys, terms=len(terms), columns_per_image=1, gathers=len(keys)
        )  # fmt: skip
