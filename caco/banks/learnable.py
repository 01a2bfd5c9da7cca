"""The bank whose rows are learned: they are pulled as positives and pushed as negatives (CaCo; AdCo with pull 0)."""

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

    In a loop of your own, call `loss` and `update` (caco/banks/own_loop.py). The rows may be among the parameters that
    an optimiser is given: it leaves them alone, as the backward pass gives them no gradient.

    Args:
        size: number of rows K. The paper's 1M, 2M, 4M, 8M, 12M are 8192, 16384, 32768, 65536, 98304 rows.
        dim: width D of the embedding.
        seed: of the random rows.
        pull: scale of the cooperative motion of positives; 1 in CaCo, 0 in AdCo.
        push: scale of the adversarial motion of negatives; 1 in both. (0, 0) is a frozen bank.
        lr: learning rate of the rows' SGD; the paper takes 3.0 for every batch.
        lr_reference_batch: None keeps `lr` for every batch, as published; a number makes the rate
            lr * batch / lr_reference_batch, which keeps the published motion of a row at other batch sizes.
        final_lr: the rate at the end of the run, reached by a cosine after the warm-up; scaled with the batch as `lr`
            is. None keeps `lr` to the end, as the paper's recipe does. 0 lets the rows come to rest as the encoder
            does.
        warmup_epochs: length of the linear warm-up of the rate, in epochs.
        momentum: of the rows' SGD.
        weight_decay: of the stored rows; 0 in CaCo, 1e-4 in AdCo.
        temperature: tau of the rows' own gradient (AdCo); None takes the temperature of the encoder's loss.
        reading: "code" leaves the norms of the stored rows free, as the published code does; "paper" scales each row
            back to norm 1 after each step (`equations.bank_update`).
        initialisation: "keys": the keys of the warm start overwrite the random rows in order, as published; "random":
            the rows stay as they were drawn, and there is no warm start unless its steps are asked for.
        random_norms: how the random rows are drawn: "normal" from a normal distribution, so that their norms are about
            sqrt(dim) and a step turns them little; "unit" uniformly on the unit sphere. conf/learned_bank.yaml sets
            what the published code does.
        renewed_after_steps: a row that no key has chosen for this many steps is replaced by one of the step's keys
            (`Rows.renew`); None never replaces a row, as published.
        balance: weight of a term in the queries' loss that is 0 when all rows are equally probable on average over the
            batch (`equations.mean_activation_divergence`); 0 leaves the term out, as published.
        keep_probabilities: whether the probabilities of all queries and rows that the loss computes are kept in memory
            for the rows' update, 4 bytes each. The update then saves one of its two products; a step gives the same
            results up to rounding. Only the compiled kernel without AMX tiles keeps them; elsewhere the setting has no
            effect, which one message says. Nothing is kept for treated negatives (`score` with an objective).

    Source: arXiv 2203.14370, Eqs. 6-11.
    Raises:
        UserError: rows that do not learn (pull and push 0) are to be renewed, or probabilities to be kept for rows that
            negatives do not push (push 0).
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
        keep_probabilities: bool = False,
    ):
        super().__init__()
        learnable = pull > 0 or push > 0
        if renewed_after_steps is not None and not learnable:
            raise UserError(
                "bank.renewed_after_steps: rows that do not learn cannot be renewed; expected null, got"
                f" {renewed_after_steps}"
            )
        if keep_probabilities and push == 0:
            raise UserError(
                "bank.keep_probabilities: only the push of negatives needs probabilities, and bank.push is 0; expected"
                " false, got true"
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
        self.room = scoring.Room() if keep_probabilities else None
        self.keys: list[
            Tensor
        ] = []  # all ranks' keys that `loss` was given in the step in progress; some of them renew rows
        self.anchors: list[scoring.Anchors] = []  # what the step in progress has noted, for `update`

    def rates(self, run: RunShape) -> Table:
        """The rows' learning rate at every step of the training: a linear warm-up, then a cosine from `lr` to
        `final_lr`.
        """
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

        The backward pass gives gradients to the queries, to the extra columns and, with positive="key", to the keys if
        they require one. It notes what the rows' gradient is computed from; `update` moves the rows. Several calls
        before one `update`, for several pairs of views or parts of a batch, add up. With a process group every call is
        a collective with equally many queries on each rank, and the training has to average the gradients over the
        ranks.

        Args:
            q_BD: embeddings of the encoder, of any norm; they are normalised here. bf16 embeddings are scored in
                float32; under bf16 autocast the products may round their factors, as in a run with precision=bf16.
            k_BD: embeddings of other views of the same images, usually from a momentum twin
                (caco.nn.twin.MomentumTwin); they are normalised here too.
            temperature: tau; 0.08 in CaCo.
            positive: "row": the bank's row nearest to the key is the positive (CaCo, Eq. 11); "key": the key itself is
                the positive, and all rows are negatives (AdCo).
            extra_BE: cosines of the queries with further negatives, not divided by tau; -inf masks one out.
            learn: whether the rows are to move for this loss. Pass False in a warm start, where `fill` overwrites the
                rows with keys.
        Returns:
            a scalar.
        Raises:
            UserError: shapes, precisions or devices do not fit (one message names all of them), or queries are not
                finite.
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
        """The loss of each query, [B], over all rows and extra columns; see `scoring.score`. With `learn` the backward
        pass notes what the rows' gradient is computed from, for `update`.
        """
        learn = learn and self.rows.weight.requires_grad
        keep = {"room": self.room} if objective is None and learn else {}
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
            **keep,
        )

    def regulariser(self, q_BD: Tensor, *, temperature: float) -> Tensor | None:
        """`balance` times `balance.mean_activation_divergence`, a scalar that gives gradients to the queries alone;
        None where `balance` is 0.
        """
        return (
            self.balance * mean_activation_divergence(q_BD, self.rows, self.temperature or temperature)
            if self.balance
            else None
        )

    @torch.no_grad()
    def fill(self, keys_GD: Tensor, step: int) -> None:
        """Write a warm-start step's keys, [G, D], over the next rows in order. A pass over the bank ends at its last
        row: further keys of that step are dropped, and the next step begins again with the first row.
        """
        if self.filled_by_keys:
            start = step % -(-self.size // len(keys_GD)) * len(keys_GD)
            self.rows.write(keys_GD[: self.size - start], start)

    def warning(self, statistics: dict[str, float]) -> str | None:
        """A sentence about what is wrong with the bank, judged by an epoch's values of `rows.statistics`; None where
        nothing is wrong.
        """
        return few_rows_chosen(statistics) or many_near_duplicates(statistics)

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """The gradient that the next `update` will descend, [R, D]. For inspection only: `update` itself never holds it
        as a whole.
        """
        anchors = scoring.Anchors.joined(self.anchors)
        return motion.row_gradient(self.rows.weight, self.rows.first, anchors, pull=self.pull, push=self.push)

    @torch.no_grad()
    def update(self, *, lr: float | None = None, keys_GD: Tensor | None = None) -> None:
        """Move the rows along the gradients of all losses whose backward pass has run since the last update
        (`equations.bank_update`). Where there was none, nothing happens.

        Args:
            lr: the rows' learning rate of this step; None for the constructor's.
            keys_GD: all ranks' unit keys of the step, with which rows are renewed; None for the keys that `loss` was
                given. Only a bank with `renewed_after_steps` uses them.
        Raises:
            UserError: rows are to be renewed, and no keys were given.
        """
        if not self.anchors:
            return
        if keys_GD is None and self.rows.renewed_after_steps and not self.keys:
            raise UserError(
                "update: this bank renews rows with keys of the step; expected keys_GD, or keys given to `loss` since"
                " the last update"
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
