"""MoCo v3: among a batch's images, find the one whose other view a momentum twin has embedded (arXiv 2104.02057).

Shapes: B this rank's images, G all ranks', D width of the embedding.
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
    """A view's prediction q has the twin's key k of the image's other view as its positive and the other images' as its
    negatives.

    L = 2 tau CE(n(q_1) n(k_2)^T / tau) + 2 tau CE(n(q_2) n(k_1)^T / tau), over the keys of all ranks. Small views query
    too and are no keys; MoCo v3 itself has none.

    Args:
        encoder: its projector's output is what the predictor takes.
        temperature: tau; 1.0 for ResNets, 0.2 for ViTs.
        predictor_hidden_dim: width of the predictor's hidden layer.
        predictor_last_batch_norm: whether a BatchNorm without scale and shift ends the predictor: for ViTs, not for
            ResNets.
        momentum, final_momentum: the twin's m at the start and the end of its cosine; it moves before the keys are
            computed.
        reduction: of the terms, "sum" as published, or "mean"; see `pair_terms`.
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
    def backbone(self) -> nn.Module:  # type: ignore[override] # the encoder's; an attribute would be a second part of the state
        return self.encoder.backbone

    def schedules(self, run: RunShape) -> dict[str, Table]:
        return {"twin_momentum": cosine(run, self.momentum, self.final_momentum)}

    def before_step(self, now: Now, images: Images) -> None:
        self.twin.update(self.encoder, now["twin_momentum"])

    def terms(self, sizes: list[int]) -> list[Term]:
        """Of the loss on views of these sizes; the large ones come first and are the keys."""
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
        """Cross entropy [B] of finding the own image's key."""
        own_B = torch.arange(len(q_BD), device=q_BD.device) + distributed.rank() * len(q_BD)
        with torch.autocast(q_BD.device.type, enabled=False):
            return F.cross_entropy(q_BD @ k_GD.T / self.temperature, own_B, reduction="none")

    def costs(self, sizes: list[int]) -> Costs:
        terms = self.terms(sizes)
        keys = sorted({term.key for term in terms})
        return Costs(
            encoded=list(range(len(sizes))), followed=keys, terms=len(terms), columns_per_image=1, gathers=len(keys)
        )  # fmt: skip
