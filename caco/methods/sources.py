"""The sources that a query's positives and its negatives come from. A contrastive method consists of one source of
positives, one source of negatives, and a bank.

A source declares what it needs and what it costs, so no other code asks which class it is of. `Positives` and
`Negatives` have the defaults.

Shapes: B this rank's queries, G all ranks' queries, D width, E extra columns, C positives of a query.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from caco import distributed
from caco.banks.base import Bank
from caco.banks.hardest import hardest
from caco.banks.splitmix import uniform
from caco.data.loaders.batches import mixed_seed
from caco.errors import UserError
from caco.methods.base import Now
from caco.ranges import AboveZero, Count, Seed, Several, Share, held
from caco.schedules import RunShape, Table, cosine


class Step(NamedTuple):
    """What else a source, or the treatment of its negatives, may depend on in a step."""

    index_B: Tensor  # int64, the images' indices in the training set
    now: Now
    label_B: Tensor | None = None  # int64, the images' classes, -1 if unknown; None where nothing needs them


class Positive(NamedTuple):
    """The positives of B queries: either vectors of their own or rows of the bank."""

    vector_BD: Tensor | None = None  # unit vectors
    row_B: Tensor | None = None  # int64, indices over the whole bank
    weight_B: Tensor | None = None  # weight of the loss with this positive, for queries with several; None: 1


class Positives:
    """A source of positives. Called with unit keys [B, D] and the bank, it gives the positive of each key's query.

    needs_bank: whether there must be a bank. bank_rows: whether the positive is a row of the bank; the bank's rows must
    then be the negatives. searches: how many times a key searches the bank for its nearest row. lookups: how many times
    it fetches a row's vector. per_query: number of positives of a query. of_both_kinds: whether some of a query's
    positives are vectors and some are rows. classes: the number of classes of the labels that each training image must
    have; None: labels are not looked at, as in every method of the papers.
    """

    needs_bank = bank_rows = of_both_kinds = False
    searches = lookups = 0
    per_query = 1
    classes: int | None = None

    def __call__(self, k_BD: Tensor, bank: Bank | None) -> Positive:
        raise NotImplementedError

    def schedules(self, run: RunShape) -> dict[str, Table]:
        """Tables with one number for each step of the training, by name, as of `Method.schedules`; all are logged."""
        return {}

    def all_of(self, k_BD: Tensor, bank: Bank | None, step: Step | None) -> list[Positive]:
        """All positives of each query, as a list of `per_query` entries whose weights add up to 1. By default the list
        holds the one positive that a call gives.

        Args:
            k_BD: this rank's unit keys: those of the first key view of all images, then those of the next view.
            bank: the bank, if there is one.
            step: of the images; None outside a run.
        """
        return [self(k_BD, bank)]


class Negatives:
    """A source of negatives. Called with unit queries [B, D] and the unit keys of all ranks [G, D], it gives the
    queries' cosines with the negatives that are no rows of the bank, [B, E], or None if it has no such negatives.

    bank_rows: whether the bank's rows are negatives (too). columns_per_image: number of those cosines for each image of
    the global batch; if it is above 0, a batch that is cut into parts has fewer negatives.
    """

    bank_rows = False
    columns_per_image = 0

    def __call__(self, q_BD: Tensor, k_GD: Tensor) -> Tensor | None:
        return None


class OtherView(Positives):
    """The positive is the key of the image's other view (SimCLR, MoCo, AdCo)."""

    def __call__(self, k_BD: Tensor, bank: Bank | None) -> Positive:
        return Positive(vector_BD=k_BD)


class NearestKey(Positives):
    """The positive is the bank's row nearest to the key, as a vector of its own (as in NNCLR; Table VII, Positive).

    The paper's text says nearest to the query. Here the key of the other view chooses, as in the paper's Figure 2.

    Source: arXiv 2203.14370, Table VII.
    """

    needs_bank = True
    searches = lookups = 1

    def __call__(self, k_BD: Tensor, bank: Bank | None) -> Positive:
        assert bank is not None, "needs_bank"
        return Positive(vector_BD=bank.rows.lookup(bank.rows.most_probable(k_BD)))


class BankRow(Positives):
    """The positive is the bank's row that is most probable for the key (CaCo; arXiv 2203.14370, Eq. 11)."""

    needs_bank = bank_rows = True
    searches = 1

    def __call__(self, k_BD: Tensor, bank: Bank | None) -> Positive:
        assert bank is not None, "needs_bank"
        return Positive(row_B=bank.rows.most_probable(k_BD))


