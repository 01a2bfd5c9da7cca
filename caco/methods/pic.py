"""PIC: each image is a class of its own, told apart by a classifier with learned weights for all of them (arXiv
2006.14618).

Shapes: B this rank's images, D width of the embedding, V views, N images of the training set.
"""

from typing import Literal

import numpy as np
import torch
from torch import nn

from caco.banks.class_weights import ClassWeights
from caco.data.loaders.batches import Batch, mixed_seed
from caco.errors import UserError
from caco.methods.base import Costs, Method, Needs, Now, Outputs, ParameterGroup
from caco.nn.heads import Encoder
from caco.ranges import AboveZero, Count, Seed, held

Order = Literal["window", "released", "released_shuffled", "epoch"]


class PIC(Method):
    """Cross-entropy of cosines over tau with the weights of all N classes; an image's class is its index.

    The published method has one view of an image. Of several, the losses are averaged; those of smaller size than the
    first (its multi-crop) leave the class weights alone.

    Args:
        encoder: images to unit embeddings; its `.backbone` is what evaluators see.
        bank: the class weights, which take the optimiser's rate.
        num_images: N, of the training set.
        batch: images a step, over all ranks.
        seed: of the order of the images.
        temperature: tau.
        order: of the images; see `images_in_windows`. "epoch" is every image once an epoch, in a random order.
        window_size, window_stride: images of a window, and by how many it moves on. A window that holds all images is
            "epoch".
    """

    needs = Needs(indices=True)

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        bank: ClassWeights,
        num_images: Count,
        batch: Count,
        seed: Seed = 0,
        temperature: AboveZero = 0.2,
        order: Order = "window",
        window_size: Count = 131_072,
        window_stride: Count = 16_384,
    ):
        super().__init__()
        if order != "epoch" and (window_size < batch or window_stride < 1):
            raise UserError(
                f"method needs a window_size of at least the batch, {batch}, and a window_stride of at least 1; got"
                f" {window_size} and {window_stride}"
            )
        if bank.size != num_images:
            raise UserError(
                f"method needs a bank with a row for each of the {num_images} training images; got {bank.size} rows"
            )
        self.encoder, self.bank = encoder, bank
        self.num_images, self.batch, self.seed, self.temperature = num_images, batch, seed, temperature
        self.order_of_images: Order = "epoch" if window_size >= num_images else order
        self.window_size, self.window_stride = window_size, window_stride

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # the encoder's; an attribute would be a second part of the state
        return self.encoder.backbone

    def parameter_groups(self) -> list[ParameterGroup]:
        """The encoder; the class weights take their own steps."""
        return [ParameterGroup([p for p in self.encoder.parameters() if p.requires_grad])]

    def order(self, epoch: int) -> np.ndarray | None:
        """Windows follow one another whatever an epoch is; this is the part of their images that the epoch's steps
        take.
        """
        if self.order_of_images == "epoch":
            return None
        images = self.num_images // self.batch * self.batch
        return images_in_windows(
            epoch * images, (epoch + 1) * images, num_images=self.num_images, size=self.window_size,
            stride=self.window_stride,
            batch=self.batch, seed=self.seed, kind=self.order_of_images,
        )  # fmt: skip

    def forward(self, batch: Batch, now: Now) -> Outputs:
        q = [self.encoder(view) for view in batch.views]
        large = [v for v, view in enumerate(batch.views) if view.shape[-1] == batch.views[0].shape[-1]]
        small = [v for v in range(len(q)) if v not in large]
        losses = []
        for views, learn in ((large, True), (small, False)):
            if views:
                q_ND, image_N = torch.cat([q[v] for v in views]), batch.index.repeat(len(views))
                losses.append(self.bank.score(q_ND, image_N, temperature=self.temperature, learn=learn).loss_B)
        loss_N = torch.cat(losses)
        return Outputs(loss_N.mean(), {"positive_probability": (-loss_N.detach()).exp().mean()}, q[0])

    def after_step(self, now: Now) -> None:
        self.bank.update(lr=now.lr)

    def statistics(self) -> dict[str, float]:
        """Of the class weights; `bank/` and a name."""
        return {f"bank/{name}": value for name, value in self.bank.rows.statistics().items()}

    def costs(self, sizes: list[int]) -> Costs:
        return Costs(encoded=list(range(len(sizes))), terms=len(sizes), bank_terms=len(sizes))


def images_in_windows(
    start: int,
    end: int,
    *,
    num_images: int,
    size: int,
    stride: int,
    batch: int,
    seed: int,
    kind: Literal["window", "released", "released_shuffled"],
) -> np.ndarray:
    """Images number `start` to `end` of an endless sequence of windows, each visited in a random order, int64 [end -
    start].

    Of a window the last images, which make no whole batch, are left out of that visit, so that no image is twice in a
    batch.

    "window": over the images in one random order, a window of `size` that moves on by `stride`, from the last image to
    the first again: an image is in size / stride windows, one after the other. That is the method as it is described.
    "released": its code, which takes positions modulo the window's length and not the number of images, so that the
    window never moves: the same `size` images for ever. "released_shuffled": its code with --shuffle-per-epoch, as its
    scripts have it: a fresh random set of `size` images for each window, but each (size / stride)th repeats the one
    before.

    Source: published code, the sliding-window sampler.
    """

    def members(window: int) -> np.ndarray:
        if kind == "window":
            return all_images[(np.arange(size) + window * stride) % num_images]
        if kind == "released":
            return all_images[:size]
        while window and window * stride % size == 0:  # begins at the window's start, where nothing is shuffled
            window -= 1
        return np.random.default_rng(mixed_seed(seed, 0, window)).choice(num_images, size, replace=False)

    all_images = np.random.default_rng(mixed_seed(seed, 2)).permutation(num_images)
    visited = size // batch * batch
    first, last = start // visited, (end - 1) // visited
    visits = [
        np.random.default_rng(mixed_seed(seed, 1, window)).permutation(members(window))[:visited]
        for window in range(first, last + 1)
    ]
    return np.concatenate(visits)[start - first * visited :][: end - start]
