"""Where a query's positive comes from, and where its negatives come from. A method is a pair of these and a bank.

A source declares what it needs and costs, and nobody asks for its class: `Positives` and `Negatives` have the defaults.

Shapes: B this rank's queries, G all ranks' queries, D width, E extra columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from caco import distributed
from caco.banks.base import Bank
from caco.banks.hardest import hardest
from caco.errors import UserError
from caco.methods.base import Now
from caco.ranges import AboveZero, Count, Share, held
from caco.schedules import RunShape, Table, cosine


class Positive(NamedTuple):
    """A query's positive: either a vector of its own or a row of the bank."""

    vector_BD: Tensor | None = None
    row_B: Tensor | None = None
    weight_B: Tensor | None = None  # of the query's loss with this positive, where it has several; None: 1


class Positives:
    """Called with unit keys [B, D] and the bank; gives each key's query its positive.

    needs_bank: whether there must be one. bank_rows: whether the positive is a row of it, which the bank's rows as
    negatives then have to hold. searches, lookups: how often a key looks for its nearest row, and how often it fetches
    a row's vector. per_query: how many positives a query has; of_both_kinds: whether some are vectors and some are
    rows.
    """

    needs_bank = bank_rows = of_both_kinds = False
    searches = lookups = 0
    per_query = 1

    def __call__(self, k_BD: Tensor, bank: Bank | None) -> Positive:
        raise NotImplementedError

    def schedules(self, run: RunShape) -> dict[str, Table]:
        """Name -> one number for each step of the training, as of a method; all are logged."""
        return {}

    def all_of(self, k_BD: Tensor, bank: Bank | None, now: Now | None) -> list[Positive]:
        """Each query's positives, whose weights add up to 1; where it has one, that. now: of the step, None outside a
        run.
        """
        return [self(k_BD, bank)]


class Negatives:
    """Called with unit queries [B, D] and the unit keys of all ranks [G, D]; gives cosines of extra columns [B, E], or
    None.

    bank_rows: whether the bank's rows are negatives besides. columns_per_image: extra columns for each image of the
    global batch; where there are any, a part of a batch has fewer.
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


class NearestRows(Positives):
    """Several rows of the bank itself, those nearest to the key, each weighted by the softmax of its cosine with the
    key (`equations.several_positives_loss`). With a count of 1 it is `BankRow`.

    Where one row is of another class than the image, others may not be: later papers on CaCo's code weight positives
    so, each by a formula of its own; this one is ours.

    Args:
        count: rows, k.
        temperature: of the softmax over their cosines; the lower, the more the nearest counts.
    """

    needs_bank = bank_rows = True
    searches = 1

    @held
    def __init__(self, *, count: Count = 5, temperature: AboveZero = 0.1):
        self.count, self.temperature = count, temperature
        self.per_query = self.lookups = count

    def all_of(self, k_BD: Tensor, bank: Bank | None, now: Now | None) -> list[Positive]:
        assert bank is not None, "needs_bank"
        if self.count > bank.size:
            raise UserError(f"method.positives.count: expected at most the bank's {bank.size} rows, got {self.count}")
        row_BC = hardest(k_BD, bank.rows, self.count)
        bank.rows.note_chosen(row_BC.flatten())
        m_BCD = bank.rows.lookup(row_BC.flatten()).unflatten(0, row_BC.shape)
        weight_BC = torch.softmax(torch.einsum("bd,bcd->bc", k_BD.detach(), m_BCD) / self.temperature, 1)
        return [
            Positive(row_B=row_B, weight_B=weight_B)
            for row_B, weight_B in zip(row_BC.unbind(1), weight_BC.unbind(1), strict=True)
        ]


class OtherViewThenRow(Positives):
    """The key of the other view and the bank's most probable row, whose share of the loss grows from one number to
    another over the training, by a half cosine (`equations.several_positives_loss`). A young bank, whose rows are
    mostly of other classes than the image, then does little harm.

    Args:
        first_share, last_share: of the row, at the first step of the training and at its end.
    """

    needs_bank = bank_rows = of_both_kinds = True
    searches = 1
    per_query = 2

    @held
    def __init__(self, *, first_share: Share = 0.0, last_share: Share = 1.0):
        self.first_share, self.last_share = first_share, last_share

    def schedules(self, run: RunShape) -> dict[str, Table]:
        return {"row_share": cosine(run, self.first_share, self.last_share)}

    def all_of(self, k_BD: Tensor, bank: Bank | None, now: Now | None) -> list[Positive]:
        assert bank is not None, "needs_bank"
        share = self.last_share if now is None else now["row_share"]
        one_B = torch.ones_like(k_BD[:, 0])
        row_B = bank.rows.most_probable(k_BD)
        return [Positive(vector_BD=k_BD, weight_B=(1 - share) * one_B), Positive(row_B=row_B, weight_B=share * one_B)]


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
