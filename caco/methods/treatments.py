"""What is made of a query's negatives before they count: reweighted (debiased, hard), kept at a margin (IFM), mixed
(MoCHi).

Where negatives come from says a source (caco/methods/sources.py); each of these goes with every source that has what it
needs, and declares what that is and costs: nobody asks for its class. Plain negatives have no treatment.

Shapes: B this rank's images, N queries of all terms, term by term, H rows that a query chooses from, E columns made for
it, U rows used by some query, D width.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from caco import devices
from caco.banks.base import Bank
from caco.banks.hardest import fetch, hardest
from caco.banks.reweighted import Objective
from caco.banks.splitmix import uniform
from caco.data.loaders.batches import mixed_seed
from caco.errors import UserError
from caco.methods.base import Now
from caco.methods.sources import Negatives
from caco.ranges import Count, Natural, NonNegative, Seed, ShareBelowOne, held

PART_ELEMENTS = 1 << 23  # of the synthetic rows that are held at a time: 32 MiB in float32


class Step(NamedTuple):
    """What draws depend on."""

    index_B: Tensor  # of the images, int64, in the source
    now: Now


class Treatment:
    """The defaults: nothing is needed, and nothing done.

    needs_bank_rows: whether the bank's rows have to be negatives. objective: the loss where it is another than InfoNCE;
    its sums go over all negatives of whatever source. candidates, drawn, synthetic: rows that a query chooses from,
    draws of these, and columns made of them (caco/methods/base.py: Costs).
    """

    needs_bank_rows = False
    objective: Objective | None = None
    candidates = drawn = synthetic = 0

    def columns(
        self, q_ND: Tensor, positive_row_N: Tensor | None, bank: Bank | None, step: Step | None
    ) -> Tensor | None:
        """Cosines of further negatives with unit queries, [N, E]; of queries whose positive is that row of the bank, if
        it is one.
        """
        return None

    def costs(self, *, rows_are_positives: bool) -> dict[str, Any]:
        """What it adds to a method's Costs."""
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
    """Refuse a treatment that lacks something to treat; the one place that decides which goes with which negatives."""
    if treatment is None:
        return
    name = type(treatment).__name__
    if treatment.needs_bank_rows and not negatives.bank_rows:
        raise UserError(
            f"negatives: {name} makes negatives of the bank's rows, and these are no negatives with"
            f" {type(negatives).__name__}; expected method=mocov2, method=adco, pn=both or pn=negative, whose negatives"
            " they are, or another treatment: plain, debiased, hard, margin"
        )
    if (
        treatment.objective is not None
        and bank is not None
        and "objective" not in inspect.signature(bank.score).parameters
    ):
        raise UserError(
            f"negatives: {name} is another loss than InfoNCE, and {type(bank).__name__}.score takes no `objective` "
            "(caco/banks/base.py); expected negatives=plain, or a bank that passes it on to caco.banks.reweighted.score"
        )


class Reweighted(Treatment):
    """Debiased and hard negatives: their sum estimated without false ones, and with more weight on those near the
    query.

    Of a query with N negatives, pos = exp(q.m_+ / tau) and neg_j = exp(q.m_j / tau):
        R = N sum_j neg_j^(1 + beta) / sum_j neg_j^beta
        loss = -log pos / (pos + max((R - tau_+ N pos) / (1 - tau_+), N exp(-1 / tau)))
    Gradients flow through the weights and through pos in the difference; where the maximum is the second, none comes to
    the negatives. Published on SimCLR (arXiv 2010.04592, and 2007.00224 with beta 0); with any other positives and
    negatives it is the same estimate.

    Args:
        positive_share: tau_+, how many of the negatives are taken for positives, in [0, 1). 0: none.
        concentration: beta, 0 or more. 0 gives all negatives the same weight: the debiased loss.
    """

    @held
    def __init__(self, *, positive_share: ShareBelowOne = 0.1, concentration: NonNegative = 1.0):
        self.positive_share, self.concentration = positive_share, concentration
        self.exponents = (1 + concentration, concentration) if concentration else (1.0,)
        self.objective = self

    def __call__(self, positive_B: Tensor, log_sums: Sequence[Tensor], count_B: Tensor, tau: float) -> Tensor:
        """The loss of each query, [B]; see `Objective`."""
        log_count_B = count_B.to(positive_B.dtype).log()
        log_r_B = log_count_B + log_sums[0] - log_sums[1] if self.concentration else log_sums[0]
        lowest_B = log_count_B - 1 / tau
        if not self.positive_share:
            log_ng_B = torch.maximum(log_r_B, lowest_B)
        else:
            below_B = (
                math.log(self.positive_share) + log_count_B + positive_B - log_r_B
            )  # log of what is taken away, as a part of R
            some_left_B = below_B < 0
            left_B = torch.log1p(-devices.where_or(some_left_B, below_B, -1.0).exp())
            estimate_B = log_r_B + left_B - math.log1p(-self.positive_share)
            log_ng_B = torch.where(some_left_B, torch.maximum(estimate_B, lowest_B), lowest_B)
        return torch.logaddexp(positive_B, log_ng_B) - positive_B


