"""InfoMin: MoCo v2 with a second query for each image, the embedding of its shuffled patches (arXiv 2005.10243).

Shapes: B this rank's images, G all ranks' images, P patches, F features, D width of the embedding.
"""

import dataclasses

from torch import nn
from torch.nn import functional as F

from caco.banks.base import Bank
from caco.data.loaders.batches import Batch
from caco.data.loaders.images import Images
from caco.methods.base import Costs, Needs, Now, Outputs
from caco.methods.contrast import contrast, weighted
from caco.methods.contrastive import WARM_START, Contrastive
from caco.methods.sources import Negatives, Positives
from caco.nn.backbones import feature_width
from caco.nn.heads import Encoder, JigsawHead, at_least_float32
from caco.ranges import AboveZero, Count, Natural, Share, Width, held


class InfoMin(Contrastive):
    """Two queries look for the key of view 2 among the negatives: the embedding of view 1, and the embedding of the
    image's patches, which has a head of its own.

    L = (1 - w) CE(q) + w CE(q_jigsaw), both with the same key and negatives. The twin moves after the optimiser's step,
    as in the published code (MoCo's twin moves before it computes the keys). It has no jigsaw head.

    Args:
        encoder, bank, positives, negatives: as in `Contrastive`; the publication takes the other view as positive and a
            queue.
        temperature: tau of the loss.
        momentum, final_momentum: the twin's m at the start and the end of its cosine.
        jigsaw_weight: w.
        jigsaw_hidden_dim: width of the hidden layer that each patch's features go through.
        num_patches: P.
        warm_start_temperature, warm_start_momentum, warm_start_steps, warm_start_passes: as in `Contrastive`; the
            warm start does not use the patches.

    Source: arXiv 2005.10243; published code, PyContrast.
    """

    needs = Needs(patches="shuffled")

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        bank: Bank | None = None,
        positives: Positives,
        negatives: Negatives,
        temperature: AboveZero = 0.15,
        momentum: Share = 0.999,
        final_momentum: Share = 0.999,
        jigsaw_weight: Share = 0.5,
        jigsaw_hidden_dim: Width = 2048,
        num_patches: Count = 9,
        warm_start_temperature: AboveZero = 0.2,
        warm_start_momentum: Share = 0.999,
        warm_start_steps: Natural | None = None,
        warm_start_passes: Natural | None = None,
    ):
        super().__init__(
            encoder=encoder,
            bank=bank,
            positives=positives,
            negatives=negatives,
            temperature=temperature,
            momentum=momentum,
            final_momentum=final_momentum,
            symmetric=False,
            reduction="mean",
            warm_start_temperature=warm_start_temperature,
            warm_start_momentum=warm_start_momentum,
            warm_start_steps=warm_start_steps,
            warm_start_passes=warm_start_passes,
        )
        self.jigsaw = JigsawHead(
            in_dim=feature_width(encoder.backbone),
            hidden_dim=jigsaw_hidden_dim,
            dim=encoder.projector.dim,
            num_patches=num_patches,
        )
        self.jigsaw_weight = jigsaw_weight
        self.needs = dataclasses.replace(self.needs, num_patches=num_patches)

    def before_step(self, now: Now, images: Images) -> None:
        """Does nothing: this method's twin moves in `after_step`."""

    def forward(self, batch: Batch, now: Now) -> Outputs:
        if now.phase == WARM_START:
            return self.warm_start_loss(batch.views)
        assert batch.patches is not None, "needs"
        q, k, all_k, terms = self.encode(batch.views)
        jigsaw_BD = F.normalize(at_least_float32(self.jigsaw(self.backbone(batch.patches.flatten(0, 1)))), dim=1)
        positives, key = {view: one for view, [one] in self.positives_of(k, terms).items()}, terms[0].key
        keys = [term.key for term in terms] + [key]
        score = contrast(
            [q[term.query] for term in terms] + [jigsaw_BD], [all_k[key] for key in keys],
            [positives[key] for key in keys],
            self.negatives, self.bank, self.temperature,
        )  # fmt: skip
        self.keys.append([all_k[view].detach() for view in sorted(positives)])
        of_views, of_patches = (
            type(score)(*(values[part] for values in score)) for part in (slice(-1), slice(-1, None))
        )
        w = self.jigsaw_weight
        loss = (1 - w) * weighted(of_views, terms) + w * of_patches.loss_B.mean()
        probabilities = {"positive_probability": of_views, "jigsaw_probability": of_patches}
        metrics = {name: (-part.loss_B.detach()).exp().mean() for name, part in probabilities.items()}
        return Outputs(loss, metrics, q[0].detach())

    def after_step(self, now: Now) -> None:
        """The bank takes the keys, and the twin moves towards the encoder."""
        super().after_step(now)
        if self.twin is not None:
            self.twin.update(self.encoder, now["twin_momentum"])

    def costs(self, sizes: list[int]) -> Costs:
        """As of `Contrastive`, with one more query, that of the patches."""
        costs = super().costs(sizes)
        return dataclasses.replace(
            costs,
            terms=costs.terms + 1,
            bank_terms=costs.bank_terms + (1 if self.negatives.bank_rows else 0),
            patch_network=nn.Sequential(nn.Flatten(0, 1), self.backbone, self.jigsaw),
        )
