"""The contract of a bank, and nothing else."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from caco.banks.reweighted import Objective
from caco.banks.rows import Rows
from caco.banks.scoring import Score
from caco.schedules import RunShape, Table


class Bank(Protocol):
    """K rows on the unit sphere that queries are scored against. Usable alone, in anyone's loop:

        row_B = bank.rows.most_probable(k_BD)  # each key chooses its positive
        loss = bank.score(q_BD, row_B, temperature=0.1).loss_B.mean()
        loss.backward()  # gradients of the queries; of the rows they are noted
        bank.update(lr=3.0, keys_GD=k_GD)  # the rows move, once an optimiser step

    A bank of one's own is an `nn.Module` that derives from this too: class MyBank(nn.Module, Bank). What a step changes
    is in its parameters and buffers, so that a checkpoint holds it. Who calls: the method that has it
    (caco/methods/contrastive.py) and its sources. Every call is a collective: all ranks make it, with as many queries
    each.

    Shapes: B this rank's queries, G all ranks' queries, D width, E extra columns.

    size: rows, K, over all ranks. rows: this rank's part of them, and how they are looked up, searched and counted.
    temperature: of the rows' own gradient; None where it is the queries'.
    filled_by_keys: whether the keys of a warm start become rows. default_warm_start_passes: how often these go over the
    rows where nobody says how long the warm start is. by_image: whether each training image has a row, its own: the
    program then says how many there are, where the configuration has bank.size=null. needs_whole_batch: whether the
    loss is of all queries of a batch together.
    """

    by_image: bool = False
    needs_whole_batch: bool = False
    size: int
    rows: Rows
    temperature: float | None = None
    filled_by_keys: bool
    default_warm_start_passes: int

    @abstractmethod
    def rates(self, run: RunShape) -> Table:
        """The rate of `update` at each step of the training; the method logs it as `bank_lr`."""

    @abstractmethod
    def score(
        self, q_BD: Tensor, positive_B: Tensor, *, temperature: float, extra_BE: Tensor | None = None,
        objective: Objective | None = None, learn: bool = True,
    ) -> Score:  # fmt: skip
        """The loss of each query over all rows and extra columns; see `scoring.score`. Holds no B x K matrix and moves
        no row.

        Args:
            positive_B: int64; below `size` a row, `size + e` extra column e.
            temperature: of the queries' loss.
            objective: the loss where it is another than InfoNCE; see `reweighted.score`. Given to a bank only where
                there is one.
            learn: whether the backward pass notes what it asks of the rows, for `update`.
        """

    def regulariser(self, q_BD: Tensor, *, temperature: float) -> Tensor | None:
        """A term of the loss, a scalar, of the queries of all views of a step; None: there is none."""
        return None

    @abstractmethod
    def fill(self, keys_GD: Tensor, step: int) -> None:
        """After step `step` of a warm start, counted from 0: take its keys, those of all ranks, where the bank is
        filled by keys.
        """

    @abstractmethod
    def update(self, *, lr: float, keys_GD: Tensor) -> None:
        """After an optimiser step: move the rows as was asked, or take the step's keys.

        Args:
            lr: of this step, from `rates`.
            keys_GD: all ranks' keys of the step, unit vectors.
        """

    def warning(self, statistics: dict[str, float]) -> str | None:
        """What is wrong with a bank of which `rows.statistics` says this, over an epoch; None where nothing is."""
        return None

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """`nn.Module`'s: the rows, which the optimiser leaves alone."""
        raise NotImplementedError