class Margin(Treatment):
    """Implicit feature modification: besides the loss itself, that of cosines moved by epsilon against it, the
    positive's down, all negatives' up.

    loss = (CE(cosines) + alpha CE(moved cosines)) / (1 + alpha). A shift common to all changes no cross entropy, so
    moving them is a margin of 2 epsilon on the positive alone. Published on MoCo v2 (arXiv 2106.11230).

    Args:
        epsilon: of a cosine, 0 or more.
        alpha: weight of the moved loss, 0 or more; None for that alone ("ifm_only" in the published code).
    """

    exponents = (1.0,)

    @held
    def __init__(self, *, epsilon: NonNegative = 0.1, alpha: NonNegative | None = 1.0):
        self.epsilon, self.alpha = epsilon, alpha
        self.objective = self

    def __call__(self, positive_B: Tensor, log_sums: Sequence[Tensor], count_B: Tensor, tau: float) -> Tensor:
        """The loss of each query, [B]; see `Objective`."""

        def cross_entropy(positive_B: Tensor) -> Tensor:
            return torch.logaddexp(positive_B, log_sums[0]) - positive_B

        moved_B = cross_entropy(positive_B - 2 * self.epsilon / tau)
        return moved_B if self.alpha is None else (cross_entropy(positive_B) + self.alpha * moved_B) / (1 + self.alpha)


class Mixed(Treatment):
    """MoCHi: further negatives for each query, mixed from the negatives of the bank that are nearest to it, with one
    another and with itself.

    n(a m_i + (1 - a) m_j) with a from U(0, 1), and n(b q + (1 - b) m_j) with b from U(0, 1/2), of rows drawn from the
    hardest, i = j allowed; n is the unit vector. No gradient goes into what is mixed, neither to rows nor to the q in
    it: so they are constants among the query's negatives, and the rows of a bank that learns move as by the loss that
    has them in its denominator. Drawn anew for each query and step, from (seed, step, term, image) alone. Published on
    MoCo v2 (arXiv 2010.01028).

    Args:
        hardest: N, rows of the bank that a query's are drawn from; all negatives where these are fewer.
        pairs: s, mixed of two rows. with_query: s', mixed of the query and a row.
        warmup_epochs: of the training, without any.
        seed: of the draws.
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
            raise UserError("one of negatives.pairs and negatives.with_query must be above 0; got 0 of both")
        self.pairs, self.with_query, self.warmup_epochs, self.seed = pairs, with_query, warmup_epochs, seed
        self.candidates, self.drawn, self.synthetic = hardest, 2 * pairs + with_query, pairs + with_query

    def columns(
        self, q_ND: Tensor, positive_row_N: Tensor | None, bank: Bank | None, step: Step | None
    ) -> Tensor | None:
        """Cosines [N, E] with what was mixed for each query, pairs first."""
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
            # Made again in the backward pass: in a large batch they would take more memory than the bank.
            cosines = [
                checkpoint(self._cosines, q_nD, m_UD, at_nE, share_nE, use_reentrant=False, preserve_rng_state=False)
                for q_nD, at_nE, share_nE in parts
            ]
        return torch.cat(cosines)

    def draws(self, step: Step, num_queries: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """Which of each query's hardest rows are mixed, int64 [N, 2 s + s'] in [0, num_rows): first of the pairs,
        second of the pairs, with the query; and the share of the first, or of the query, [N, s + s'].
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
