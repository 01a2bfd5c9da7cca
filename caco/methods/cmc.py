"""CMC: an image's colours have to identify its lightness, and its lightness its colours (arXiv 1906.05849).

Shapes: B this rank's images, N the embeddings of all views of these, D width of each of the two embeddings.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from caco.banks.by_image import ImageBank
from caco.data.loaders.batches import Batch
from caco.errors import UserError
from caco.methods.base import Needs, Now, Outputs
from caco.methods.instdisc import InstDisc
from caco.nn.heads import Encoder
from caco.ranges import AboveZero, Count, NonNegative, Seed, held


class CMC(InstDisc):
    """L = L(c, bank of lightness) + L(l, bank of colours), where l embeds an image's first channel and c its two other
    channels, by a network each. Each embedding is contrasted with the rows that the other kind of embedding has
    written. Both meet the same drawn rows, and each part of the bank has a Z of its own.

    Args:
        encoder: gives both embeddings side by side, [B, 2 D], not normalised: a `GroupedProjector` on `ChannelGroups`.
        bank: an `ImageBank` with two parts.
        num_images, seed, temperature, loss, num_noise, epsilon: as in `InstDisc`, which also averages the losses of
            several views.

    Raises:
        UserError: num_noise is None, or encoder and bank do not have two parts each.
    """

    needs = Needs(indices=True, lightness_first=True)

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
        num_noise: Count | None = 16_384,
        epsilon: NonNegative = 1e-7,
    ):
        super().__init__(
            encoder=encoder, bank=bank, num_images=num_images, seed=seed, temperature=temperature, loss=loss,
            num_noise=num_noise,
            epsilon=epsilon,
        )  # fmt: skip
        if num_noise is None:
            raise UserError(
                "method.num_noise: this method can contrast with drawn rows only; expected a number, got null"
            )
        groups = getattr(encoder.projector, "groups", 1)
        if (groups, bank.parts) != (2, 2):
            raise UserError(
                "this method needs an embedding of the lightness and one of the colours: a projector with 2 groups"
                f" (projector=cmc) and a bank with 2 parts (bank.parts=2); got {groups} and {bank.parts}"
            )

    def embeddings(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of the lightness and of the colours of images [B, 3, H, W], [B, D] each."""
        lightness_BD, colours_BD = self.encoder(images, unit=False).chunk(2, 1)
        return F.normalize(lightness_BD, dim=1), F.normalize(colours_BD, dim=1)

    def forward(self, batch: Batch, now: Now) -> Outputs:
        both = [self.embeddings(view) for view in batch.views]
        lightness_ND, colours_ND = (torch.cat(parts) for parts in zip(*both, strict=True))
        image_N = batch.index.repeat(len(both))
        of_colours = self.contrast(colours_ND, image_N, now.step, part=0)
        of_lightness = self.contrast(lightness_ND, image_N, now.step, part=1)
        first_BD = torch.cat(both[0], 1)
        self.remember(batch.index, first_BD)
        metrics = {"positive_probability": (of_colours.probability_B.mean() + of_lightness.probability_B.mean()) / 2}
        return Outputs(of_colours.loss_B.mean() + of_lightness.loss_B.mean(), metrics, first_BD)
