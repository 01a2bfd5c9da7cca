"""Contrastive learning as positives x negatives x bank: CaCo, its P/N settings, AdCo, MoCo v2 and SimCLR.

Shapes: B this rank's images, G all ranks' images, D width of the embedding, V views.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed
from caco.banks.scoring import Score
from caco.methods.sources import BatchBothViews, BatchKeys, NearestKey, Positive
from caco.nn.twin import MomentumTwin
from caco.optimizers import Schedule


class Term(NamedTuple):
    query: int  # view that is encoded with gradient
    key: int  # view whose key chooses (or is) the positive
    weight: float


class Outputs(NamedTuple):
    loss: Tensor  # scalar, this rank's part; the ranks' mean is the batch's loss
    metrics: dict[str, Tensor]  # scalars without gradient


def pair_terms(num_large: int, num_small: int, *, symmetric: bool, reduction: Literal["sum", "mean"]) -> list[Term]:
    """Which view queries which key, and with what weight.

    Keys are the large views (symmetric) or the second of them (else); every other view queries each key. "sum" adds
    the terms (CaCo's two directions; AdCo's five crops). "mean" averages the large views' terms and adds the average of
    the small ones' (AdCo's two directions; CaCo's multi-crop: 2 large and 12 small terms).
    """
    keys = range(num_large) if symmetric else [1]
    large = [(q, k) for k in keys for q in (range(num_large) if symmetric else [0]) if q != k]
    small = [(q, k) for k in keys for q in range(num_large, num_large + num_small)]
    return [
        Term(q, k, 1.0 if reduction == "sum" else 1 / len(pairs)) for pairs in (large, small) for q, k in pairs
    ]


def weighted(score: Score, terms: list[Term]) -> Tensor:
    """The loss: the terms' means, [T, B] over B, by their weights."""
    return sum(term.weight * loss_B.mean() for term, loss_B in zip(terms, score.loss_B, strict=True))


def contrast(q: list[Tensor], k: list[Tensor], positives: list[Positive], negatives, bank, temperature: float) -> Score:
    """Losses of each term's queries against one positive each and a source of negatives; the bank's rows are streamed once for all.

    Args:
        q: of each term unit queries [B, D]; k: unit keys of all ranks' images [G, D], in rank order; positives: of the queries.
    Returns:
        Score of [T, B] each, for T terms.
    """
    extra = [_columns(*term, negatives) for term in zip(q, k, positives, strict=True)]
    extra_NE = None if extra[0] is None else torch.cat(extra)
    if negatives.bank_rows:
        rows = [positive.row_B for positive in positives]
        if rows[0] is None:  # the first extra column, which comes right after the bank's rows
            rows = [torch.full((len(q_BD),), bank.size, device=q_BD.device) for q_BD in q]
        score = bank.score(torch.cat(q), torch.cat(rows), temperature=temperature, extra_BE=extra_NE)
    else:
        logits_NE = extra_NE / temperature
        first_N = torch.zeros(len(logits_NE), dtype=torch.int64, device=logits_NE.device)
        loss_N = F.cross_entropy(logits_NE, first_N, reduction="none")
        score = Score(loss_N, torch.softmax(logits_NE.detach(), 1).amax(1))
    return Score(*(of_all.unflatten(0, (len(q), -1)) for of_all in score))


def _columns(q_BD: Tensor, k_GD: Tensor, positive: Positive, negatives) -> Tensor | None:
    """Cosines beyond the bank's rows, [B, E]: of a positive that is none of these, and of other images."""
    columns = [] if positive.vector_BD is None else [(q_BD * positive.vector_BD).sum(1, keepdim=True)]
    others = negatives(q_BD, k_GD)
    columns += [] if others is None else [others]
    return torch.cat(columns, 1) if columns else None


