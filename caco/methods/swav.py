"""SwAV: one view's assignment to prototypes is predicted from another view (arXiv 2006.09882).

Shapes: B this rank's images, G all ranks' images, N the embeddings of all views of a batch, D width of the embedding, K
prototypes, V views, R rows of the queue.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from caco import devices, distributed
from caco.data.loaders.batches import Batch
from caco.data.loaders.images import Images
from caco.errors import UserError
from caco.methods import assignments
from caco.methods.base import Costs, Method, Needs, Now, Outputs, ParameterGroup, Phase
from caco.nn.heads import Encoder
from caco.nn.prototypes import Prototypes
from caco.ranges import AboveZero, Count, Natural, Several, held
from caco.schedules import RunShape

NUM_ASSIGNED = 2  # views whose assignments are predicted: the first two


class SwAV(Method):
    """The images of each of the first two views are assigned to prototypes so that all prototypes are used equally
    often; every other view predicts that view's assignments.

    L = 1/2 sum_{c < 2} 1/(V - 1) sum_{v != c} mean_i -sum_k q_cik log softmax(z_vi . C / tau)_k, where C are the
    prototypes and q_c is the Sinkhorn assignment of the batch of all ranks, made together with a queue of earlier
    embeddings if there is one.

    Args:
        encoder: images to unit embeddings; its `.backbone` is what evaluators and exports take.
        num_prototypes: K.
        temperature: tau.
        epsilon: of the Sinkhorn assignment; the smaller, the harder the assignments.
        sinkhorn_iterations: of the Sinkhorn assignment.
        prototypes_frozen_steps: number of steps at the start in which the prototypes stay as they were drawn.
        queue_size: rows, over all ranks, for each assigned view, of which a whole number of batches is used; 0 for no
            queue.
        queue_start_epoch: the epoch, counted from 0, in which the queue begins to be filled; it is used once it is
            full.

    Source: arXiv 2006.09882, Eqs. 1 and 3 to 6.
    Raises:
        UserError: an epsilon below 0.004; later, a queue smaller than the batch.
    """

    needs = Needs(whole_batch=True)
    queue: Tensor  # [2, queue_size, D], earlier embeddings of each assigned view, the newest first
    uses: Tensor  # int64 [K], how often each prototype was the nearest since the last `statistics`

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        num_prototypes: Several = 3000,
        temperature: AboveZero = 0.1,
        epsilon: AboveZero = 0.05,
        sinkhorn_iterations: Count = 3,
        prototypes_frozen_steps: Natural = 313,
        queue_size: Natural = 0,
        queue_start_epoch: Natural = 15,
    ):
        super().__init__()
        if epsilon < assignments.SMALLEST_EPSILON:
            raise UserError(f"method.epsilon: expected at least {assignments.SMALLEST_EPSILON}, got {epsilon}")
        dim = encoder.projector.dim
        self.encoder, self.prototypes = encoder, Prototypes(dim=dim, number=num_prototypes)
        self.temperature, self.epsilon, self.sinkhorn_iterations = temperature, epsilon, sinkhorn_iterations
        self.prototypes_frozen_steps, self.queue_start_epoch = prototypes_frozen_steps, queue_start_epoch
        # Every rank holds the same whole queue: it is small, and a checkpoint then does not depend on the number of
        # ranks.
        self.register_buffer("queue", torch.zeros(NUM_ASSIGNED, queue_size, dim))
        self.register_buffer("uses", torch.zeros(num_prototypes, dtype=torch.int64))
        self.embeddings: list[Tensor] = []  # for the queue: [B, D] for each assigned view of the step in progress
        self._pushed = devices.Known([0] * NUM_ASSIGNED)  # see `_pushed_rows`
        self.register_load_state_dict_post_hook(_read_anew)

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # as an attribute it would be in the state twice
        return self.encoder.backbone

    def phases(self, run: RunShape) -> list[Phase]:
        if 0 < self.queue.shape[1] < run.batch:
            raise UserError(
                f"method.queue_size: expected 0 for no queue, or at least the batch, {run.batch}, because the queue"
                f" takes whole batches; got {self.queue.shape[1]}"
            )
        return super().phases(run)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Two groups: the encoder, and the prototypes, which are frozen at first."""
        return [
            ParameterGroup([p for p in self.encoder.parameters() if p.requires_grad]),
            ParameterGroup(list(self.prototypes.parameters()), frozen_steps=self.prototypes_frozen_steps),
        ]

    def before_step(self, now: Now, images: Images) -> None:
        self.prototypes.normalise()

    def forward(self, batch: Batch, now: Now) -> Outputs:
        """The views may have several sizes; neighbouring views of one size go through the backbone together."""
        num_images = len(batch.index)
        z_ND = self.encoder(batch.views)
        scores = list(self.prototypes(z_ND).split(num_images))
        self.embeddings = list(z_ND.detach().split(num_images)[:NUM_ASSIGNED])
        codes = [self._codes(view, score_BK.detach(), now) for view, score_BK in enumerate(scores[:NUM_ASSIGNED])]
        self.uses += assignments.nearest_counts(torch.cat(scores[:NUM_ASSIGNED]).detach())
        loss = assignments.cross_view_loss(codes, scores, self.temperature)
        return Outputs(loss, {"target_entropy": assignments.entropy(torch.cat(codes))}, z_ND[:num_images])

    def _codes(self, view: int, score_BK: Tensor, now: Now) -> Tensor:
        """The assignments of one view's images, [B, K], made together with those of the queue once it is full. A
        collective.
        """
        num_images = len(score_BK)
        queue_RD = self._rows_in_use(view, num_images * distributed.world(), now)
        if len(queue_RD) and self._pushed_rows()[view] >= len(queue_RD):
            part_RD = distributed.own(queue_RD, len(queue_RD) // distributed.world())
            # The queue holds earlier embeddings; their scores are taken with the current prototypes.
            score_BK = torch.cat([self.prototypes(part_RD).detach(), score_BK])
        return assignments.balanced(score_BK, epsilon=self.epsilon, iterations=self.sinkhorn_iterations)[-num_images:]

    def _pushed_rows(self) -> list[int]:
        """For each assigned view the number of its queue's rows that hold an embedding."""
        return self._pushed.of(self.queue, lambda queue: queue.any(2).sum(1).tolist())

    def _rows_in_use(self, view: int, batch: int, now: Now) -> Tensor:
        """The rows of a view's queue that are in use, [R, D], a whole number of batches; no rows before
        `queue_start_epoch`.
        """
        begun = now.epoch is not None and now.epoch >= self.queue_start_epoch
        return self.queue[view, : self.queue.shape[1] // batch * batch if begun else 0]

    @torch.no_grad()
    def after_step(self, now: Now) -> None:
        pushed = self._pushed_rows() if self.queue.numel() else []
        for view, z_BD in enumerate(self.embeddings):
            rows_RD = self._rows_in_use(view, len(z_BD) * distributed.world(), now)
            if len(rows_RD):
                z_GD = distributed.gather(z_BD)
                rows_RD.copy_(torch.cat([z_GD, rows_RD[: -len(z_GD)]]))
                pushed[view] = min(pushed[view] + len(z_GD), len(rows_RD))
        self._pushed.note(self.queue, pushed)
        self.embeddings = []

    def statistics(self) -> dict[str, float]:
        values = assignments.use_statistics(self.uses)
        self.uses.zero_()
        return values

    def warning(self, statistics: Mapping[str, Any]) -> str | None:
        wrong = assignments.collapse(statistics)
        if wrong is None:
            return super().warning(statistics)
        return (
            f"The embedding has collapsed: {wrong}. What helps: harder assignments (method.epsilon=0.03), prototypes"
            " that are frozen for longer at the start (method.prototypes_frozen_steps), fewer prototypes"
            " (method.num_prototypes), a lower optimizer.lr, easier views."
        )

    def costs(self, sizes: list[int]) -> Costs:
        """The ranks sum K float64 numbers for each assigned view and Sinkhorn iteration, and K int64 numbers for the
        prototypes' use.
        """
        num_prototypes = len(self.uses)
        return Costs(
            encoded=list(range(len(sizes))),
            terms=NUM_ASSIGNED * (len(sizes) - 1),
            gathers=NUM_ASSIGNED if self.queue.shape[1] else 0,
            prototypes=num_prototypes,
            summed_bytes=8 * num_prototypes * (NUM_ASSIGNED * self.sinkhorn_iterations + 1),
            together=True,
        )


def _read_anew(method: SwAV, _: object) -> None:
    method._pushed.forget()
