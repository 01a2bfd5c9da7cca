"""The queue of past keys (MoCo; NNCLR's support set): first in, first out. Its rows are not learned."""

import torch
from torch import Tensor, nn

from caco import devices, distributed
from caco.banks import own_loop, reweighted, scoring
from caco.banks.base import Bank
from caco.banks.rows import Rows, few_rows_chosen
from caco.ranges import Seed, Several, Width, held
from caco.schedules import RunShape, Table, constant


class FifoBank(nn.Module, Bank):
    """The last K keys, which serve as negatives (MoCo v2) or as the rows among which a nearest neighbour is looked for
    (NNCLR).

    Keys enter in `update`, after the step that they were computed in, so no key is ever its own negative. In a loop of
    your own, call `loss` and `update` (caco/banks/own_loop.py).

    Args:
        size: number of rows K.
        dim: width D of the embedding.
        seed: of the random rows that the queue starts with.

    Source: arXiv 1911.05722 (MoCo).
    """

    filled_by_keys = True
    default_warm_start_passes = 0  # as published: the training itself fills the queue

    next_row: Tensor  # int64, where the next key goes

    @held
    def __init__(self, *, size: Several, dim: Width, seed: Seed = 0):
        super().__init__()
        self.rows = Rows(size=size, dim=dim, seed=seed, learnable=False)
        self.size = size
        self.keys: list[Tensor] = []  # all ranks' keys that `loss` was given in the step in progress
        self.register_buffer("next_row", torch.zeros((), dtype=torch.int64))
        self._next = devices.Known(0)  # the same
        self.register_load_state_dict_post_hook(_read_anew)

    def rates(self, run: RunShape) -> Table:
        """0 for every step: a queue has no learning rate."""
        return constant(run, 0.0)

    def fill(self, keys_GD: Tensor, step: int) -> None:
        """Take the keys of a step of the warm start, as after any other step."""
        self.update(lr=0.0, keys_GD=keys_GD)

    def warning(self, statistics: dict[str, float]) -> str | None:
        """A sentence about what is wrong with the queue, judged by `rows.statistics`; None where nothing is wrong.
        Near-duplicate rows are no fault here: keys of similar images resemble one another.
        """
        return few_rows_chosen(statistics)

    def loss(
        self,
        q_BD: Tensor,
        k_BD: Tensor,
        *,
        temperature: float = 0.2,
        positive: own_loop.PositiveOf = "key",
        extra_BE: Tensor | None = None,
        learn: bool = True,
    ) -> Tensor:
        """As `LearnableBank.loss`, over the queue; in training mode the keys are noted for `update`. Returns a scalar.

        Args:
            temperature: tau; 0.2 in MoCo v2.
            positive: "key": the key itself is the positive, and all rows are negatives (MoCo); "row": the queue's row
                nearest to the key is the positive.
            learn: ignored, as a queue's rows do not learn; it is part of the contract.
        """
        value = own_loop.loss(self, q_BD, k_BD, temperature=temperature, positive=positive, extra_BE=extra_BE)
        if self.training:
            self.keys.append(distributed.gather(own_loop.unit(k_BD, self.rows)))
        return value

    def score(
        self, q_BD: Tensor, positive_B: Tensor, *, temperature: float, extra_BE: Tensor | None = None,
        objective: reweighted.Objective | None = None, learn: bool = True,
    ) -> scoring.Score:  # fmt: skip
        """The loss of each query, [B], over all rows and extra columns; see `scoring.score`. The rows take no gradient.

        Args:
            learn: ignored, as a queue's rows do not learn; it is part of the contract.
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
    def update(self, *, lr: float | None = None, keys_GD: Tensor | None = None) -> None:
        """Replace the oldest rows by the keys of the step just made. Of more than K keys only the last K enter.

        Args:
            lr: ignored, as a queue has no learning rate; it is part of the contract.
            keys_GD: all ranks' unit keys of the step; None for the keys that `loss` was given since the last update.
        """
        if keys_GD is None:
            if not self.keys:
                return
            keys_GD = torch.cat(self.keys)
        self.keys.clear()
        at = self._next.of(self.next_row, int)
        self.rows.write(keys_GD[-self.size :], at + max(0, len(keys_GD) - self.size))
        self.next_row.fill_((at + len(keys_GD)) % self.size)
        self._next.note(self.next_row, (at + len(keys_GD)) % self.size)


def _read_anew(bank: FifoBank, _: object) -> None:
    bank._next.forget()