class Contrastive(nn.Module):
    """An encoder trained against positives and negatives, with or without a momentum twin and a bank.

    Args:
        encoder: images to unit embeddings; its `.backbone` is what evaluators see.
        bank: a bank, or None where no source reads one.
        positives, negatives: sources (`caco/methods/sources.py`).
        temperature: tau of the loss.
        momentum, final_momentum: the twin's m at the start and the end of its cosine; None for no twin: then keys are
            the encoder's own embeddings and carry gradients (SimCLR).
        symmetric: whether both views query (else view 0 queries, view 1 is the key).
        reduction: of the terms, "sum" or "mean"; see `pair_terms`.
        filling_temperature, filling_momentum: of the steps that fill the bank with keys before epoch 0.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        bank: nn.Module | None,
        positives: object,
        negatives: object,
        temperature: float = 0.08,
        momentum: float | None = 0.99,
        final_momentum: float = 1.0,
        symmetric: bool = True,
        reduction: Literal["sum", "mean"] = "sum",
        filling_temperature: float = 0.2,
        filling_momentum: float = 0.999,
    ):
        super().__init__()
        if temperature <= 0 or filling_temperature <= 0:
            raise ValueError(f"temperatures must be positive; got {temperature} and, while filling, {filling_temperature}")
        for name, value in {"momentum": momentum, "final_momentum": final_momentum}.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"method.{name} must be in [0, 1]; got {value}")
        if positives.bank_rows and not negatives.bank_rows:
            raise ValueError(
                "a positive that is a row of the bank needs the bank's rows as negatives; got "
                f"{type(positives).__name__} with {type(negatives).__name__}"
            )
        if bank is None and (negatives.bank_rows or isinstance(positives, NearestKey)):
            raise ValueError(f"{type(positives).__name__} with {type(negatives).__name__} needs a bank; got bank=null")
        if bank is not None and bank.filling_passes and momentum is None:
            raise ValueError("bank.initialisation=keys needs a momentum twin; got method.momentum=null")
        self.encoder, self.bank = encoder, bank
        self.twin = MomentumTwin(encoder) if momentum is not None else None
        self.positives, self.negatives = positives, negatives
        self.temperature, self.filling_temperature = temperature, filling_temperature
        self.momentum, self.final_momentum, self.filling_momentum = momentum, final_momentum, filling_momentum
        self.symmetric, self.reduction = symmetric, reduction
        self.keys: list[list[Tensor]] = []  # of the step in progress, by part of the batch and view, for the bank's update

    @property
    def backbone(self) -> nn.Module:
        return self.encoder.backbone

    @property
    def needs_whole_batch(self) -> bool:
        """Whether the batch's other images are negatives, so that a part of it would have fewer."""
        return isinstance(self.negatives, (BatchKeys, BatchBothViews))

    def encoder_parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves: everything that learns but the bank's rows."""
        bank = set() if self.bank is None else set(self.bank.parameters())
        return [p for p in self.parameters() if p.requires_grad and p not in bank]

    def momenta(self, schedule: Schedule, epochs: int, steps_per_epoch: int) -> list[float]:
        """The twin's m for every step after the filling."""
        start = 0.0 if self.momentum is None else self.momentum
        return schedule.momentum(start, self.final_momentum, epochs, steps_per_epoch)

    def bank_rates(self, schedule: Schedule, batch: int, epochs: int, steps_per_epoch: int) -> list[float]:
        """The bank's learning rate for every step after the filling."""
        if self.bank is None:
            return [0.0] * (epochs * steps_per_epoch)
        return self.bank.rates(schedule, batch, epochs, steps_per_epoch)

    def update_twin(self, momentum: float) -> None:
        """Before the keys are computed, as in the published code."""
        if self.twin is not None:
            self.twin.update(self.encoder, momentum)

    def encode(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Term]]:
        """Queries of every view that queries, keys of the large views (own and gathered), and the terms of the loss."""
        num_large = sum(view.shape[-1] == views[0].shape[-1] for view in views)
        terms = pair_terms(num_large, len(views) - num_large, symmetric=self.symmetric, reduction=self.reduction)
        querying, chosen = {term.query for term in terms}, {term.key for term in terms}
        q = [self.encoder(view) if v in querying else None for v, view in enumerate(views)]
        if self.twin is not None:
            k = [self.twin(views[v]) if v in chosen else None for v in range(num_large)]
            all_k = [None if key is None else distributed.gather(key) for key in k]
        else:
            k = [self.encoder(views[v]) if q[v] is None else q[v] for v in range(num_large)]
            all_k = [distributed.gather_with_gradient(key) for key in k]
        return q, k, all_k, terms

    def forward(self, views: list[Tensor]) -> Outputs:
        """Loss of one batch of views, each [B, 3, H, W]; the large ones come first. Nothing but statistics changes."""
        q, k, all_k, terms = self.encode(views)
        positives = self.positives_of(k, terms)
        score = contrast(
            [q[term.query] for term in terms], [all_k[term.key] for term in terms], [positives[term.key] for term in terms],
            self.negatives, self.bank, self.temperature,
        )  # fmt: skip
        self.keys.append([all_k[v].detach() for v in sorted(positives)])
        metrics = {"positive_probability": (-score.loss_B.detach()).exp().mean(), "max_probability": score.max_probability_B.mean()}
        return Outputs(weighted(score, terms), metrics)

    def positives_of(self, k: list[Tensor], terms: list[Term]) -> dict[int, Positive]:
        """Of each view whose keys choose, [B] or [B, D]; a bank is searched once for all."""
        views = sorted({term.key for term in terms})
        together = self.positives(torch.cat([k[v] for v in views]), self.bank)
        parts = [[None] * len(views) if of_all is None else of_all.chunk(len(views)) for of_all in together]
        return {v: Positive(*part) for v, part in zip(views, zip(*parts, strict=True), strict=True)}

    def update_bank(self, lr: float) -> None:
        """Once per optimiser step, after a finite loss."""
        if self.bank is not None:
            self.bank.update(lr=lr, keys_GD=self._step_keys())
        self.keys.clear()

    def _step_keys(self) -> Tensor:
        """The step's keys by view, rank and image, into however many parts the batch was cut."""
        views = [
            torch.stack(parts).unflatten(1, (distributed.world(), -1)).transpose(0, 1).flatten(0, 2)
            for parts in zip(*self.keys, strict=True)
        ]
        return torch.cat(views)

    # The published initialisation: before epoch 0 the encoder trains for K/B steps against the bank that its keys fill.

    def filling_steps(self, batch: int) -> int:
        """Steps before epoch 0: as many as the keys of so large a batch need for the bank's rows, for each pass."""
        return self.bank.filling_passes * -(-self.bank.size // batch) if self.bank is not None else 0

    def filling_loss(self, views: list[Tensor]) -> Outputs:
        """InfoNCE (Eq. 1) in one direction, the other view as positive, the partly filled bank as negatives."""
        q_BD, k_BD = self.encoder(views[0]), self.twin(views[1])
        positive_B1 = (q_BD * k_BD).sum(1, keepdim=True)
        row_B = torch.full((len(q_BD),), self.bank.size, device=q_BD.device)
        score = self.bank.score(q_BD, row_B, temperature=self.filling_temperature, extra_BE=positive_B1, learn=False)
        self.keys.append([distributed.gather(k_BD)])
        return Outputs(score.loss_B.mean(), {})

    def fill_bank(self, step: int) -> None:
        """Write the keys of filling step `step` over the next rows, in order; a pass ends at the last row."""
        keys_GD = self._step_keys()
        start = step % -(-self.bank.size // len(keys_GD)) * len(keys_GD)
        self.bank.rows.write(keys_GD[: self.bank.size - start], start)
        self.keys.clear()

    def finish_filling(self) -> None:
        """The twin starts epoch 0 as a copy of the encoder."""
        self.twin.update(self.encoder, 0.0)

    def statistics(self) -> dict[str, float]:
        """Of the bank's use and shape since the last call; `bank/` and a name."""
        return {} if self.bank is None else {f"bank/{name}": value for name, value in self.bank.rows.statistics().items()}
