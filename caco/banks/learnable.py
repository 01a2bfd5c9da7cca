"""The bank whose rows are learned: pulled as positives, pushed as negatives (CaCo; AdCo with pull 0)."""

from typing import Literal

import torch
from torch import Tensor, nn

from caco.banks import motion, reweighted, scoring
from caco.banks.base import Bank
from caco.banks.rows import Rows, few_rows_chosen, many_near_duplicates
from caco.ranges import AboveZero, Count, NonNegative, Seed, Several, ShareBelowOne, Width, held
from caco.schedules import RunShape, Table, warmup_and_cosine


class LearnableBank(nn.Module, Bank):
    """K rows that take a cooperative-adversarial gradient step with every optimiser step.

    Args:
        size: rows, K. The paper's 1M, 2M, 4M, 8M, 12M are 8192, 16384, 32768, 65536, 98304.
        dim: width D of the embedding.
        seed: of the random rows.
        pull: scale of the cooperative motion of positives; 1 in CaCo, 0 in AdCo.
        push: scale of the adversarial motion of negatives; 1 in both. (0, 0) is a frozen bank.
        lr: rate of the rows' SGD, 3.0 in the paper for every batch.
        lr_reference_batch: None keeps `lr` for every batch, as published; a number makes the rate
            lr * batch / lr_reference_batch, which keeps the published motion of a row at other batch sizes.
        final_lr: the rate at the end of the run, reached by a cosine after the warm-up; scaled with the batch as `lr` is.
            None keeps `lr` to the end, as the paper's recipe does. 0 lets the rows come to rest as the encoder does.
        warmup_epochs: linear warm-up of the rate.
        momentum: of the rows' SGD.
        weight_decay: of the stored rows; 0 in CaCo, 1e-4 in AdCo.
        temperature: None shares the encoder's; a number is the bank's own (AdCo).
        reading: "code" leaves the stored rows' norms free, as the published code; "paper" puts rows back on the
            sphere after each step (`equations.bank_update`).
        initialisation: "keys": the keys of the warm start overwrite the rows in order, as published; "random": they stay as they
            were drawn, and there is no warm start unless its steps are asked for.
        random_norms: of rows as they were drawn: "normal": about sqrt(dim), of a plain normal law, so that they turn slowly; "unit":
            uniform on the sphere. As published is what conf/learned_bank.yaml takes.

    Source: arXiv 2203.14370, Eqs. 6-11.
    """

    @held
    def __init__(
        self,
        *,
        size: Several,
        dim: Width,
        seed: Seed,
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
    ):
        super().__init__()
        self.rows = Rows(size=size, dim=dim, seed=seed, learnable=pull > 0 or push > 0, norms=random_norms)
        self.size, self.pull, self.push = size, pull, push
        self.lr, self.final_lr, self.lr_reference_batch, self.warmup_epochs = lr, final_lr, lr_reference_batch, warmup_epochs
        self.momentum, self.weight_decay, self.temperature, self.reading = momentum, weight_decay, temperature, reading
        self.filled_by_keys = initialisation == "keys"
        self.default_warm_start_passes = 1 if self.filled_by_keys else 0
        self.anchors: list[scoring.Anchors] = []  # of the rows by the step in progress

    def rates(self, run: RunShape) -> Table:
        """The rate of every step of the training: warmed up, then a cosine from `lr` to `final_lr`."""
        scale = run.batch / self.lr_reference_batch if self.lr_reference_batch else 1.0
        final_lr = self.lr if self.final_lr is None else self.final_lr
        return warmup_and_cosine(run, self.lr * scale, final_lr * scale, self.warmup_epochs)

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
        """Loss of each query over all rows and extra columns; see `scoring.score`. Its backward asks the rows to move."""
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
    def update(self, *, lr: float, keys_GD: Tensor) -> None:
        """Move the rows along the gradients asked for since the last update (`equations.bank_update`).

        Args:
            keys_GD: not used; the queue's update takes them.
        """
        if not self.anchors:
            return
        motion.move(
            self.rows.weight, self.rows.velocity, self.rows.first, scoring.Anchors.joined(self.anchors),
            pull=self.pull, push=self.push, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay, normalise=self.reading == "paper",
        )  # fmt: skip
        self.anchors.clear()
