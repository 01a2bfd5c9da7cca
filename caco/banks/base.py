"""The contract that every bank fulfils, and nothing else."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from caco.banks.reweighted import Objective
from caco.banks.rows import Rows
from caco.banks.scoring import Score
from caco.schedules import RunShape, Table


class Bank(Protocol):
    """K vectors of width D, the rows, that queries are scored against. A bank can be used alone, in any training loop:

        row_B = bank.rows.most_probable(k_BD)  # each key chooses its positive
        loss = bank.score(q_BD, row_B, temperature=0.1).loss_B.mean()
        loss.backward()  # gradients of the queries; the bank notes what it needs to move its rows
        bank.update(lr=3.0, keys_GD=k_GD)  # the rows move, once an optimiser step

    A bank of your own derives from `nn.Module` and from this class: class MyBank(nn.Module, Bank). Whatever a step
    changes has to be in its parameters and buffers, so that a checkpoint holds it. The bank is called by the method
    that owns it (caco/methods/contrastive.py) and by that method's sources of positives and negatives. Every call is a
    collective: all ranks make it, with equally many queries.

    Shapes: B this rank's queries, G all ranks' queries, D width, E extra columns.

    size: the number of rows K, over all ranks. rows: this rank's shard of the rows, with methods that look them up,
    search them and count their use. temperature: the temperature at which the rows' own gradient is taken; None where
    it is that of the queries' loss. filled_by_keys: whether the keys of a warm start become rows.
    default_warm_start_passes: how many times the warm start's keys go over all rows where the configuration does not
    say how long the warm start is. by_image: whether each training image has a row of its own; bank.size=null in the
    configuration is then replaced by the number of training images. needs_whole_batch: whether the loss depends on all
    queries of a batch together, so that a batch cannot be cut into parts.
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
        """The learning rate of `update` at each step of the training; the method logs it as `bank_lr`."""

    @abstractmethod
    def score(
        self, q_BD: Tensor, positive_B: Tensor, *, temperature: float, extra_BE: Tensor | None = None,
        objective: Objective | None = None, learn: bool = True,
    ) -> Score:  # fmt: skip
        """The loss of each query, [B], over all rows and extra columns; see `scoring.score`. Holds no B x K matrix and
        moves no row.

        Args:
            q_BD: unit queries.
            positive_B: int64, each query's positive: a value below `size` is a row, `size + e` is extra column e.
            temperature: of the queries' loss.
            extra_BE: cosines of the queries with vectors that are no rows, not divided by the temperature.
            objective: a loss other than InfoNCE, see `reweighted.score`; None is InfoNCE. A method passes this argument
                only where it has such a loss, so a bank without the argument serves InfoNCE.
            learn: whether the backward pass notes what the rows' gradient is computed from, for `update`.
        """

    def regulariser(self, q_BD: Tensor, *, temperature: float) -> Tensor | None:
        """A further term of the loss, a scalar, computed from the queries of all views of a step; None where the bank
        has no such term.
        """
        return None

    @abstractmethod
    def fill(self, keys_GD: Tensor, step: int) -> None:
        """Called after each step of a warm start: a bank that is filled by keys takes the step's keys as rows.

        Args:
            keys_GD: all ranks' unit keys of the step.
            step: of the warm start, counted from 0.
        """

    @abstractmethod
    def update(self, *, lr: float, keys_GD: Tensor) -> None:
        """Called after an optimiser step: a bank that learns moves its rows along their gradient, a queue takes the
        step's keys.

        Args:
            lr: the rows' learning rate of this step, from `rates`.
            keys_GD: all ranks' unit keys of the step.
        """

    def warning(self, statistics: dict[str, float]) -> str | None:
        """A sentence about what is wrong with the bank, judged by an epoch's values of `rows.statistics`; None where
        nothing is wrong.
        """
        return None

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As of `nn.Module`: the rows. No optimiser moves them, as the backward pass gives them no gradient."""
        raise NotImplementedError
