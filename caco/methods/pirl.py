"""PIRL: the embedding of an image and the embedding of its shuffled patches are both compared with the image's row of a
bank (arXiv 1912.01991).

Shapes: B this rank's images, P patches, N all patches of the batch, F features, D width of the embedding.
"""

import dataclasses
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from caco.banks.by_image import ImageBank
from caco.data.loaders.batches import Batch
from caco.errors import UserError
from caco.methods.base import Costs, Needs, Now, Outputs, ParameterGroup
from caco.methods.instdisc import InstDisc
from caco.nn.backbones import feature_width
from caco.nn.heads import Encoder, JigsawHead, at_least_float32
from caco.ranges import AboveZero, Count, Layers, NonNegative, Seed, Share, Width, held


class PIRL(InstDisc):
    """L = (1 - w) L(v) + w L(g), where v is the embedding of the image and g that of its patches, which has a head of
    its own. L(v) and L(g) are InstDisc's loss, each with its own drawn rows.

    v and g are never compared with each other, only with the image's row of the bank. Only v is written to the row,
    after the step. Both losses have the same Z, estimated from the patches of the first batch.

    Args:
        encoder, bank, num_images, seed, temperature, loss, num_noise, epsilon: as in `InstDisc`, which also averages
            the losses of several views.
        patches_weight: w.
        patches_layers: number of linear layers between the features and the head's output for each patch; 1 as
            published.
        patches_hidden_dim: width between these layers, if there are several.
        num_patches: P.

    Source: arXiv 1912.01991.
    Raises:
        UserError: as of `InstDisc`; in training, a batch without patches.
    """

    needs = Needs(indices=True, patches="shuffled", num_patches=9)

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        bank: ImageBank,
        num_images: Count,
        seed: Seed = 0,
        temperature: AboveZero = 0.07,
        loss: Literal["nce", "softmax"] = "nce",
        num_noise: Count | None = 32_000,
        epsilon: NonNegative = 1.2e-7,
        patches_weight: Share = 0.5,
        patches_layers: Layers = 1,
        patches_hidden_dim: Width = 2048,
        num_patches: Count = 9,
    ):
        super().__init__(
            encoder=encoder, bank=bank, num_images=num_images, seed=seed, temperature=temperature, loss=loss,
            num_noise=num_noise,
            epsilon=epsilon,
        )  # fmt: skip
        self.jigsaw = JigsawHead(
            in_dim=feature_width(encoder.backbone), hidden_dim=patches_hidden_dim, dim=encoder.projector.dim,
            layers=patches_layers,
            num_patches=num_patches,
        )  # fmt: skip
        self.patches_weight = patches_weight
        self.needs = dataclasses.replace(PIRL.needs, num_patches=num_patches)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Two groups: the weights, and the biases and BatchNorm parameters, which have no weight decay, as
        published.
        """
        learning = [p for p in self.parameters() if p.requires_grad]
        return [
            ParameterGroup([p for p in learning if p.ndim > 1]),
            ParameterGroup([p for p in learning if p.ndim <= 1], decay=False),
        ]

    def forward(self, batch: Batch, now: Now) -> Outputs:
        """The patches are contrasted first, because the first call estimates Z."""
        if batch.patches is None:
            raise UserError(
                "this method needs patches of each image, but its batches have none; expected an augmentation that cuts"
                " a view into patches"
            )
        features_NF = self.backbone(batch.patches.flatten(0, 1))
        g_BD = F.normalize(at_least_float32(self.jigsaw(features_NF)), dim=1)
        of_patches = self.contrast(g_BD, batch.index, now.step, 0)
        v = [self.encoder(view) for view in batch.views]
        of_images = self.contrast(torch.cat(v), batch.index.repeat(len(v)), now.step, 1)
        w = self.patches_weight
        loss = (1 - w) * of_images.loss_B.mean() + w * of_patches.loss_B.mean()
        self.remember(batch.index, v[0])
        metrics = {
            "positive_probability": of_images.probability_B.mean(),
            "jigsaw_probability": of_patches.probability_B.mean(),
        }
        return Outputs(loss, metrics, v[0])

    def costs(self, sizes: list[int]) -> Costs:
        """As of `InstDisc`, with one more query, that of the patches."""
        costs = super().costs(sizes)
        return dataclasses.replace(
            costs,
            terms=costs.terms + 1,
            bank_terms=costs.bank_terms + (1 if self.num_noise is None else 0),
            drawn_terms=costs.drawn_terms + (0 if self.num_noise is None else 1),
            patch_network=nn.Sequential(nn.Flatten(0, 1), self.backbone, self.jigsaw),
        )
