"""Contrastive learning as positives x negatives x bank: CaCo, its P/N settings, AdCo, MoCo v2 and SimCLR.

Shapes: B this rank's images, G all ranks' images, D width of the embedding, V views.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed
from caco.banks.base import Bank
from caco.banks.reweighted import OfPositives
from caco.banks.scoring import Score
from caco.data.loaders.batches import Batch
from caco.data.loaders.images import Images
from caco.errors import UserError
from caco.methods.base import TRAINING, Costs, Method, Now, Outputs, ParameterGroup, Phase
from caco.methods.sources import BankRows, BatchKeys, Negatives, Positive, Positives
from caco.methods.terms import Term, terms_of
from caco.methods.treatments import Step, Treatment, require_treatable
from caco.nn.heads import Encoder
from caco.nn.twin import MomentumTwin
from caco.ranges import AboveZero, Natural, Share, held
from caco.schedules import RunShape, Table, cosine

WARM_START = "warm start"


def warm_start_steps(steps: int | None, passes: int | None, bank_size: int, batch: int) -> int:
    """Steps of a warm start that is `steps` long, or as long as the keys of so large a batch take to go over the rows
    `passes` times.
    """
    return steps if steps is not None else (passes or 0) * -(-bank_size // batch)


def weighted(score: Score, terms: list[Term], positives: Sequence[Positive] = ()) -> Tensor:
    """The loss: the terms' means, [T, B] over B, by their weights and, where a query has several positives, by those of
    these.
    """
    of_each = zip(terms, positives or [Positive()] * len(terms), score.loss_B, strict=True)
    return sum(
        (term.weight * _shares(loss_B, positive).mean() for term, positive, loss_B in of_each),
        torch.zeros_like(score.loss_B[0, 0]),
    )


def _shares(x_B: Tensor, positive: Positive) -> Tensor:
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
    """Losses of each term's queries against one positive each and a source of negatives; the bank's rows are streamed
    once for all.

    Args:
        q: of each term unit queries [B, D]; k: unit keys of all ranks' images [G, D], in rank order; positives: of the
            queries.
        treatment: of the negatives; None: plain. step: what its draws depend on.
        learn: whether the bank's rows are to move for it.
    Returns:
        Score of [T, B] each, for T terms.
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
        # A positive that is no row is the first extra column, which comes right after the bank's rows.
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
    """Cosines beyond the bank's rows, [B, E]: of a positive that is none of these, and of other images. Where positives
    of other terms are `vectors`, a term whose positive is a row has an empty column in their place."""
    columns = []
    if positive.vector_BD is not None:
        columns = [(q_BD * positive.vector_BD).sum(1, keepdim=True)]
    elif vectors:
        columns = [torch.full_like(q_BD[:, :1], -torch.inf)]
    others = negatives(q_BD, k_GD)
    columns += [] if others is None else [others]
    return torch.cat(columns, 1) if columns else None


def _by_view(of_all: Tensor | None, num_views: int) -> Sequence[Tensor | None]:
    return [None] * num_views if of_all is None else of_all.chunk(num_views)


