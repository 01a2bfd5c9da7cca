"""Refuses queries and rows that cannot be scored: at once, or where the host would have to wait for a GPU, later.

Shapes: G all ranks' queries, R this rank's rows, D width.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from caco import distributed
from caco.errors import UserError
from caco.saying import amount


class UnusableError(UserError):
    """The queries or rows cannot be scored. This is raised before anything is updated with their loss; but within
    `looked_at_later` (training on a GPU) it comes up to one step later, after one update with a loss that is NaN."""


class Held(NamedTuple):
    """Whether queries that were scored have usable sums, and the queries' norms, which may say why not."""

    usable: Tensor
    norm_G: Tensor

    def refuse_if_wrong(self) -> None:
        """Raise an UnusableError if the sums are not usable. It names no rows, as they may have moved since."""
        if not self.usable:
            _refuse_queries(self.norm_G)
            raise UnusableError(
                "rows of the bank have no direction: expected finite norms above zero; try a lower bank_learning.lr"
            )


_later: list[Held] | None = None


@contextlib.contextmanager
def looked_at_later() -> Iterator[list[Held]]:
    """Within this context nothing is refused, because the host would have to wait for a GPU: the loss of queries that
    cannot be scored is NaN, and the list that is yielded says why."""
    global _later
    before, _later = _later, []
    try:
        yield _later
    finally:
        _later = before


def held_to(usable: Tensor, z: list[Tensor], q_GD: Tensor, w_RD: Tensor, first_row: int) -> list[Tensor]:
    """The sums; refused if they are not usable, now or, within `looked_at_later`, later. A collective."""
    if _later is not None:
        _later.append(Held(usable, q_GD.norm(dim=1)))
        return [x.masked_fill(~usable, torch.nan) for x in z]
    if not usable:
        refuse(q_GD, w_RD, first_row)
    return z


def refuse(q_GD: Tensor, w_RD: Tensor, first_row: int) -> None:
    """Raise an UnusableError that names what made the sums infinite or NaN: rows without a direction, or queries that
    are not unit vectors. A collective, as the row may be on any rank.
    """
    norm_R = w_RD.norm(dim=1)
    rows = ((norm_R == 0) | ~torch.isfinite(norm_R)).nonzero()[:, 0]
    found = distributed.all_objects([(first_row + int(row), float(norm_R[row])) for row in rows[:1]] + [len(rows)])
    first = next((report[0] for report in found if len(report) > 1), None)
    if first is not None:
        num_rows = sum(report[-1] for report in found)
        raise UnusableError(
            f"{amount(num_rows, 'row')} of the bank {'has' if num_rows == 1 else 'have'} no direction; the first is row"
            f" {first[0]}, whose norm is {first[1]}: expected finite norms above zero; try a lower bank_learning.lr"
        )
    norm_G = q_GD.norm(dim=1)
    _refuse_queries(norm_G)
    raise _unusable(0, norm_G, 0)


def _refuse_queries(norm_G: Tensor) -> None:
    wrong = (~((norm_G - 1).abs() < 1e-2)).nonzero()[:, 0]
    if len(wrong):
        raise _unusable(len(wrong), norm_G, int(wrong[0]))


def _unusable(count: int, norm_G: Tensor, number: int) -> UnusableError:
    return UnusableError(
        f"{count} of {len(norm_G)} queries are not finite unit vectors; the first is query {number}, whose norm is "
        f"{float(norm_G[number])}: expected 1; try a lower optimizer.lr, or precision=fp32"
    )
