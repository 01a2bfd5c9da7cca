"""The many rows of a bank that are nearest to each query, and their vectors: MoCHi mixes further negatives from them.

The rows may be sharded over ranks: the queries are gathered, each rank searches its own rows, and the candidates are
sent to the rank that has the query. After that, each row that some rank has chosen is sent once. No B x K matrix is
held, and nothing of size K x D travels unless all rows are chosen.

Shapes: B this rank's queries, G all ranks' queries, R this rank's rows, S rows in one block, H rows found for a query,
E rows chosen from these for it, U rows chosen for some query, N candidates for a query so far, A those and a block's
rows, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from caco import distributed
from caco.banks import scoring
from caco.banks.rows import Rows


@torch.no_grad()
def hardest(q_BD: Tensor, rows: Rows, count: int, left_out_B: Tensor | None = None) -> Tensor:
    """For each query the `count` rows with the largest cosines, as indices over the whole bank, int64 [B, H], the
    largest cosine first. If there are fewer rows, all of them. A collective.

    Args:
        q_BD: unit queries of this rank.
        rows: the bank's rows.
        count: rows wanted for each query.
        left_out_B: int64, for each query one row that must not be found, as it is the positive; None where every row
            may be found.
    """
    count = min(count, rows.size - (left_out_B is not None))
    with torch.autocast(q_BD.device.type, enabled=False):
        q_GD = distributed.gather(q_BD)
        left_out_G = None if left_out_B is None else distributed.gather(left_out_B) - rows.first
        value_GN, row_GN = _of_these_rows(q_GD, rows.weight, count, left_out_G)
        most = min(count, -(-rows.size // distributed.world()))  # that any rank can have found: all must send as many
        value_GN, row_GN = (
            F.pad(value_GN, (0, most - value_GN.shape[1]), value=-torch.inf),
            F.pad(row_GN, (0, most - row_GN.shape[1])),
        )
        value_BN, row_BN = (distributed.exchange(x).transpose(0, 1).flatten(1) for x in (value_GN, row_GN + rows.first))
        return row_BN.gather(1, value_BN.topk(count, dim=1).indices)


def _of_these_rows(q_GD: Tensor, w_RD: Tensor, count: int, left_out_G: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest cosines among this rank's rows and the indices of these rows, the largest first, [G, min(count, R)]
    each.
    """
    kept = min(count, len(w_RD))
    value_GN, row_GN = q_GD.new_empty(len(q_GD), 0), torch.empty(len(q_GD), 0, dtype=torch.int64, device=q_GD.device)
    # With blocks of hardly more rows than are kept, sorting would take most of the time.
    step = max(scoring.BLOCK_ELEMENTS // len(q_GD), 4 * kept)
    for start in range(0, len(w_RD), step):
        cosine_GS = q_GD @ scoring.unit_rows(w_RD[start : start + step])[0].T
        row_S = torch.arange(start, start + cosine_GS.shape[1], device=q_GD.device)
        if left_out_G is not None:
            cosine_GS.masked_fill_(row_S == left_out_G[:, None], -torch.inf)
        value_GA = torch.cat([value_GN, cosine_GS], 1)
        row_GA = torch.cat([row_GN, row_S.expand(len(q_GD), -1)], 1)
        value_GN, best_GN = value_GA.topk(min(kept, value_GA.shape[1]), dim=1)
        row_GN = row_GA.gather(1, best_GN)
    return value_GN, row_GN


@torch.no_grad()
def fetch(rows: Rows, row_BE: Tensor) -> tuple[Tensor, Tensor]:
    """The unit rows that all ranks ask for together, each once, [U, D]; and for each entry of `row_BE` its place among
    them, int64 [B, E]. A collective.

    With one rank no row travels, and a row that is asked for more than once may come more than once, because the host
    would have to wait for a GPU to count the different ones: U is the bank's size or the number of entries of `row_BE`,
    whichever is smaller.

    Args:
        rows: the bank's rows.
        row_BE: int64, rows that this rank asks for, as indices over the whole bank.
    """
    if distributed.world() == 1:
        if rows.size <= row_BE.numel():
            return scoring.unit_rows(rows.weight.detach())[0], row_BE
        of_each = torch.arange(row_BE.numel(), device=row_BE.device).view_as(row_BE)
        return scoring.unit_rows(rows.weight.detach()[row_BE.flatten()])[0], of_each
    row_U = torch.unique(distributed.gather(row_BE))
    return rows.rows_of_all(row_U), torch.searchsorted(row_U, row_BE)
