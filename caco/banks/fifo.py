"""The queue of past keys (MoCo; NNCLR's support set): first in, first out, nothing learned."""

import torch
from torch import Tensor, nn

from caco.banks import reweighted, scoring
from caco.banks.base import Bank
from caco.banks.rows import Rows, few_rows_chosen
from caco.ranges import Seed, Several, Width, held
from caco.schedules import RunShape, Table, constant


class FifoBank(nn.Module, Bank):
    """The last K keys, as negatives (MoCo v2) or as a place to look for neighbours (NNCLR).

    Keys enter in `update`, after the step that they were computed in, so no key is ever its own negative.

    Args:
        size: rows, K.
        dim: width D of the embedding.
        seed: of the random rows that the queue starts with.
    """

    filled_by_keys = True
    default_warm_start_passes = 0  # it fills itself as it goes, as published

    next_row: Tensor  # int64, where the next key goes

    @held
    def __init__(self, *, size: Several, dim: Width, seed: Seed):
        super().__init__()
        self.rows = Rows(size=size, dim=dim, seed=seed, learnable=False)
        self.size = size
        self.register_buffer("next_row", torch.zeros((), dtype=torch.int64))

    def rates(self, run: RunShape) -> Table:
        """A queue has no rate: 0 for every step."""
        return constant(run, 0.0)

    def fill(self, keys_GD: Tensor, step: int) -> None:
        """Take the keys of a step of the warm start, like those of any other."""
        self.update(lr=0.0, keys_GD=keys_GD)

    def warning(self, statistics: dict[str, float]) -> str | None:
        """What is wrong with a queue of which `rows.statistics` says this; neighbouring keys that resemble one another are not."""
        return few_rows_chosen(statistics)

    def score(
        self, q_BD: Tensor, positive_B: Tensor, *, temperature: float, extra_BE: Tensor | None = None,
        objective: reweighted.Objective | None = None, learn: bool = True,
    ) -> scoring.Score:  # fmt: skip
        """Loss of each query over all rows and extra columns; see `scoring.score`. The rows take no gradient.

        Args:
            learn: not used; the learnable bank's score takes it.
        """
        return reweighted.score_of(objective)(
            q_BD,
            self.rows.weight,
            positive_B,
            first_row=self.rows.first,
            size=self.size,
            tau=temperature,
            extra_BE=extra_BE,
        )

    @torch.no_grad()
    def update(self, *, lr: float, keys_GD: Tensor) -> None:
        """Replace the oldest rows by the keys of the step just made; of more than K keys, the last K.

        Args:
            lr: not used; the learnable bank's update takes it.
        """
        start = int(self.next_row) + max(0, len(keys_GD) - self.size)
        self.rows.write(keys_GD[-self.size :], start)
        self.next_row.fill_((int(self.next_row) + len(keys_GD)) % self.size)
