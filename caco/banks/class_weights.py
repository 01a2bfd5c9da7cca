"""The bank whose rows are the weights of a classifier with a class for each training image (PIC): learned by ordinary
descent.
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
    """N rows w, of which row i is the class of image i. With a step of the optimiser they take one of their own, of SGD
    on the same cross-entropy: a row is pulled by its image's embedding, weighted by 1 - p, and pushed away from all
    others by p.

    Logits are cosines over tau, so what is learned of a row is its direction; its stored norm is free. Neither the N x
    B matrix of probabilities nor an N x D gradient is held: loss and motion each stream over the rows once.

    Args:
        size: rows, N; None in a configuration, where it is the number of training images.
        dim: width D of the embedding.
        seed: of the rows as they were drawn.
        spread: standard deviation of their normal law.
        momentum, weight_decay: of the rows' SGD, torch's.

    Source: arXiv 2006.14618.
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
            raise UserError("class weights need size, the number of images; in a configuration null stands for it")
        self.rows = Rows(size=size, dim=dim, seed=seed, learnable=True, norms="normal")
        with torch.no_grad():
            self.rows.weight.mul_(spread)
        self.size, self.momentum, self.weight_decay = size, momentum, weight_decay
        self.anchors: list[scoring.Anchors] = []  # of the rows by the step in progress

    def rates(self, run: RunShape) -> Table:
        """The optimiser's is theirs: 1, as a factor on it, for every step."""
        return constant(run, 1.0)

    def fill(self, keys_GD: Tensor, step: int) -> None:
        """Keys of a warm start become no rows: they come without their images."""

    def score(
        self, q_BD: Tensor, positive_B: Tensor, *, temperature: float, extra_BE: Tensor | None = None,
        objective: Objective | None = None, learn: bool = True,
    ) -> scoring.Score:  # fmt: skip
        """Cross-entropy of each query over all N rows and extra columns; see `scoring.score`. Its backward asks the
        rows to move.

        Args:
            positive_B: the queries' images.
            objective: None; its negatives are not treated.
        """
        assert objective is None, "no method treats the negatives of a bank by image"
        return scoring.score(
            q_BD, self.rows.weight if learn else self.rows.weight.detach(), positive_B, first_row=self.rows.first,
            size=self.size,
            tau=temperature, extra_BE=extra_BE, anchors=self.anchors if learn else None,
        )  # fmt: skip

    @torch.no_grad()
    def update(self, *, lr: float, keys_GD: Tensor | None = None) -> None:
        """One step of SGD along what was asked for since the last update.

        Args:
            lr: of this step.
            keys_GD: not used; the queue's update takes them.
        """
        if not self.anchors:
            return
        # Eq. 10's weights with a push of -1 are cross-entropy's: p - 1 at the positive and p elsewhere, downhill.
        motion.move(
            self.rows.weight, self.rows.velocity, self.rows.first, scoring.Anchors.joined(self.anchors), pull=1.0,
            push=-1.0, lr=lr,
            momentum=self.momentum, weight_decay=self.weight_decay, normalise=False,
        )  # fmt: skip
        self.anchors.clear()
