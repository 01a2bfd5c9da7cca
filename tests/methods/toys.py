"""Small methods for tests. Each uses a part of the methods' contract as some published method does."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from caco import distributed
from caco.methods.base import TRAINING, Method, Needs, Outputs, ParameterGroup, Phase
from caco.nn.heads import Encoder
from caco.nn.twin import MomentumTwin
from caco.schedules import constant, cosine


class Toy(Method):
    """Makes the embeddings of both views of an image agree, and those of different images differ."""

    needs = Needs(whole_batch=True)

    def __init__(self, *, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    @property
    def backbone(self):
        return self.encoder.backbone

    def forward(self, batch, now):
        q, k = (self.encoder(view) for view in batch.views[:2])
        logits = q @ k.T / 0.2
        return Outputs(F.cross_entropy(logits, torch.arange(len(q))), {"agreement": (q * k).sum(1).mean().detach()})


class PredictorAtItsOwnRate(Toy):
    """As in SimSiam, the predictor keeps the full rate while the encoder's rate falls."""

    def __init__(self, *, encoder: Encoder):
        super().__init__(encoder=encoder)
        self.predictor = nn.Linear(encoder.projector.dim, encoder.projector.dim)

    def schedules(self, run):
        return {"predictor_rate": constant(run, 1.0)}

    def parameter_groups(self):
        return [
            ParameterGroup(list(self.encoder.parameters())),
            ParameterGroup(list(self.predictor.parameters()), rate="predictor_rate"),
        ]

    def forward(self, batch, now):
        z = [self.encoder(view) for view in batch.views]
        p = [F.normalize(self.predictor(z_BD), dim=1) for z_BD in z]
        loss = -((p[0] * z[1].detach()).sum(1) + (p[1] * z[0].detach()).sum(1)).mean() / 2
        return Outputs(loss, {})


class LabelsMadeAnew(Toy):
    """As in SeLa and PCL, each image gets a label from a pass over all images: with plain views before each epoch, and
    with augmented views in the middle of it.
    """

    def __init__(self, *, encoder: Encoder, num_images: int = 1400, num_labels: int = 4):
        super().__init__(encoder=encoder)
        self.prototypes = nn.Linear(encoder.projector.dim, num_labels, bias=False)
        self.register_buffer("labels", torch.full((num_images,), -1))
        self.register_buffer("times_made", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def make(self, batches):
        was_training = self.training
        self.eval()
        for batch in batches:
            label = self.prototypes(self.encoder(batch.views[0])).argmax(1)
            self.labels[batch.index[batch.index >= 0]] = label[
                batch.index >= 0
            ]  # -1 marks an image that only fills up the last batch of a pass
        self.times_made += 1
        self.train(was_training)

    def before_epoch(self, now, images):
        self.make(images("plain"))
        assert (self.labels >= 0).all(), "a plain pass has every image"

    def before_step(self, now, images):
        if now.step_in_epoch == 4:
            self.make(images("train", stream=now.step))

    def forward(self, batch, now):
        logits = self.prototypes(self.encoder(batch.views[0])) / 0.2
        return Outputs(F.cross_entropy(logits, self.labels[batch.index]), {})


class OrderOfItsOwn(Toy):
    """As in PIC, consecutive steps see overlapping windows of the images."""

    def __init__(self, *, encoder: Encoder, num_images: int = 1400):
        super().__init__(encoder=encoder)
        self.register_buffer("seen", torch.zeros(num_images, dtype=torch.int64))
        self.step_index = None

    def order(self, epoch):
        return (np.arange(len(self.seen)) * 3 + epoch) % len(self.seen)

    def forward(self, batch, now):
        self.step_index = batch.index
        return super().forward(batch, now)

    def after_step(self, now):
        self.seen[self.step_index] += 1


class LastLayerFrozenAtFirst(Toy):
    """As in DINO, the last layer is frozen for the first steps, and the weight decay rises."""

    def __init__(self, *, encoder: Encoder, frozen_steps: int = 3):
        super().__init__(encoder=encoder)
        self.last = nn.Linear(encoder.projector.dim, 8)
        self.frozen_steps = frozen_steps

    def parameter_groups(self):
        return [
            ParameterGroup(list(self.encoder.parameters())),
            ParameterGroup(list(self.last.parameters()), frozen_steps=self.frozen_steps),
        ]

    def forward(self, batch, now):
        p, t = (self.last(self.encoder(view)) for view in batch.views)
        return Outputs(F.cross_entropy(p / 0.1, F.softmax(t.detach() / 0.04, 1)), {})


class TwinThatMovesAfter(Toy):
    """As in BYOL, the twin moves after the step; there is also a warm start, after which it is a copy of the
    encoder.
    """

    def __init__(self, *, encoder: Encoder, warm_start_steps: int = 3):
        super().__init__(encoder=encoder)
        self.twin, self.warm_start_steps = MomentumTwin(encoder), warm_start_steps

    def phases(self, run):
        return [Phase("warm start", self.warm_start_steps, {"twin_momentum": 1.0}), Phase(TRAINING)]

    def schedules(self, run):
        return {"twin_momentum": cosine(run, 0.9, 1.0)}

    def forward(self, batch, now):
        if now.phase == "warm start":
            return super().forward(batch, now)
        q, k = self.encoder(batch.views[0]), self.twin(batch.views[1])
        return Outputs(F.cross_entropy(q @ k.T / 0.2, torch.arange(len(q))), {})

    def after_step(self, now):
        self.twin.update(self.encoder, now["twin_momentum"])

    def after_phase(self, now):
        if now.phase == "warm start":
            self.twin.update(self.encoder, 0.0)


class MemoryByImage(Toy):
    """As in InstDisc, there is a row for each image, found by the image's index and moved after the step."""

    def __init__(self, *, encoder: Encoder, num_images: int = 1400):
        super().__init__(encoder=encoder)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer(
            "memory", F.normalize(torch.randn(num_images, encoder.projector.dim, generator=generator), dim=1)
        )
        self.step_rows = None

    def forward(self, batch, now):
        q = self.encoder(batch.views[0])
        self.step_rows = distributed.gather(batch.index), distributed.gather(q)
        return Outputs(F.cross_entropy(q @ self.memory.T / 0.2, batch.index), {})

    def after_step(self, now):
        index, q = self.step_rows
        self.memory[index] = F.normalize(0.5 * self.memory[index] + 0.5 * q, dim=1)


class PatchesAndSizes(Toy):
    """As in PIRL and SwAV, the first view is also seen as a grid of patches, and there are smaller views."""

    def forward(self, batch, now):
        large, *small = batch.views
        patches = large.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        k = F.normalize(self.encoder(patches).unflatten(0, (len(large), -1)).mean(1), dim=1)
        losses = [F.cross_entropy(self.encoder(view) @ k.T / 0.2, torch.arange(len(large))) for view in small]
        return Outputs(torch.stack(losses).mean(), {})


ALL = (
    Toy, PredictorAtItsOwnRate, LabelsMadeAnew, OrderOfItsOwn, LastLayerFrozenAtFirst, TwinThatMovesAfter,
    MemoryByImage, PatchesAndSizes,
)  # fmt: skip
