"""DINO: from every view a student predicts the scores that its momentum teacher gives to the two large views (arXiv
2104.14294).

Shapes: B this rank's images, N the embeddings of all views of these, D width of the embedding, K prototypes, V views.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from caco import distributed
from caco.data.loaders.batches import Batch
from caco.methods import assignments
from caco.methods.base import Costs, Method, Now, Outputs, ParameterGroup
from caco.nn.heads import Encoder
from caco.nn.prototypes import NormedPrototypes
from caco.nn.twin import MomentumTwin
from caco.ranges import AboveZero, Natural, Several, Share, held
from caco.schedules import RunShape, Table, cosine

NUM_TAUGHT = 2  # views that the teacher sees: the first two


class DINO(Method):
    """The student predicts, from every view, the teacher's centred and sharpened scores of each of the first two views
    other than that view itself.

    L = 1 / (2 (V - 1)) sum_{t < 2} sum_{v != t} mean_i -sum_k softmax((y_ti - c) / tau_t)_k log softmax(s_vi / tau)_k,
    where y are the teacher's scores and s the student's. After the optimiser's step the teacher's weights move towards
    the student's, and the centre c towards the mean of y.

    Evaluators and exports take the teacher's backbone, as in the published evaluations.

    Args:
        encoder: images to unit embeddings (the published head's bottleneck); its `.backbone` is the student's.
        num_prototypes: K, the width of the last layer.
        norm_last_layer: whether the prototypes' norms stay at 1; if not, they are learned (published for the longer
            ViT-S runs).
        last_layer_frozen_epochs: number of epochs at the start in which the prototypes stay as they were drawn.
        temperature: tau, the student's.
        teacher_temperature: the final tau_t. It changes only between epochs, whatever `schedule.unit` says.
        first_teacher_temperature: tau_t of epoch 0, from which it changes linearly to `teacher_temperature`.
        teacher_temperature_epochs: number of epochs of that change; 0: no change.
        momentum, final_momentum: the teacher's m at the start and the end of its cosine.
        centre_momentum: the share of the old centre that is kept in a step; the centre starts at 0.

    Source: arXiv 2104.14294, Eq. 3; the mean over the pairs as in the published code.
    """

    centre: Tensor  # [K]
    uses: Tensor  # int64 [K], how often each prototype was the nearest since the last `statistics`

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        num_prototypes: Several = 65536,
        norm_last_layer: bool = True,
        last_layer_frozen_epochs: Natural = 1,
        temperature: AboveZero = 0.1,
        teacher_temperature: AboveZero = 0.04,
        first_teacher_temperature: AboveZero = 0.04,
        teacher_temperature_epochs: Natural = 0,
        momentum: Share = 0.996,
        final_momentum: Share = 1.0,
        centre_momentum: Share = 0.9,
    ):
        super().__init__()
        self.encoder = encoder
        self.prototypes = NormedPrototypes(
            dim=encoder.projector.dim, number=num_prototypes, learn_norms=not norm_last_layer
        )
        self.twin, self.twin_prototypes = MomentumTwin(encoder), MomentumTwin(self.prototypes)
        for module in self.twin.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0  # the teacher runs in training mode, but has no stochastic depth
        self.register_buffer("centre", torch.zeros(num_prototypes))
        self.register_buffer("uses", torch.zeros(num_prototypes, dtype=torch.int64))
        self.last_layer_frozen_epochs, self.temperature = last_layer_frozen_epochs, temperature
        self.teacher_temperature, self.first_teacher_temperature = teacher_temperature, first_teacher_temperature
        self.teacher_temperature_epochs = teacher_temperature_epochs
        self.momentum, self.final_momentum, self.centre_momentum = momentum, final_momentum, centre_momentum
        self.taught: list[Tensor] = []  # the teacher's mean scores [K] in this step, for each part of the batch

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # as an attribute it would be in the state twice
        backbone = self.twin.encoder.backbone
        assert isinstance(backbone, nn.Module)
        return backbone

    def schedules(self, run: RunShape) -> dict[str, Table]:
        """The teacher's m, and its temperature, which changes between epochs."""
        rising = np.linspace(
            self.first_teacher_temperature, self.teacher_temperature, self.teacher_temperature_epochs
        ).tolist()
        by_epoch = [rising[epoch] if epoch < len(rising) else self.teacher_temperature for epoch in range(run.epochs)]
        return {
            "twin_momentum": cosine(run, self.momentum, self.final_momentum),
            "teacher_temperature": [temperature for temperature in by_epoch for _ in range(run.steps_per_epoch)],
        }

    def parameter_groups(self) -> list[ParameterGroup]:
        """The encoder, whose biases and norms have no weight decay with any optimiser; and the prototypes, which are
        frozen at first.

        Source: the published get_params_groups (utils.py), for AdamW, SGD and LARS alike.
        """
        return [
            ParameterGroup([p for p in self.encoder.parameters() if p.requires_grad], decay_one_dimensional=False),
            ParameterGroup(list(self.prototypes.parameters()), frozen_epochs=self.last_layer_frozen_epochs),
        ]

    def forward(self, batch: Batch, now: Now) -> Outputs:
        """The views may have several sizes; neighbouring views of one size go through the backbone together."""
        num_images = len(batch.index)
        z_ND = self.encoder(batch.views)
        scores = list(self.prototypes(z_ND).split(num_images))
        y_NK = self.twin_prototypes(self.twin(batch.views[:NUM_TAUGHT]))
        centred_NK = y_NK - self.centre
        target_NK = torch.softmax(centred_NK / now["teacher_temperature"], 1)
        self.taught.append(y_NK.mean(0))
        self.uses += assignments.nearest_counts(centred_NK)
        loss = assignments.cross_view_loss(list(target_NK.split(num_images)), scores, self.temperature)
        return Outputs(loss, {"target_entropy": assignments.entropy(target_NK)}, z_ND[:num_images])

    def after_step(self, now: Now) -> None:
        mean_K = distributed.sum_(torch.stack(self.taught).mean(0)) / distributed.world()
        self.centre.lerp_(mean_K, 1 - self.centre_momentum)
        self.taught.clear()
        self.twin.update(self.encoder, now["twin_momentum"])
        self.twin_prototypes.update(self.prototypes, now["twin_momentum"])

    def statistics(self) -> dict[str, float]:
        values = assignments.use_statistics(self.uses)
        self.uses.zero_()
        return values

    def warning(self, statistics: Mapping[str, Any]) -> str | None:
        wrong = assignments.collapse(statistics)
        if wrong is None:
            return super().warning(statistics)
        return (
            f"The teacher has collapsed: {wrong}. What helps: a last layer that is frozen for longer at the start"
            " (method.last_layer_frozen_epochs), a lower method.teacher_temperature if target_entropy is near log K, a"
            " higher method.momentum with small batches (0.9995 at 256), a lower optimizer.lr."
        )

    def costs(self, sizes: list[int]) -> Costs:
        """The ranks sum the teacher's mean scores and the prototypes' use: K float32 numbers and K int64 numbers."""
        num_prototypes = len(self.centre)
        return Costs(
            encoded=list(range(len(sizes))),
            followed=list(range(NUM_TAUGHT)),
            terms=NUM_TAUGHT * (len(sizes) - 1),
            prototypes=num_prototypes,
            summed_bytes=(4 + 8) * num_prototypes,
            together=True,
        )
