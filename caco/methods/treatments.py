"""Treatments of a query's negatives: they are reweighted (debiased, hard), shifted by a margin (IFM), or mixed to make
further ones (MoCHi).

The negatives themselves come from a source (caco/methods/sources.py). Each treatment goes with every source that has
what the treatment needs. It declares what it needs and what it costs, so no other code asks which class it is of. Plain
negatives have no treatment.

Shapes: B this rank's images, N queries of all terms, term by term, H rows that a query chooses from, E columns made for
it, U rows used by some query, D width.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from caco.banks.base import Bank
from caco.banks.hardest import fetch, hardest
from caco.banks.reweighted import Objective
from caco.banks.splitmix import uniform
from caco.data.loaders.batches import mixed_seed
from caco.errors import UserError
from caco.methods.sources import Negatives, Step
from caco.ranges import Count, Natural, NonNegative, Seed, ShareBelowOne, held

PART_ELEMENTS = 1 << 23  # numbers in the synthetic rows that are held at a time: 32 MiB in float32


class Treatment:
    """The base class of treatments. Its defaults need nothing and change nothing.

    needs_bank_rows: whether the bank's rows have to be negatives. objective: the loss, if it is not InfoNCE; its sums
    go over all negatives, whichever source they come from. candidates, drawn, synthetic: numbers of rows that a query
    chooses from, of draws from these, and of negatives made from the drawn rows (see `Costs` in caco/methods/base.py).
    """

    needs_bank_rows = False
    objective: Objective | None = None
    candidates = drawn = synthetic = 0

    def columns(
        self, q_ND: Tensor, positive_row_N: Tensor | None, bank: Bank | None, step: Step | None
    ) -> Tensor | None:
        """Cosines of the queries with further negatives, [N, E]; None if the treatment makes none in this step.

        Args:
            q_ND: unit queries.
            positive_row_N: int64, the row of the bank that is each query's positive; None if the positives are no rows.
            bank: the bank, if there is one.
            step: of the images.
        """
        return None

    def costs(self, *, rows_are_positives: bool) -> dict[str, Any]:
        """The fields that the treatment sets in a method's `Costs`."""
        sums = 0 if self.objective is None else len(self.objective.exponents)
        left_out = self.objective is not None and rows_are_positives
        return {
            "sums": sums,
            "left_out": left_out,
            "candidates": self.candidates,
            "drawn": self.drawn,
            "synthetic": self.synthetic,
        }


def require_treatable(treatment: Treatment | None, negatives: Negatives, bank: Bank | None) -> None:
    """Check that a treatment goes with the negatives and the bank. Only this function decides that.

    Raises:
        UserError: the treatment needs the bank's rows as negatives and they are none, or it has another loss than
            InfoNCE and the bank does not take one.
    """
    if treatment is None:
        return
    name = type(treatment).__name__
    if treatment.needs_bank_rows and not negatives.bank_rows:
        raise UserError(
            f"negatives: {name} makes further negatives from the bank's rows, but with {type(negatives).__name__} the"
            " rows are no negatives; expected method=mocov2, method=adco, pn=both or pn=negative, where the rows are"
            " negatives, or another treatment: plain, debiased, hard, margin"
        )
    if (
        treatment.objective is not None
        and bank is not None
        and "objective" not in inspect.signature(bank.score).parameters
    ):
        raise UserError(
            f"negatives: {name} has a loss other than InfoNCE, but {type(bank).__name__}.score takes no `objective` "
            "(caco/banks/base.py); expected negatives=plain, or a bank that passes it on to caco.banks.reweighted.score"
        )


