"""The bank whose rows are learned: pulled as positives, pushed as negatives (CaCo; AdCo with pull 0)."""

from typing import Literal

import torch
from torch import Tensor, nn

from caco import distributed
from caco.banks import motion, own_loop, reweighted, scoring
from caco.banks.balance import mean_activation_divergence
from caco.banks.base import Bank
from caco.banks.rows import Rows, few_rows_chosen, many_near_duplicates
from caco.errors import UserError
from caco.ranges import AboveZero, Count, NonNegative, Seed, Several, ShareBelowOne, Width, held
from caco.schedules import RunShape, Table, warmup_and_cosine


class LearnableBank(nn.Module, Bank):
    """K rows that take a cooperative-adversarial gradient step with every optimiser step.

    In one's own loop it takes `loss` and `update` (caco/banks/own_loop.py); an optimiser that is given its parameters
    leaves them alone.

    Args:
        size: rows, K. The paper's 1M, 2M, 4M, 8M, 12M are 8192, 16384, 32768, 65536, 98304.
        dim: width D of the embedding.
        seed: of the random rows.
        pull: scale of the cooperative motion of positives; 1 in CaCo, 0 in AdCo.
        push: scale of the adversarial motion of negatives; 1 in both. (0, 0) is a frozen bank.
        lr: rate of the rows' SGD, 3.0 in the paper for every batch.
        lr_reference_batch: None keeps `lr` for every batch, as published; a number makes the rate
            lr * batch / lr_reference_batch, which keeps the published motion of a row at other batch sizes.
        final_lr: the rate at the end of the run, reached by a cosine after the warm-up; scaled with the batch as `lr`
            is. None keeps `lr` to the end, as the paper's recipe does. 0 lets the rows come to rest as the encoder
            does.
        warmup_epochs: linear warm-up of the rate.
        momentum: of the rows' SGD.
        weight_decay: of the stored rows; 0 in CaCo, 1e-4 in AdCo.
        temperature: None shares the encoder's; a number is the bank's own (AdCo).
        reading: "code" leaves the stored rows' norms free, as the published code; "paper" puts rows back on the
            sphere after each step (`equations.bank_update`).
        initialisation: "keys": the keys of the warm start overwrite the rows in order, as published; "random": they
            stay as they were drawn, and there is no warm start unless its steps are asked for.
        random_norms: of rows as they were drawn: "normal": about sqrt(dim), of a plain normal law, so that they turn
            slowly; "unit": uniform on the sphere. As published is what conf/learned_bank.yaml takes.
        renewed_after_steps: a row that no key has chosen for so many steps becomes one of the step's keys
            (`Rows.renew`); None, as published: never.
        balance: weight of a term of the queries' loss that is 0 where all rows are equally probable on average over the
            batch (`equations.mean_activation_divergence`); 0, as published: without.

    Source: arXiv 2203.14370, Eqs. 6-11.
    """

    @held
    def __init__(
        self,
        *,
        size: Several,
        dim: Width,
        seed: Seed = 0,
        pull: NonNegative = 1.0,
        push: NonNegative = 1.0,
        lr: NonNegative = 3.0,
        lr_reference_batch: Count | None = None,
        final_lr: NonNegative | None = None,
        warmup_epochs: NonNegative = 10,
        momentum: ShareBelowOne = 0.9,
        weight_decay: NonNegative = 0.0,
        temperature: AboveZero | None = None,
        reading: Literal["code", "paper"] = "code",
        initialisation: Literal["keys", "random"] = "keys",
        random_norms: Literal["unit", "normal"] = "unit",
        renewed_after_steps: Count | None = None,
        balance: NonNegative = 0.0,
    ):
        super().__init__()
        learnable = pull > 0 or push > 0
        if renewed_after_steps is not None and not learnable:
            raise UserError(
                "bank.renewed_after_steps: rows that do not learn are not renewed; expected null, got"
                f" {renewed_after_steps}"
            )
        self.rows = Rows(
            size=size,
            dim=dim,
            seed=seed,
            learnable=learnable,
            norms=random_norms,
            renewed_after_steps=renewed_after_steps,
        )
        self.size, self.pull, self.push, self.balance = size, pull, push, balance
        self.lr, self.final_lr, self.lr_reference_batch, self.warmup_epochs = (
            lr,
            final_lr,
            lr_reference_batch,
            warmup_epochs,
        )
        self.momentum, self.weight_decay, self.temperature, self.reading = momentum, weight_decay, temperature, reading
        self.filled_by_keys = initialisation == "keys"
        self.default_warm_start_passes = 1 if self.filled_by_keys else 0
        self.needs_whole_batch = balance > 0
        self.keys: list[
            Tensor
        ] = []  # of the step in progress, those of all ranks, that `loss` was given, for rows that are renewed
        self.anchors: list[scoring.Anchors] = []  # of the rows by the step in progress

    def rates(self, run: RunShape) -> Table:
        """The rate of every step of the training: warmed up, then a cosine from `lr` to `final_lr`."""
        scale = run.batch / self.lr_reference_batch if self.lr_reference_batch else 1.0
        final_lr = self.lr if self.final_lr is None else self.final_lr
        return warmup_and_cosine(run, self.lr * scale, final_lr * scale, self.warmup_epochs)

    def loss(
        self,
        q_BD: Tensor,
        k_BD: Tensor,
        *,
        temperature: float = 0.08,
        positive: own_loop.PositiveOf = "row",
        extra_BE: Tensor | None = None,
        learn: bool = True,
    ) -> Tensor:
        """-log p of each query's positive among all rows of the bank and any extra columns (Eq. 3), averaged over this
        rank's queries.

        Its backward pass gives gradients to the queries, to the extra columns and, with positive="key", to keys that
        take one; what it asks of the rows is noted for `update`. Several calls, of several pairs of views or parts of a
        batch, add up until then. With a process group every call is a collective, of as many queries on each rank;
        gradients are then to be averaged over the ranks.

        Args:
            q_BD: embeddings of the encoder, of any length: unit vectors are made of them here. bf16 ones are scored in
                float32; under autocast of bf16 the products may round their factors, as in a run with precision=bf16.
            k_BD: embeddings of the same images' other views, in general of a momentum twin (caco.nn.twin.MomentumTwin).
            temperature: tau; 0.08 in CaCo.
            positive: "row": the bank's row that is nearest to the key (CaCo, Eq. 11); "key": the key itself, and all
                rows are negatives (AdCo).
            extra_BE: cosines of the queries with further negatives, not divided by tau; -inf masks one out.
            learn: whether the rows are to move for it; not in a warm start, whose keys `fill` writes over them.
        Returns:
            a scalar.
        Raises:
            UserError: shapes, precisions or devices that do not fit, all of them at once; queries that are not finite.
        """
        value = own_loop.loss(
            self, q_BD, k_BD, temperature=temperature, positive=positive, extra_BE=extra_BE, learn=learn
        )
        if self.rows.renewed_after_steps and learn:
            self.keys.append(distributed.gather(own_loop.unit(k_BD.detach(), self.rows)))
        return value

    def score(
        self,
        q_BD: Tensor,
        positive_B: Tensor,
        *,
        temperature: float,
        extra_BE: Tensor | None = None,
        objective: reweighted.Objective | None = None,
        learn: bool = True,
    ) -> scoring.Score:
        """Loss of each query over all rows and extra columns; see `scoring.score`. Its backward asks the rows to
        move.
        """
        learn = learn and self.rows.weight.requires_grad
        return reweighted.score_of(objective)(
            q_BD,
            self.rows.weight if learn else self.rows.weight.detach(),
            positive_B,
            first_row=self.rows.first,
            size=self.size,
            tau=temperature,
            bank_tau=self.temperature,
            extra_BE=extra_BE,
            anchors=self.anchors if learn else None,
        )

    def regulariser(self, q_BD: Tensor, *, temperature: float) -> Tensor | None:
        """`balance` times the divergence of the rows' mean activation; it asks nothing of the rows."""
        return (
            self.balance * mean_activation_divergence(q_BD, self.rows, self.temperature or temperature)
            if self.balance
            else None
        )

    @torch.no_grad()
    def fill(self, keys_GD: Tensor, step: int) -> None:
        """Write the keys of warm-start step `step` over the next rows, in order; a pass ends at the last row."""
        if self.filled_by_keys:
            start = step % -(-self.size // len(keys_GD)) * len(keys_GD)
            self.rows.write(keys_GD[: self.size - start], start)

    def warning(self, statistics: dict[str, float]) -> str | None:
        """What is wrong with a bank of which `rows.statistics` says this, over an epoch; None where nothing is."""
        return few_rows_chosen(statistics) or many_near_duplicates(statistics)

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """What the next `update` descends, [R, D]: to be looked at, as `update` never holds it."""
        anchors = scoring.Anchors.joined(self.anchors)
        return motion.row_gradient(self.rows.weight, self.rows.first, anchors, pull=self.pull, push=self.push)

    @torch.no_grad()
    def update(self, *, lr: float | None = None, keys_GD: Tensor | None = None) -> None:
        """Move the rows along the gradients asked for since the last update (`equations.bank_update`).

        Args:
            lr: of this step; None for the constructor's.
            keys_GD: all ranks' unit keys of the step, for rows that are renewed; None for those that `loss` was given.
        """
        if not self.anchors:
            return
        if keys_GD is None and self.rows.renewed_after_steps and not self.keys:
            raise UserError(
                "update: rows that are renewed become keys of the step; expected keys_GD, or a step whose `loss` was"
                " given keys"
            )
        motion.move(
            self.rows.weight, self.rows.velocity, self.rows.first, scoring.Anchors.joined(self.anchors),
            pull=self.pull, push=self.push, lr=self.lr if lr is None else lr, momentum=self.momentum,
            weight_decay=self.weight_decay,
            normalise=self.reading == "paper",
        )  # fmt: skip
        self.anchors.clear()
        if self.rows.renewed_after_steps:
            self.rows.renew(torch.cat(self.keys) if keys_GD is None else keys_GD)
        self.keys.clear()
