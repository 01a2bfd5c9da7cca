"""PIC: each image is a class of its own, and a classifier with a learned weight vector for each class tells the images
apart (arXiv 2006.14618).

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
    """Cross-entropy whose logits are the cosines with the weight vectors of all N classes, divided by tau. An image's
    class is its index.

    The published method takes one view of an image. With several views, the losses are averaged. Views that are smaller
    than the first one (the paper's multi-crop) do not move the class weights.

    Args:
        encoder: images to unit embeddings; its `.backbone` is what evaluators and exports take.
        bank: the class weights, which have the optimiser's learning rate.
        num_images: N, of the training set.
        batch: images a step, over all ranks.
        seed: of the order of the images.
        temperature: tau.
        order: of the images; see `images_in_windows`. "epoch" takes every image once an epoch, in a random order.
        window_size: number of images in a window. A window that holds all images is the same as "epoch".
        window_stride: number of images by which the window moves on.

    Source: arXiv 2006.14618.
    Raises:
        UserError: a window smaller than the batch, or a bank of another size than `num_images`.
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
                f"this method needs a method.window_size of at least the batch, {batch}, and a method.window_stride of"
                f" at least 1; got {window_size} and {window_stride}"
            )
        if bank.size != num_images:
            raise UserError(
                f"this method needs a bank with a row for each of the {num_images} training images; got {bank.size}"
                " rows"
            )
        self.encoder, self.bank = encoder, bank
        self.num_images, self.batch, self.seed, self.temperature = num_images, batch, seed, temperature
        self.order_of_images: Order = "epoch" if window_size >= num_images else order
        self.window_size, self.window_stride = window_size, window_stride

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # as an attribute it would be in the state twice
        return self.encoder.backbone

    def parameter_groups(self) -> list[ParameterGroup]:
        """The encoder alone: the class weights take steps of their own in `after_step`."""
        return [ParameterGroup([p for p in self.encoder.parameters() if p.requires_grad])]

    def order(self, epoch: int) -> np.ndarray | None:
        """The images that this epoch's steps take from the sequence of windows, which runs on independently of epochs;
        None, with order "epoch", for the loader's own order.
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
        """The class weights' `Rows.statistics`, as `bank/NAME`."""
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
    """Images number `start` to `end` - 1 of an endless sequence of windows, whose images are visited in a random order;
    indices, int64 [end - start].

    The last images of a window that make no whole batch are left out of that visit, so that no batch holds an image
    twice.

    "window": all images are put in one random order, and a window of `size` images moves over it by `stride` images at
    a time, beginning again after the last image. So an image is in size / stride consecutive windows. This is the
    method as the paper describes it. "released": the published code, which takes positions modulo the window's length
    instead of the number of images, so that the window never moves and always holds the same `size` images.
    "released_shuffled": the published code with --shuffle-per-epoch, as its scripts run it: each window is a new random
    set of `size` images, except that every (size / stride)th window repeats the one before.

    Source: published code, the sliding-window sampler.
    Args:
        start, end: positions in the sequence, counted from 0.
        num_images: of the training set.
        size: images in a window.
        stride: images by which the window moves on.
        batch: images a step, over all ranks.
        seed: of the random orders.
        kind: see above.
    """

    def members(window: int) -> np.ndarray:
        if kind == "window":
            return all_images[(np.arange(size) + window * stride) % num_images]
        if kind == "released":
            return all_images[:size]
        while window and window * stride % size == 0:  # a window at the start of the array is not shuffled anew
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