class Reweighted(Treatment):
    """Debiased and hard negatives: the sum over the negatives is estimated without false negatives, and negatives near
    the query get more weight in it.

    For a query with N negatives, pos = exp(q.m_+ / tau) and neg_j = exp(q.m_j / tau):
        R = N sum_j neg_j^(1 + beta) / sum_j neg_j^beta
        loss = -log pos / (pos + max((R - tau_+ N pos) / (1 - tau_+), N exp(-1 / tau)))
    Gradients flow through the weights and through pos in the difference. Where the second argument of the maximum is
    the larger, the negatives get no gradient. Published with SimCLR's positives and negatives; with any others the
    estimate is the same.

    Args:
        positive_share: tau_+, the share of the negatives that is assumed to be of the query's own class, in [0, 1).
        concentration: beta, 0 or more. 0 gives all negatives the same weight, which is the debiased loss.

    Source: arXiv 2010.04592; with beta 0 arXiv 2007.00224.
    """

    @held
    def __init__(self, *, positive_share: ShareBelowOne = 0.1, concentration: NonNegative = 1.0):
        self.positive_share, self.concentration = positive_share, concentration
        self.exponents = (1 + concentration, concentration) if concentration else (1.0,)
        self.objective = self

    def __call__(self, positive_B: Tensor, log_sums: Sequence[Tensor], count_B: Tensor, tau: float) -> Tensor:
        """The loss of each query, [B]; see `reweighted.Objective`."""
        log_count_B = count_B.to(positive_B.dtype).log()
        log_r_B = log_count_B + log_sums[0] - log_sums[1] if self.concentration else log_sums[0]
        lowest_B = log_count_B - 1 / tau
        if not self.positive_share:
            log_ng_B = torch.maximum(log_r_B, lowest_B)
        else:
            below_B = (
                math.log(self.positive_share) + log_count_B + positive_B - log_r_B
            )  # log of the subtracted term tau_+ N pos as a share of R
            some_left_B = below_B < 0
            left_B = torch.log1p(-below_B.masked_fill(~some_left_B, -1.0).exp())
            estimate_B = log_r_B + left_B - math.log1p(-self.positive_share)
            log_ng_B = torch.where(some_left_B, torch.maximum(estimate_B, lowest_B), lowest_B)
        return torch.logaddexp(positive_B, log_ng_B) - positive_B


class Margin(Treatment):
    """Implicit feature modification: the loss itself is averaged with the loss of cosines that are moved by epsilon to
    make it harder, the positive's down and all negatives' up.

    loss = (CE(cosines) + alpha CE(moved cosines)) / (1 + alpha). A shift that all cosines share does not change a cross
    entropy, so moving them is the same as a margin of 2 epsilon on the positive alone. Published with MoCo v2.

    Args:
        epsilon: how far the cosines are moved, 0 or more.
        alpha: weight of the moved loss, 0 or more; None takes the moved loss alone ("ifm_only" in the published code).

    Source: arXiv 2106.11230.
    """

    exponents = (1.0,)

    @held
    def __init__(self, *, epsilon: NonNegative = 0.1, alpha: NonNegative | None = 1.0):
        self.epsilon, self.alpha = epsilon, alpha
        self.objective = self

    def __call__(self, positive_B: Tensor, log_sums: Sequence[Tensor], count_B: Tensor, tau: float) -> Tensor:
        """The loss of each query, [B]; see `reweighted.Objective`."""

        def cross_entropy(positive_B: Tensor) -> Tensor:
            return torch.logaddexp(positive_B, log_sums[0]) - positive_B

        moved_B = cross_entropy(positive_B - 2 * self.epsilon / tau)
        return moved_B if self.alpha is None else (cross_entropy(positive_B) + self.alpha * moved_B) / (1 + self.alpha)


