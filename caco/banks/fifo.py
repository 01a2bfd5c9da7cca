"""The queue of past keys (MoCo; NNCLR's support set): first in, first out, nothing learned."""

import torch
from torch import Tensor, nn

from caco import devices, distributed
from caco.banks import own_loop, reweighted, scoring
from caco.banks.base import Bank
from caco.banks.rows import Rows, few_rows_chosen
from caco.ranges import Seed, Several, Width, held
from caco.schedules import RunShape, Table, constant


class FifoBank(nn.Module, Bank):
    """The last K keys, as negatives (MoCo v2) or as a place to look for neighbours (NNCLR).

    Keys enter in `update`, after the step that they were computed in, so no key is ever its own negative. In one's own
    loop it takes `loss` and `update` (caco/banks/own_loop.py).

    Args:
        size: rows, K.
        dim: width D of the embedding.
        seed: of the random rows that the queue starts with.
    """

    filled_by_keys = True
    default_warm_start_passes = 0  # it fills itself as it goes, as published

    next_row: Tensor  # int64, where the next key goes

    @held
    def __init__(self, *, size: Several, dim: Width, seed: Seed = 0):
        super().__init__()
        self.rows = Rows(size=size, dim=dim, seed=seed, learnable=False)
        self.size = size
        self.keys: list[Tensor] = []  # of the step in progress, those of all ranks, that `loss` was given
        self.register_buffer("next_row", torch.zeros((), dtype=torch.int64))
        self._next = devices.Known(0)  # the same
        self.register_load_state_dict_post_hook(_read_anew)

    def rates(self, run: RunShape) -> Table:
        """A queue has no rate: 0 for every step."""
        return constant(run, 0.0)

    def fill(self, keys_GD: Tensor, step: int) -> None:
        """Take the keys of a step of the warm start, like those of any other."""
        self.update(lr=0.0, keys_GD=keys_GD)

    def warning(self, statistics: dict[str, float]) -> str | None:
        """What is wrong with a queue of which `rows.statistics` says this; neighbouring keys that resemble one another
        are not.
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
        """As `LearnableBank.loss`, over the queue; in training mode the keys are noted for `update`.

        Args:
            temperature: tau; 0.2 in MoCo v2.
            learn: not used; the learnable bank's loss takes it.
            positive: "key": the key, and all rows are negatives (MoCo); "row": the row of the queue that is nearest to
                it.
        """
        value = own_loop.loss(self, q_BD, k_BD, temperature=temperature, positive=positive, extra_BE=extra_BE)
        if self.training:
            self.keys.append(distributed.gather(own_loop.unit(k_BD, self.rows)))
        return value

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
    def update(self, *, lr: float | None = None, keys_GD: Tensor | None = None) -> None:
        """Replace the oldest rows by the keys of the step just made; of more than K keys, the last K.

        Args:
            lr: not used; the learnable bank's update takes it.
            keys_GD: all ranks' keys of the step, unit vectors; None for those that `loss` was given since the last
                update.
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
