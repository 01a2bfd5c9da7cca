"""Where a query's positive comes from, and where its negatives come from. A method is a pair of these and a bank.

A source declares what it needs and costs, and nobody asks for its class: `Positives` and `Negatives` have the defaults.

Shapes: B this rank's queries, G all ranks' queries, D width, E extra columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from caco import distributed
from caco.banks.base import Bank


class Positive(NamedTuple):
    """A query's positive: either a vector of its own or a row of the bank."""

    vector_BD: Tensor | None = None
    row_B: Tensor | None = None


class Positives:
    """Called with unit keys [B, D] and the bank; gives each key's query its positive.

    needs_bank: whether there must be one. bank_rows: whether the positive is a row of it, which the bank's rows as negatives then
    have to hold. searches, lookups: how often a key looks for its nearest row, and how often it fetches a row's vector.
    """

    needs_bank = bank_rows = False
    searches = lookups = 0

    def __call__(self, k_BD: Tensor, bank: Bank | None) -> Positive:
        raise NotImplementedError


class Negatives:
    """Called with unit queries [B, D] and the unit keys of all ranks [G, D]; gives cosines of extra columns [B, E], or None.

    bank_rows: whether the bank's rows are negatives besides. columns_per_image: extra columns for each image of the global batch;
    where there are any, a part of a batch has fewer.
    """

    bank_rows = False
    columns_per_image = 0

    def __call__(self, q_BD: Tensor, k_GD: Tensor) -> Tensor | None:
        return None


class OtherView(Positives):
    """The key of the image's other view (SimCLR, MoCo, AdCo)."""

    def __call__(self, k_BD: Tensor, bank: Bank | None) -> Positive:
        return Positive(vector_BD=k_BD)


class NearestKey(Positives):
    """The bank's row nearest to the key, as a vector of its own (NNCLR-like; Table VII, Positive).

    The paper's words are nearest to the query; as in Figure 2 we let the key of the other view choose.
    """

    needs_bank = True
    searches = lookups = 1

    def __call__(self, k_BD: Tensor, bank: Bank | None) -> Positive:
        assert bank is not None, "needs_bank"
        return Positive(vector_BD=bank.rows.lookup(bank.rows.most_probable(k_BD)))


class BankRow(Positives):
    """The most probable row of the bank itself, chosen by the key (CaCo, Eq. 11)."""

    needs_bank = bank_rows = True
    searches = 1

    def __call__(self, k_BD: Tensor, bank: Bank | None) -> Positive:
        assert bank is not None, "needs_bank"
        return Positive(row_B=bank.rows.most_probable(k_BD))


class BatchKeys(Negatives):
    """The keys of the batch's other images, over all ranks (Table VII, None and Positive)."""

    columns_per_image = 1

    def __call__(self, q_BD: Tensor, k_GD: Tensor) -> Tensor:
        """Cosines [B, G], the query's own image masked out by -inf."""
        own_B = torch.arange(len(q_BD), device=q_BD.device) + distributed.rank() * len(q_BD)
        return (q_BD @ k_GD.T).scatter(1, own_B[:, None], -torch.inf)


class BatchBothViews(Negatives):
    """Both views of the batch's other images: 2B - 2 negatives (SimCLR)."""

    columns_per_image = 2

    def __call__(self, q_BD: Tensor, k_GD: Tensor) -> Tensor:
        other_views, same_view = BatchKeys(), distributed.gather_with_gradient(q_BD)
        return torch.cat([other_views(q_BD, k_GD), other_views(q_BD, same_view)], 1)


class BankRows(Negatives):
    """Every row of the bank but the positive (CaCo, MoCo; Table VII, Negative and Positive+Negative)."""

    bank_rows = True


class BankRowsAndBatchKeys(BatchKeys):
    """Every row of the bank and the other keys of the batch (AdCo: for stability, its authors say)."""

    bank_rows = True
