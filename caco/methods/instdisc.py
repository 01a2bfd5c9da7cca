"""InstDisc, or NPID: each image is a class of its own, told from others by a bank with a row for each (arXiv
1805.01978).

Shapes: B this rank's images, G all ranks', D width of the embedding, V views, N images of the training set.
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
    """The embedding v of an image is to be nearer to the image's row V_i of the bank than to the other images' rows.

    "nce": L = mean_i -log P_i / (P_i + M/N) - sum_j log (M/N) / (P_j + M/N), j over M rows drawn for the image, P_j =
    exp(v.V_j / tau) / Z, with the bank's Z, of the first step (with `accumulate`, of its first part). "softmax":
    cross-entropy over the image's row and M drawn ones, or over all N. After the step V_i moves towards v. No gradient
    reaches the bank.

    The published method has one view of an image. Of several, the losses are averaged, all against the same drawn rows,
    and the first view's embedding is written.

    Args:
        encoder: images to unit embeddings; its `.backbone` is what evaluators see.
        bank: a row for each image.
        num_images: N, of the training set.
        seed: of what is drawn, with the step and the image.
        temperature: tau.
        loss: see above.
        num_noise: M; None for all rows, with "softmax".
        epsilon: added to the denominators of "nce", as published.
        proximal_weight: lambda of lambda |v - V_i|^2, which keeps an embedding near its image's last ones (the paper's
            Eq. 10; its code has none).
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
                "method.num_noise: null, for all rows, goes with method.loss=softmax; method.loss=nce needs a number"
            )
        if bank.size != num_images:
            raise UserError(
                f"method needs a bank with a row for each of the {num_images} training images; got {bank.size} rows"
            )
        self.encoder, self.bank = encoder, bank
        self.seed, self.temperature, self.form, self.num_noise = seed, temperature, loss, num_noise
        self.epsilon, self.proximal_weight = epsilon, proximal_weight
        self.seen: list[
            tuple[Tensor, Tensor]
        ] = []  # images and embeddings of the step in progress, by part of the batch

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # the encoder's; an attribute would be a second part of the state
        return self.encoder.backbone

    def contrast(self, v_ND: Tensor, image_N: Tensor, *numbers: int, part: int = 0) -> Contrast:
        """Losses of embeddings against (a part of) the bank's rows.

        Args:
            numbers: the step, and others that tell this draw from the step's other ones.
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
        """For the bank, after the step."""
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
        """Of the bank's rows; `bank/` and a name."""
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
