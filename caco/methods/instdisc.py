"""InstDisc, or NPID: each image is a class of its own, and a bank with one row for each image tells it from the others
(arXiv 1805.01978).

Shapes: B this rank's images, G all ranks' images, D width of the embedding, V views. As a number, N is the images of
the training set; as a suffix of shapes, N is the embeddings of all views of a batch.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from caco import distributed
from caco.banks.by_image import ImageBank
from caco.banks.noise import Contrast
from caco.data.loaders.batches import Batch, mixed_seed
from caco.errors import UserError
from caco.methods.base import Costs, Method, Needs, Now, Outputs
from caco.nn.heads import Encoder
from caco.ranges import AboveZero, Count, NonNegative, Seed, held


class InstDisc(Method):
    """Brings the embedding v of image i nearer to the image's row V_i of the bank than to the other images' rows.

    "nce": L = mean_i -log P_i / (P_i + M/N) - sum_j log (M/N) / (P_j + M/N), where j goes over M rows drawn for the
    image and P_j = exp(v.V_j / tau) / Z. The bank estimates Z in the first step (with `accumulate`, in that step's
    first part) and keeps it. "softmax": cross-entropy over the image's row and M drawn rows, or over all N rows. After
    the step V_i moves towards v. No gradient reaches the bank.

    The published method takes one view of an image. With several views, the losses are averaged, all views of an image
    meet the same drawn rows, and the first view's embedding is written to the bank.

    Args:
        encoder: images to unit embeddings; its `.backbone` is what evaluators and exports take.
        bank: the bank with a row for each image.
        num_images: N, of the training set.
        seed: of the drawn rows; the step and the image determine them too.
        temperature: tau.
        loss: "nce" or "softmax", see above.
        num_noise: M; None, with "softmax", for all rows.
        epsilon: added to the denominators of "nce", as published.
        proximal_weight: lambda of the additional term lambda |v - V_i|^2, which keeps an embedding near the image's
            earlier ones (the paper's Eq. 10; the published code does not have it).

    Source: arXiv 1805.01978.
    Raises:
        UserError: "nce" over all rows, or a bank of another size than `num_images`.
    """

    needs = Needs(indices=True)
    against_collapse = "a lower optimizer.lr, a higher method.temperature, more method.num_noise"

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
        num_noise: Count | None = 4096,
        epsilon: NonNegative = 1e-7,
        proximal_weight: NonNegative = 0.0,
    ):
        super().__init__()
        if num_noise is None and loss == "nce":
            raise UserError(
                "method.num_noise: null, which stands for all rows, needs method.loss=softmax; method.loss=nce needs a"
                " number"
            )
        if bank.size != num_images:
            raise UserError(
                f"this method needs a bank with a row for each of the {num_images} training images; got {bank.size}"
                " rows"
            )
        self.encoder, self.bank = encoder, bank
        self.seed, self.temperature, self.form, self.num_noise = seed, temperature, loss, num_noise
        self.epsilon, self.proximal_weight = epsilon, proximal_weight
        self.seen: list[
            tuple[Tensor, Tensor]
        ] = []  # (indices, embeddings) of all ranks' images in the step in progress, for each part of the batch

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # as an attribute it would be in the state twice
        return self.encoder.backbone

    def contrast(self, v_ND: Tensor, image_N: Tensor, *numbers: int, part: int = 0) -> Contrast:
        """The loss of each embedding against the bank's rows, or against one of their parts, [N] each. A collective.

        Args:
            v_ND: unit embeddings.
            image_N: int64, the index of each embedding's image.
            numbers: the step, and further integers that distinguish this draw from other draws of the same step.
            part: of the rows, see `ImageBank`.
        """
        if self.num_noise is None:
            score = self.bank.score(v_ND, image_N, temperature=self.temperature)
            return Contrast(score.loss_B, (-score.loss_B.detach()).exp())
        return self.bank.contrast(
            v_ND, image_N, temperature=self.temperature, num_noise=self.num_noise,
            stream=mixed_seed(self.seed, *numbers),
            form=self.form, epsilon=self.epsilon, part=part,
        )  # fmt: skip

    def remember(self, image_B: Tensor, v_BD: Tensor) -> None:
        """Keep all ranks' images and embeddings for the bank's update after the step. A collective."""
        self.seen.append((distributed.gather(image_B), distributed.gather(v_BD)))

    def forward(self, batch: Batch, now: Now) -> Outputs:
        v = [self.encoder(view) for view in batch.views]
        v_ND, image_N = torch.cat(v), batch.index.repeat(len(v))
        loss_N, probability_N = self.contrast(v_ND, image_N, now.step)
        loss = loss_N.mean()
        if self.proximal_weight:
            row_ND = self.bank.rows.lookup(image_N, as_stored=True)
            loss = loss + self.proximal_weight * (v_ND - row_ND).square().sum(1).mean()
        self.remember(batch.index, v[0])
        return Outputs(loss, {"positive_probability": probability_N.mean()}, v[0])

    def after_step(self, now: Now) -> None:
        for image_G, v_GD in self.seen:
            self.bank.update(lr=0.0, keys_GD=v_GD, index_G=image_G)
        self.seen.clear()

    def statistics(self) -> dict[str, float]:
        """The bank's statistics, as `bank/NAME`."""
        return {f"bank/{name}": value for name, value in self.bank.statistics().items()}

    def costs(self, sizes: list[int]) -> Costs:
        terms = len(sizes)
        return Costs(
            encoded=list(range(len(sizes))),
            terms=terms,
            bank_terms=terms if self.num_noise is None else 0,
            drawn_terms=terms if self.num_noise is not None else 0,
            drawn_rows=self.num_noise or 0,
            lookups=terms if self.proximal_weight else 0,
            gathers=1,
        )