class Contrastive(Method):
    """An encoder trained against positives and negatives, with or without a momentum twin and a bank.

    Args:
        encoder: images to unit embeddings; its `.backbone` is what evaluators see.
        bank: a bank, or None where no source reads one.
        positives, negatives: sources (`caco/methods/sources.py`).
        treatment: what is made of the negatives in the training (`caco/methods/treatments.py`); None: plain. In the
            warm start they are always plain.
        temperature: tau of the loss.
        momentum, final_momentum: the twin's m at the start and the end of its cosine; None for no twin: then keys are
            the encoder's own embeddings and carry gradients (SimCLR).
        symmetric: whether both views query (else view 0 queries, view 1 is the key).
        reduction: of the terms, "sum" or "mean"; see `pair_terms`.
        warm_start_temperature, warm_start_momentum: tau and the twin's m in the warm start, the steps before epoch 0.
        warm_start_steps, warm_start_passes: how long that is: so many steps, or so many times as many as keys need to
            go over the bank's rows once. Neither: as published, one pass where the bank is learned, else none.
        warm_start_key: the view whose keys are positives and fill the bank there, for queries of the first: the
            "second", or the "last", which in multi-crop is the smallest (AdCo's code).
    """

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        bank: Bank | None = None,
        positives: Positives,
        negatives: Negatives,
        treatment: Treatment | None = None,
        temperature: AboveZero = 0.08,
        momentum: Share | None = 0.99,
        final_momentum: Share = 1.0,
        symmetric: bool = True,
        reduction: Literal["sum", "mean"] = "sum",
        warm_start_temperature: AboveZero = 0.2,
        warm_start_momentum: Share = 0.999,
        warm_start_steps: Natural | None = None,
        warm_start_passes: Natural | None = None,
        warm_start_key: Literal["second", "last"] = "second",
    ):
        super().__init__()
        if positives.bank_rows and not negatives.bank_rows:
            raise UserError(
                "a positive that is a row of the bank needs the bank's rows as negatives; got "
                f"{type(positives).__name__} with {type(negatives).__name__}"
            )
        if bank is None and (negatives.bank_rows or positives.needs_bank):
            raise UserError(f"{type(positives).__name__} with {type(negatives).__name__} needs a bank; got bank=null")
        if positives.of_both_kinds and treatment is not None:
            raise UserError(
                f"{type(positives).__name__} has positives of two kinds, and negatives that are treated go with one;"
                f" got {type(treatment).__name__}, expected negatives=plain"
            )
        require_treatable(treatment, negatives, bank)
        if warm_start_steps is not None and warm_start_passes is not None:
            raise UserError(
                f"warm_start: expected steps or passes, got both, {warm_start_steps} and {warm_start_passes}; set one"
                " of them to null"
            )
        if warm_start_passes and bank is None:
            raise UserError(
                f"warm_start.passes go over the rows of a bank, and this method has none; got {warm_start_passes}: say "
                "warm_start.steps=N and warm_start.passes=null"
            )
        if warm_start_passes is None and warm_start_steps is None:
            warm_start_passes = 0 if bank is None else bank.default_warm_start_passes
        self.encoder: Encoder = encoder
        self.bank: Bank | None = bank
        self.twin = MomentumTwin(encoder) if momentum is not None else None
        self.positives, self.negatives, self.treatment = positives, negatives, treatment or Treatment()
        self.temperature, self.warm_start_temperature = temperature, warm_start_temperature
        self.momentum, self.final_momentum, self.warm_start_momentum = momentum, final_momentum, warm_start_momentum
        self.num_warm_start_steps, self.warm_start_passes = warm_start_steps, warm_start_passes
        self.warm_start_key = 1 if warm_start_key == "second" else -1
        self.symmetric, self.reduction = symmetric, reduction
        self.keys: list[
            list[Tensor]
        ] = []  # of the step in progress, by part of the batch and view, for the bank's update

        in_warm_start = bool(warm_start_steps or warm_start_passes) and not self._rows_are_filled
        together = in_warm_start or negatives.columns_per_image > 0 or (bank is not None and bank.needs_whole_batch)
        self.needs = dataclasses.replace(self.needs, whole_batch=together)

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # the encoder's; an attribute would be a second part of the state
        return self.encoder.backbone

    def phases(self, run: RunShape) -> list[Phase]:
        """A warm start where there is one, at the full rate, and the training."""
        steps = self.warm_start_steps(run.batch)
        values = {name: 0.0 for name in self.schedules(run)}
        if self.twin is not None:
            values["twin_momentum"] = self.warm_start_momentum
        return ([Phase(WARM_START, steps, values)] if steps else []) + [Phase(TRAINING)]

    def schedules(self, run: RunShape) -> dict[str, Table]:
        """The twin's m, and the bank's rate."""
        tables = {}
        if self.momentum is not None:
            tables["twin_momentum"] = cosine(run, self.momentum, self.final_momentum)
        if self.bank is not None:
            tables["bank_lr"] = self.bank.rates(run)
        return tables | self.positives.schedules(run)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Everything that learns but the bank's rows."""
        bank = set() if self.bank is None else set(self.bank.parameters())
        return [ParameterGroup([p for p in self.parameters() if p.requires_grad and p not in bank])]

    def before_step(self, now: Now, images: Images) -> None:
        """The twin moves before the keys are computed, as in the published code."""
        if self.twin is not None:
            self.twin.update(self.encoder, now["twin_momentum"])

    def forward(self, batch: Batch, now: Now) -> Outputs:
        return (
            self.warm_start_loss(batch.views)
            if now.phase == WARM_START
            else self.loss(batch.views, Step(batch.index, now))
        )

    def after_step(self, now: Now) -> None:
        """The rows move, or take the keys, once per optimiser step."""
        if self.bank is not None and now.phase == WARM_START:
            self.bank.fill(self._step_keys(), now.step_in_phase)
        elif self.bank is not None:
            self.bank.update(lr=now["bank_lr"], keys_GD=self._step_keys())
        self.keys.clear()

    def after_phase(self, now: Now) -> None:
        """The twin starts the training as a copy of the encoder."""
        if self.twin is not None and now.phase == WARM_START:
            self.twin.update(self.encoder, 0.0)

    def terms(self, sizes: list[int]) -> list[Term]:
        """Of the loss on views of these sizes; the large ones come first."""
        return terms_of(sizes, symmetric=self.symmetric, reduction=self.reduction)

    def costs(self, sizes: list[int]) -> Costs:
        terms = self.terms(sizes)
        querying, chosen = {term.query for term in terms}, {term.key for term in terms}
        encoded, followed = (querying, chosen) if self.twin is not None else (querying | chosen, set())
        return Costs(
            encoded=sorted(encoded),
            followed=sorted(followed),
            terms=len(terms) * self.positives.per_query,
            bank_terms=len(terms) * self.positives.per_query if self.negatives.bank_rows else 0,
            searches=len(chosen) * self.positives.searches,
            lookups=len(chosen) * self.positives.lookups,
            columns_per_image=self.negatives.columns_per_image,
            gathers=len(chosen),
            gathers_with_gradient=len(chosen) if self.twin is None else 0,
            **self.treatment.costs(rows_are_positives=self.positives.bank_rows),
        )

    def encode(self, views: list[Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor], list[Term]]:
        """Queries of every view that queries, keys of the views that are chosen (own and gathered), and the terms of
        the loss.
        """
        terms = self.terms([view.shape[-1] for view in views])
        querying, chosen = sorted({term.query for term in terms}), sorted({term.key for term in terms})
        q = {v: self.encoder(views[v]) for v in querying}
        if self.twin is not None:
            k = {v: self.twin(views[v]) for v in chosen}
            all_k = {v: distributed.gather(key) for v, key in k.items()}
        else:
            k = {v: q[v] if v in q else self.encoder(views[v]) for v in chosen}
            all_k = {v: distributed.gather_with_gradient(key) for v, key in k.items()}
        return q, k, all_k, terms

    def loss(self, views: list[Tensor], step: Step | None = None) -> Outputs:
        """Loss of one batch of views, each [B, 3, H, W]; the large ones come first. Nothing but statistics changes.

        Args:
            step: of what draws depend on; None where nothing is drawn.
        """
        q, k, all_k, terms = self.encode(views)
        by_view = self.positives_of(k, terms, None if step is None else step.now)
        positives = [positive for term in terms for positive in by_view[term.key]]
        terms = [term for term in terms for _ in by_view[term.key]]
        score = contrast(
            [q[term.query] for term in terms], [all_k[term.key] for term in terms], positives,
            self.negatives, self.bank, self.temperature, treatment=self.treatment, step=step,
        )  # fmt: skip
        self.keys.append([all_k[v].detach() for v in sorted(by_view)])
        loss = weighted(score, terms, positives)
        metrics = {
            "positive_probability": self._mean_probability(score, positives),
            "max_probability": score.max_probability_B.mean(),
        }
        extra = (
            None
            if self.bank is None
            else self.bank.regulariser(torch.cat(list(q.values())), temperature=self.temperature)
        )
        if extra is not None:
            loss, metrics["bank_regulariser"] = loss + extra, extra.detach()
        return Outputs(loss, metrics, q[0])

    def _mean_probability(self, score: Score, positives: list[Positive]) -> Tensor:
        """Of a query's positives by their weights, on average."""
        probability_TB = (-score.loss_B.detach()).exp()
        shares = [_shares(of_term_B, positive) for of_term_B, positive in zip(probability_TB, positives, strict=True)]
        return self.positives.per_query * torch.stack(shares).mean()

    def positives_of(
        self, k: Mapping[int, Tensor], terms: list[Term], now: Now | None = None
    ) -> dict[int, list[Positive]]:
        """Of each view whose keys choose, [B] or [B, D] each; a bank is searched once for all."""
        views = sorted({term.key for term in terms})
        together = self.positives.all_of(torch.cat([k[v] for v in views]), self.bank, now)
        parts = [zip(*(_by_view(of_all, len(views)) for of_all in positive), strict=True) for positive in together]
        return {
            v: [Positive(*part) for part in of_view] for v, of_view in zip(views, zip(*parts, strict=True), strict=True)
        }

    def _step_keys(self) -> Tensor:
        """The step's keys by view, rank and image, into however many parts the batch was cut."""
        views = [
            torch.stack(parts).unflatten(1, (distributed.world(), -1)).transpose(0, 1).flatten(0, 2)
            for parts in zip(*self.keys, strict=True)
        ]
        return torch.cat(views)

    # The warm start, before epoch 0: the encoder learns from the other view alone, and its keys fill the bank. In the
    # paper it fills the bank once (K/B steps); AdCo's authors call it the key to the method, and short runs need more
    # of it.

    @property
    def _rows_are_filled(self) -> bool:
        """Whether the keys of the warm start become the bank's rows."""
        return self.bank is not None and self.bank.filled_by_keys

    @property
    def fills_bank(self) -> bool:
        """Whether the warm start leaves none of the rows that the bank had before it."""
        return self._rows_are_filled and bool(self.num_warm_start_steps or self.warm_start_passes)

    def overwritten(self) -> set[str]:
        return {"bank"} if self.fills_bank else set()

    def warm_start_steps(self, batch: int) -> int:
        """Steps before epoch 0 at a global batch."""
        return warm_start_steps(
            self.num_warm_start_steps, self.warm_start_passes, 0 if self.bank is None else self.bank.size, batch
        )

    def warm_start_loss(self, views: list[Tensor]) -> Outputs:
        """InfoNCE (Eq. 1) in one direction: the other view as positive; as negatives the bank that the keys are
        filling, or,
        where they fill none, the batch's other keys."""
        q_BD, view = self.encoder(views[0]), views[self.warm_start_key]
        if self.twin is not None:
            k_BD = self.twin(view)
            k_GD = distributed.gather(k_BD)
        else:
            k_BD = self.encoder(view)
            k_GD = distributed.gather_with_gradient(k_BD)
        negatives = BankRows() if self._rows_are_filled else BatchKeys()
        score = contrast(
            [q_BD], [k_GD], [Positive(vector_BD=k_BD)], negatives, self.bank, self.warm_start_temperature, learn=False
        )
        self.keys.append([k_GD.detach()])
        return Outputs(score.loss_B.mean(), {}, q_BD)

    def warning(self, statistics: Mapping[str, Any]) -> str | None:
        """What these values of an epoch say of a bank or of embeddings that have collapsed, and what helps; None where
        nothing is wrong.
        """
        named = {name.removeprefix("bank/"): value for name, value in statistics.items() if name.startswith("bank/")}
        wrong = self.bank.warning(named) if self.bank is not None else None
        if wrong is None:
            return super().warning(statistics)
        return (
            f"The bank has collapsed: {wrong}. Its positives and negatives teach the encoder little in this state. What"
            " helps: a longer warm start (warm_start.steps), a lower rate of the rows (bank.lr) or one that ends at 0"
            " (bank.final_lr=0), less push (bank.push), fewer rows (bank.size)."
        )

    def statistics(self) -> dict[str, float]:
        """Of the bank's use and shape since the last call; `bank/` and a name."""
        return (
            {} if self.bank is None else {f"bank/{name}": value for name, value in self.bank.rows.statistics().items()}
        )
