"""The losses of queries against positives and negatives, for the terms of a contrastive method.

Shapes: B this rank's images, G all ranks' images, D width of the embedding, V views, T terms of the loss, N the queries
of all terms, E extra columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from caco.banks.base import Bank
from caco.banks.reweighted import OfPositives
from caco.banks.scoring import Score
from caco.methods.sources import Negatives, Positive, Step
from caco.methods.terms import Term
from caco.methods.treatments import Treatment


def weighted(score: Score, terms: list[Term], positives: Sequence[Positive] = ()) -> Tensor:
    """The loss, a scalar: the mean of each term's losses over its queries, summed over the terms with their weights. If
    a query has several positives, each of them is a term, and its losses are also multiplied by the positive's weights.

    Args:
        score: losses of [T, B].
        terms: the T terms.
        positives: the positive of each term; empty if every query has one positive.
    """
    of_each = zip(terms, positives or [Positive()] * len(terms), score.loss_B, strict=True)
    return sum(
        (term.weight * shared_by(loss_B, positive).mean() for term, positive, loss_B in of_each),
        torch.zeros_like(score.loss_B[0, 0]),
    )


def shared_by(x_B: Tensor, positive: Positive) -> Tensor:
    """Values of queries, [B], times the share that each query gives to this positive."""
    return x_B if positive.weight_B is None else x_B * positive.weight_B


def contrast(
    q: list[Tensor],
    k: list[Tensor],
    positives: list[Positive],
    negatives: Negatives,
    bank: Bank | None,
    temperature: float,
    *,
    treatment: Treatment | None = None,
    step: Step | None = None,
    learn: bool = True,
) -> Score:
    """The loss of each term's queries, each against one positive and a source of negatives. The bank's rows are
    streamed only once for all terms. A collective.

    Args:
        q: for each term the unit queries, [B, D].
        k: for each term the unit keys of all ranks' images, [G, D], in rank order.
        positives: for each term the positives of its queries.
        negatives: the source of negatives.
        bank: the bank, or None if the negatives have none.
        temperature: tau.
        treatment: of the negatives; None leaves them plain.
        step: what the treatment may depend on; None if it depends on nothing.
        learn: whether the bank's rows are to move for these losses.
    Returns:
        a Score whose fields are [T, B].
    """
    treatment = treatment or Treatment()
    vectors = any(positive.vector_BD is not None for positive in positives)
    extra = [
        columns_BE
        for term in zip(q, k, positives, strict=True)
        if (columns_BE := _columns(*term, negatives, vectors)) is not None
    ]
    chosen = [positive.row_B for positive in positives if positive.row_B is not None]
    made_NE = treatment.columns(torch.cat(q), torch.cat(chosen) if chosen else None, bank, step)
    columns = [torch.cat(extra)] if extra else []
    columns += [] if made_NE is None else [made_NE]
    extra_NE = torch.cat(columns, 1) if columns else None
    if negatives.bank_rows:
        assert bank is not None, "the bank's rows are negatives"
        # A positive that is no row is the first extra column, whose index comes right after those of the rows.
        rows = [
            torch.full((len(q_BD),), bank.size, device=q_BD.device) if positive.row_B is None else positive.row_B
            for q_BD, positive in zip(q, positives, strict=True)
        ]
        objective = None if treatment.objective is None else OfPositives(treatment.objective, rows=bool(chosen))
        other = {} if objective is None else {"objective": objective}
        score = bank.score(
            torch.cat(q), torch.cat(rows), temperature=temperature, extra_BE=extra_NE, learn=learn, **other
        )
    else:
        assert extra_NE is not None, "a positive that is no row, and negatives that are none"
        logits_NE = extra_NE / temperature
        if treatment.objective is None:
            first_N = torch.zeros(len(logits_NE), dtype=torch.int64, device=logits_NE.device)
            loss_N = F.cross_entropy(logits_NE, first_N, reduction="none")
        else:
            positive_N, others_NE = logits_NE[:, 0], logits_NE[:, 1:]
            log_sums = [torch.logsumexp(t * others_NE, 1) for t in treatment.objective.exponents]
            loss_N = treatment.objective(positive_N, log_sums, others_NE.isfinite().sum(1), temperature)
        score = Score(loss_N, torch.softmax(logits_NE.detach(), 1).amax(1))
    return Score(*(of_all.unflatten(0, (len(q), -1)) for of_all in score))


def _columns(q_BD: Tensor, k_GD: Tensor, positive: Positive, negatives: Negatives, vectors: bool) -> Tensor | None:
    """Cosines of a term's queries with vectors that are no rows of the bank, [B, E]: first the positive, if it is no
    row, then other images. None if there are no such vectors.

    If the positives of other terms are `vectors`, a term whose positive is a row gets a masked column (-inf) in their
    place, so that all terms have equally many columns."""
    columns = []
    if positive.vector_BD is not None:
        columns = [(q_BD * positive.vector_BD).sum(1, keepdim=True)]
    elif vectors:
        columns = [torch.full_like(q_BD[:, :1], -torch.inf)]
    others = negatives(q_BD, k_GD)
    columns += [] if others is None else [others]
    return torch.cat(columns, 1) if columns else None