class Mixed(Treatment):
    """MoCHi: further negatives for each query, mixed from the bank's negatives that are nearest to it (the hardest),
    either from two of these or from one of these and the query.

    The mixtures are n(a m_i + (1 - a) m_j) with a from U(0, 1), and n(b q + (1 - b) m_j) with b from U(0, 1/2), where
    the rows are drawn from the hardest ones, i = j is allowed, and n(x) = x / |x|. No gradient flows into a mixture,
    neither to its rows nor to the q in it, so the mixtures are constants among the query's negatives. The rows of a
    bank that learns move along the gradient of the loss that has the mixtures in its denominator. Each query and step
    has new draws, which depend on (seed, step, term, image) alone. Published with MoCo v2.

    Args:
        hardest: N, number of the bank's hardest rows that a query's rows are drawn from; all negatives if they are
            fewer.
        pairs: s, number of mixtures of two rows.
        with_query: s', number of mixtures of the query and a row.
        warmup_epochs: number of epochs at the start of the training without mixtures.
        seed: of the draws.

    Source: arXiv 2010.01028.
    Raises:
        UserError: neither pairs nor mixtures with the query are wanted.
    """

    needs_bank_rows = True

    @held
    def __init__(
        self,
        *,
        hardest: Count = 1024,
        pairs: Natural = 1024,
        with_query: Natural = 128,
        warmup_epochs: Natural = 15,
        seed: Seed = 0,
    ):
        if pairs + with_query == 0:
            raise UserError("one of negatives.pairs and negatives.with_query must be above 0; got 0 for both")
        self.pairs, self.with_query, self.warmup_epochs, self.seed = pairs, with_query, warmup_epochs, seed
        self.candidates, self.drawn, self.synthetic = hardest, 2 * pairs + with_query, pairs + with_query

    def columns(
        self, q_ND: Tensor, positive_row_N: Tensor | None, bank: Bank | None, step: Step | None
    ) -> Tensor | None:
        """Each query's cosines with its mixtures, [N, E], mixtures of pairs first; None in the warm-up."""
        assert bank is not None and step is not None, "needs_bank_rows; a step of the training has images"
        assert step.now.epoch is not None, "the warm start has plain negatives"
        if step.now.epoch < self.warmup_epochs:
            return None
        row_NH = hardest(q_ND, bank.rows, self.candidates, positive_row_N)
        chosen_NE, share_NE = self.draws(step, len(q_ND), row_NH.shape[1])
        m_UD, at_NE = fetch(bank.rows, row_NH.gather(1, chosen_NE.to(q_ND.device)))
        share_NE = share_NE.to(q_ND)
        queries = max(1, PART_ELEMENTS // (self.synthetic * q_ND.shape[1]))
        parts = zip(*(x.split(queries) for x in (q_ND, at_NE, share_NE)), strict=True)
        with torch.autocast(q_ND.device.type, enabled=False):
            # The backward pass computes the mixtures again: holding those of a large batch would take more memory than
            # the bank.
            cosines = [
                checkpoint(self._cosines, q_nD, m_UD, at_nE, share_nE, use_reentrant=False, preserve_rng_state=False)
                for q_nD, at_nE, share_nE in parts
            ]
        return torch.cat(cosines)

    def draws(self, step: Step, num_queries: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """The draws of a step: which of each query's hardest rows are mixed, int64 [N, 2 s + s'] in [0, num_rows), in
        the order first rows of the pairs, second rows of the pairs, rows mixed with the query; and the share of the
        pair's first row, or of the query, in each mixture, [N, s + s'].

        Args:
            num_queries: N.
            num_rows: how many hardest rows each query has.
        """
        index_B = step.index_B
        numbers_NE = torch.cat(
            [
                uniform(mixed_seed(self.seed, step.now.step, term), index_B, self.drawn + self.synthetic)
                for term in range(num_queries // len(index_B))
            ]
        )
        drawn_NE, share_NE = numbers_NE.split([self.drawn, self.synthetic], 1)
        share_NE[:, self.pairs :] *= 0.5
        return (drawn_NE * num_rows).long(), share_NE

    def _cosines(self, q_ND: Tensor, m_UD: Tensor, at_NE: Tensor, share_NE: Tensor) -> Tensor:
        first_NS, second_NE = at_NE.split([self.pairs, self.synthetic], 1)
        own_NED = q_ND.detach()[:, None].expand(-1, self.with_query, -1)
        mixed_NED = torch.lerp(m_UD[second_NE], torch.cat([m_UD[first_NS], own_NED], 1), share_NE[:, :, None])
        return torch.einsum("ned,nd->ne", F.normalize(mixed_NED, dim=2), q_ND)