class NearestRows(Positives):
    """The positives are the several rows of the bank that are nearest to the key. Each is weighted by the softmax of
    its cosine with the key (`equations.several_positives_loss`). With a count of 1 this is `BankRow`.

    If one of the rows stands for another class than the image's, other rows may still stand for the right one. Later
    papers on CaCo's code weight several positives too, each by a formula of its own; this formula is ours.

    Args:
        count: number of rows, k.
        temperature: of the softmax over their cosines; the lower it is, the more the nearest row counts.
    """

    needs_bank = bank_rows = True
    searches = 1

    @held
    def __init__(self, *, count: Count = 5, temperature: AboveZero = 0.1):
        self.count, self.temperature = count, temperature
        self.per_query = self.lookups = count

    def all_of(self, k_BD: Tensor, bank: Bank | None, step: Step | None) -> list[Positive]:
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
    """Two positives: the key of the other view, and the bank's row that is most probable for it. The row's share of the
    loss changes over the training by a half cosine (`equations.several_positives_loss`). With a share that grows from
    0, a young bank, whose rows mostly stand for other classes than the image's, does little harm.

    Args:
        first_share, last_share: the row's share of the loss at the first step of the training and at its end.
    """

    needs_bank = bank_rows = of_both_kinds = True
    searches = 1
    per_query = 2

    @held
    def __init__(self, *, first_share: Share = 0.0, last_share: Share = 1.0):
        self.first_share, self.last_share = first_share, last_share

    def schedules(self, run: RunShape) -> dict[str, Table]:
        return {"row_share": cosine(run, self.first_share, self.last_share)}

    def all_of(self, k_BD: Tensor, bank: Bank | None, step: Step | None) -> list[Positive]:
        assert bank is not None, "needs_bank"
        share = self.last_share if step is None else step.now["row_share"]
        one_B = torch.ones_like(k_BD[:, 0])
        row_B = bank.rows.most_probable(k_BD)
        return [Positive(vector_BD=k_BD, weight_B=(1 - share) * one_B), Positive(row_B=row_B, weight_B=share * one_B)]


class RowOfClass(Positives):
    """For studies of what the choice of the positive is worth, with labels, which no method of the papers has. Row r
    stands for class r modulo `classes`. The positive is the row most probable for the key among those of one class:
    the image's own class with probability `correct`, otherwise one of the other classes at random.

    So `correct` is the purity of the choice: 1 is a bank that is never wrong, and 1 / classes is one that knows nothing
    of classes. Compared with `pn=none` at equal steps, it shows which purity a bank needs to be of use.

    Every rank fetches the whole bank and compares it with its keys in one product, [B, K]: this is meant for the small
    banks of a study. `caco.plan` counts it as one search, so with several ranks it counts too few messages.

    Args:
        classes: number of classes of the labels.
        correct: probability of the image's own class.
        seed: of the draws, together with the step, the image and the view.
    """

    classes: int
    needs_bank = bank_rows = True
    searches = 1

    @held
    def __init__(self, *, classes: Several, correct: Share, seed: Seed = 0):
        self.classes, self.correct, self.seed = classes, correct, seed

    def all_of(self, k_BD: Tensor, bank: Bank | None, step: Step | None) -> list[Positive]:
        """As of `Positives`. Raises UserError if the bank has fewer rows than there are classes."""
        assert bank is not None and step is not None and step.label_B is not None, "needs_bank, and classes"
        if bank.size < self.classes:
            raise UserError(
                f"method.positives: expected at least one row for each of the {self.classes} classes, got {bank.size}"
            )
        views = len(k_BD) // len(step.index_B)
        draws_B2 = torch.cat(
            [uniform(mixed_seed(self.seed, step.now.step, view), step.index_B, 2) for view in range(views)]
        )
        own_B = step.label_B.repeat(views)
        other_B = (own_B + 1 + (draws_B2[:, 1] * (self.classes - 1)).long()) % self.classes
        class_B = torch.where(draws_B2[:, 0] < self.correct, own_B, other_B)
        row_K = torch.arange(bank.size, device=k_BD.device)
        cosine_BK = k_BD.detach() @ bank.rows.lookup(row_K).T
        of_others_BK = row_K % self.classes != class_B[:, None]
        row_B = cosine_BK.masked_fill_(of_others_BK, -torch.inf).argmax(1)
        bank.rows.note_chosen(row_B)
        return [Positive(row_B=row_B)]


class BatchKeys(Negatives):
    """The negatives are the keys of the batch's other images, over all ranks (Table VII, None and Positive)."""

    columns_per_image = 1

    def __call__(self, q_BD: Tensor, k_GD: Tensor) -> Tensor:
        """Cosines [B, G] of the queries with all keys; -inf masks out the key of the query's own image."""
        own_B = torch.arange(len(q_BD), device=q_BD.device) + distributed.rank() * len(q_BD)
        return (q_BD @ k_GD.T).scatter(1, own_B[:, None], -torch.inf)


class BatchBothViews(Negatives):
    """The negatives are both views of the batch's other images, over all ranks: 2G - 2 negatives (SimCLR)."""

    columns_per_image = 2

    def __call__(self, q_BD: Tensor, k_GD: Tensor) -> Tensor:
        other_views, same_view = BatchKeys(), distributed.gather_with_gradient(q_BD)
        return torch.cat([other_views(q_BD, k_GD), other_views(q_BD, same_view)], 1)


class BankRows(Negatives):
    """The negatives are all rows of the bank except the positive (CaCo, MoCo; Table VII, Negative and
    Positive+Negative).
    """

    bank_rows = True


class BankRowsAndBatchKeys(BatchKeys):
    """The negatives are all rows of the bank and the keys of the batch's other images (AdCo, whose authors say that the
    latter are for stability).
    """

    bank_rows = True
