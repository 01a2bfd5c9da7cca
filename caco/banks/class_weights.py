"""The bank whose rows are the weights of a classifier in which each training image is a class of its own (PIC). They
are learned by ordinary gradient descent.
"""

import torch
from torch import Tensor, nn

from caco.banks import motion, scoring
from caco.banks.base import Bank
from caco.banks.reweighted import Objective
from caco.banks.rows import Rows
from caco.errors import UserError
from caco.ranges import AboveZero, NonNegative, Seed, Several, ShareBelowOne, Width, held
from caco.schedules import RunShape, Table, constant


class ClassWeights(nn.Module, Bank):
    """N rows w, of which row i is the weight vector of image i's class. With every step of the optimiser the rows take
    an SGD step of their own on the same cross-entropy: a row moves towards its image's embedding, with weight 1 - p,
    and away from every other embedding of the batch, with weight p.

    Logits are cosines over tau, so only the direction of a row matters; its stored norm is free. Neither the N x B
    matrix of probabilities nor an N x D gradient is held: the loss and the motion stream over the rows once each.

    Args:
        size: number of rows N, one for each training image; null in a configuration stands for that number.
        dim: width D of the embedding.
        seed: of the random rows that the bank starts with.
        spread: standard deviation of the normal distribution that they are drawn from.
        momentum, weight_decay: of the rows' SGD, with the meaning that torch.optim.SGD gives them.

    Source: arXiv 2006.14618.
    Raises:
        UserError: no size.
    """

    by_image = True
    filled_by_keys = False
    default_warm_start_passes = 0

    @held
    def __init__(
        self,
        *,
        size: Several | None,
        dim: Width,
        seed: Seed,
        spread: AboveZero = 0.01,
        momentum: ShareBelowOne = 0.9,
        weight_decay: NonNegative = 1e-4,
    ):
        super().__init__()
        if size is None:
            raise UserError(
                "class weights need size, the number of images; in a configuration size=null stands for that number"
            )
        self.rows = Rows(size=size, dim=dim, seed=seed, learnable=True, norms="normal")
        with torch.no_grad():
            self.rows.weight.mul_(spread)
        self.size, self.momentum, self.weight_decay = size, momentum, weight_decay
        self.anchors: list[scoring.Anchors] = []  # what the step in progress has noted, for `update`

    def rates(self, run: RunShape) -> Table:
        """1 for every step, a factor on the optimiser's learning rate, which is the rows' too."""
        return constant(run, 1.0)

    def fill(self, keys_GD: Tensor, step: int) -> None:
        """Does nothing: a warm start's keys come without the indices of their images, so they cannot become rows."""

    def score(
        self, q_BD: Tensor, positive_B: Tensor, *, temperature: float, extra_BE: Tensor | None = None,
        objective: Objective | None = None, learn: bool = True,
    ) -> scoring.Score:  # fmt: skip
        """Cross-entropy of each query, [B], over all N rows and extra columns; see `scoring.score`. The backward pass
        notes what the rows' gradient is computed from, for `update`.

        Args:
            positive_B: int64, the index of each query's image.
            objective: must be None: this bank knows no other loss than cross-entropy.
            learn: whether the rows are to move for these queries.
        """
        assert objective is None, "no method treats the negatives of a bank by image"
        return scoring.score(
            q_BD, self.rows.weight if learn else self.rows.weight.detach(), positive_B, first_row=self.rows.first,
            size=self.size,
            tau=temperature, extra_BE=extra_BE, anchors=self.anchors if learn else None,
        )  # fmt: skip

    @torch.no_grad()
    def update(self, *, lr: float, keys_GD: Tensor | None = None) -> None:
        """One SGD step of the rows, for all losses whose backward pass has run since the last update.

        Args:
            lr: the rows' learning rate of this step.
            keys_GD: ignored, as no key becomes a row here; it is part of the contract.
        """
        if not self.anchors:
            return
        # With pull 1 and push -1, the weights of CaCo's Eq. 10 are those of descent on cross-entropy: 1 - p at the
        # positive, -p everywhere else.
        motion.move(
            self.rows.weight, self.rows.velocity, self.rows.first, scoring.Anchors.joined(self.anchors), pull=1.0,
            push=-1.0, lr=lr,
            momentum=self.momentum, weight_decay=self.weight_decay, normalise=False,
        )  # fmt: skip
        self.anchors.clear()
