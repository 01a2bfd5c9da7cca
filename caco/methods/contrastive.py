"""Contrastive learning from positives, negatives and a bank: CaCo, its P/N settings, AdCo, MoCo v2 and SimCLR.

Shapes: B this rank's images, G all ranks' images, D width of the embedding, V views, T terms of the loss, N the queries
of all terms, E extra columns.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from caco import distributed
from caco.banks.base import Bank
from caco.banks.scoring import Score
from caco.data.loaders.batches import Batch
from caco.data.loaders.images import Images
from caco.errors import UserError
from caco.methods.base import TRAINING, Costs, Method, Now, Outputs, ParameterGroup, Phase
from caco.methods.contrast import contrast, shared_by, weighted
from caco.methods.sources import BankRows, BatchKeys, Negatives, Positive, Positives, Step
from caco.methods.terms import Term, terms_of
from caco.methods.treatments import Treatment, require_treatable
from caco.nn.heads import Encoder
from caco.nn.twin import MomentumTwin
from caco.ranges import AboveZero, Natural, Share, held
from caco.schedules import RunShape, Table, cosine

WARM_START = "warm start"


def warm_start_steps(steps: int | None, passes: int | None, bank_size: int, batch: int) -> int:
    """The number of steps of a warm start: `steps`, or, if that is None, `passes` times the number of steps whose keys
    go over all rows of the bank once.

    Args:
        batch: images a step, over all ranks.
    """
    return steps if steps is not None else (passes or 0) * -(-bank_size // batch)


def _by_view(of_all: Tensor | None, num_views: int) -> Sequence[Tensor | None]:
    return [None] * num_views if of_all is None else of_all.chunk(num_views)


class Contrastive(Method):
    """An encoder trained against positives and negatives, with or without a momentum twin and a bank.

    Args:
        encoder: images to unit embeddings; its `.backbone` is what evaluators and exports take.
        bank: a bank, or None if no source uses one.
        positives, negatives: sources (`caco/methods/sources.py`).
        treatment: how the negatives are changed in the training (`caco/methods/treatments.py`); None leaves them plain.
            In the warm start they are always plain.
        temperature: tau of the loss.
        momentum, final_momentum: the twin's m at the start and the end of its cosine. With momentum None there is no
            twin: keys are the encoder's own embeddings and carry gradients (SimCLR).
        symmetric: whether both large views query; if not, view 0 queries and view 1 gives the key.
        reduction: of the loss's terms, "sum" or "mean"; see `pair_terms`.
        warm_start_temperature, warm_start_momentum: tau and the twin's m in the warm start, the steps before epoch 0.
        warm_start_steps, warm_start_passes: length of the warm start: a number of steps, or how many times its keys go
            over all rows of the bank. With neither there is one pass, as published, for a learned bank that is filled
            by keys, and no warm start otherwise.
        warm_start_key: in the warm start the first view queries, and this view's keys are the positives and fill the
            bank: the "second", or the "last", which in multi-crop is the smallest (AdCo's code).

    Source: arXiv 2203.14370, Eqs. 1, 3 and 11.
    Raises:
        UserError: sources, bank, treatment or warm start that do not go together.
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
                f"{type(positives).__name__} gives positives of two kinds, but a treatment of the negatives needs"
                f" positives of one kind; got {type(treatment).__name__}, expected negatives=plain"
            )
        require_treatable(treatment, negatives, bank)
        if warm_start_steps is not None and warm_start_passes is not None:
            raise UserError(
                f"warm_start: expected steps or passes, got both, {warm_start_steps} and {warm_start_passes}; set one"
                " of them to null"
            )
        if warm_start_passes and bank is None:
            raise UserError(
                f"warm_start.passes counts passes over a bank, but this method has no bank; got {warm_start_passes}:"
                " set warm_start.steps=N and warm_start.passes=null"
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
        ] = []  # all ranks' keys of the step in progress, by part of the batch and by view, for the bank's update

        in_warm_start = bool(warm_start_steps or warm_start_passes) and not self._rows_are_filled
        together = in_warm_start or negatives.columns_per_image > 0 or (bank is not None and bank.needs_whole_batch)
        self.needs = dataclasses.replace(self.needs, whole_batch=together, classes=positives.classes)

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # as an attribute it would be in the state twice
        return self.encoder.backbone

    def phases(self, run: RunShape) -> list[Phase]:
        """The warm start, if there is one, at the optimiser's full learning rate; then the training."""
        steps = self.warm_start_steps(run.batch)
        values = {name: 0.0 for name in self.schedules(run)}
        if self.twin is not None:
            values["twin_momentum"] = self.warm_start_momentum
        return ([Phase(WARM_START, steps, values)] if steps else []) + [Phase(TRAINING)]

    def schedules(self, run: RunShape) -> dict[str, Table]:
        """The twin's m, the bank's learning rate, and the schedules of the source of positives."""
        tables = {}
        if self.momentum is not None:
            tables["twin_momentum"] = cosine(run, self.momentum, self.final_momentum)
        if self.bank is not None:
            tables["bank_lr"] = self.bank.rates(run)
        return tables | self.positives.schedules(run)

    def parameter_groups(self) -> list[ParameterGroup]:
        """One group of everything that learns, except for the bank's rows."""
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
            else self.loss(batch.views, Step(batch.index, now, batch.label))
        )

    def after_step(self, now: Now) -> None:
        """The bank is updated, or in the warm start filled, once an optimiser step."""
        if self.bank is not None and now.phase == WARM_START:
            self.bank.fill(self._step_keys(), now.step_in_phase)
        elif self.bank is not None:
            self.bank.update(lr=now["bank_lr"], keys_GD=self._step_keys())
        self.keys.clear()

    def after_phase(self, now: Now) -> None:
        """After the warm start the twin becomes a copy of the encoder."""
        if self.twin is not None and now.phase == WARM_START:
            self.twin.update(self.encoder, 0.0)

    def terms(self, sizes: list[int]) -> list[Term]:
        """The loss's terms for views of these sizes in pixels; the large views come first."""
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
        """The queries of each view that queries, by view, [B, D]; the keys of each view that serves as a key, by view,
        of this rank, [B, D], and of all ranks, [G, D]; and the terms of the loss.
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
        """The loss of one batch of views, each [B, 3, H, W], the large ones first. Nothing but statistics changes.

        Args:
            step: of the images; None if nothing depends on it.
        """
        q, k, all_k, terms = self.encode(views)
        by_view = self.positives_of(k, terms, step)
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
        """The mean over the queries of the probability of their positive; of several positives, the mean by their
        weights.
        """
        probability_TB = (-score.loss_B.detach()).exp()
        shares = [shared_by(of_term_B, positive) for of_term_B, positive in zip(probability_TB, positives, strict=True)]
        return self.positives.per_query * torch.stack(shares).mean()

    def positives_of(
        self, k: Mapping[int, Tensor], terms: list[Term], step: Step | None = None
    ) -> dict[int, list[Positive]]:
        """The positives that the keys of each key view choose, by view: a list with one entry for each positive of a
        query. The bank is searched once for all views.

        Args:
            k: this rank's unit keys [B, D] by view.
            terms: the terms of the loss; their key views choose.
            step: of the images; None outside a run.
        """
        views = sorted({term.key for term in terms})
        together = self.positives.all_of(torch.cat([k[v] for v in views]), self.bank, step)
        parts = [zip(*(_by_view(of_all, len(views)) for of_all in positive), strict=True) for positive in together]
        return {
            v: [Positive(*part) for part in of_view] for v, of_view in zip(views, zip(*parts, strict=True), strict=True)
        }

    def _step_keys(self) -> Tensor:
        """All keys of the step, one after the other, in an order that does not depend on the number of parts that the
        batch was cut into: by view, then by rank, then by image.
        """
        views = [
            torch.stack(parts).unflatten(1, (distributed.world(), -1)).transpose(0, 1).flatten(0, 2)
            for parts in zip(*self.keys, strict=True)
        ]
        return torch.cat(views)

    # The warm start before epoch 0: the positive is the key of the other view, and the keys of its steps fill the bank.
    # The paper's warm start fills the bank once (K/B steps). AdCo's authors call it the key to the method, and short
    # runs need a longer one.

    @property
    def _rows_are_filled(self) -> bool:
        """Whether the keys of a warm start become the bank's rows."""
        return self.bank is not None and self.bank.filled_by_keys

    @property
    def fills_bank(self) -> bool:
        """Whether there is a warm start whose keys replace the rows that the bank begins with."""
        return self._rows_are_filled and bool(self.num_warm_start_steps or self.warm_start_passes)

    def overwritten(self) -> set[str]:
        return {"bank"} if self.fills_bank else set()

    def warm_start_steps(self, batch: int) -> int:
        """The number of steps before epoch 0, for a batch of this many images over all ranks."""
        return warm_start_steps(
            self.num_warm_start_steps, self.warm_start_passes, 0 if self.bank is None else self.bank.size, batch
        )

    def warm_start_loss(self, views: list[Tensor]) -> Outputs:
        """The loss of the warm start: InfoNCE (Eq. 1) in one direction. The positive is the key of the other view. The
        negatives are the rows of the bank that the keys are filling or, if they fill none, the batch's other keys.
        """
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
        """A warning, with remedies, if an epoch's values show that the bank or the embeddings have collapsed; None
        where nothing is wrong.
        """
        named = {name.removeprefix("bank/"): value for name, value in statistics.items() if name.startswith("bank/")}
        wrong = self.bank.warning(named) if self.bank is not None else None
        if wrong is None:
            return super().warning(statistics)
        return (
            f"The bank has collapsed: {wrong}. Its positives and negatives teach the encoder little in this state. What"
            " helps: a longer warm start (warm_start.steps), a lower learning rate of the rows (bank.lr) or one that"
            " ends at 0 (bank.final_lr=0), less push (bank.push), fewer rows (bank.size)."
        )

    def statistics(self) -> dict[str, float]:
        """The values of the bank's `Rows.statistics` since the last call, as `bank/NAME`."""
        return (
            {} if self.bank is None else {f"bank/{name}": value for name, value in self.bank.rows.statistics().items()}
        )
