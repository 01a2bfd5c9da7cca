"""SeLa: classification with labels that the network itself assigns to all images, so that each label has equally many
images (arXiv 1911.05371).

Shapes: B this rank's images, N images of the training set, P of these that this rank labels, H heads, K labels of a
head, F width before the last layer.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed
from caco.data.loaders.batches import Batch, mixed_seed
from caco.data.loaders.images import Images
from caco.errors import UserError
from caco.methods import assignments
from caco.methods.base import Costs, Method, Needs, Now, Outputs
from caco.nn.heads import Encoder, Projector
from caco.ranges import AboveZero, Count, Natural, Seed, held
from caco.schedules import RunShape, Table


class SeLa(Method):
    """L = the mean over the heads of the cross-entropy with the head's labels. The labels are made anew at certain
    moments of the run.

    At such a moment all images go through the network once, without gradient but otherwise as in training: augmented,
    and in training mode, so that BatchNorm's statistics move. Then `assignments.balanced_labels` computes each head's
    labels from its probabilities. The first moment comes before the first step; until then a head's labels are the
    images' numbers modulo K, shuffled.

    The published method takes one view of an image. With several views the losses are averaged, and the labels are made
    from the first view.

    Args:
        encoder: images to the H K logits of all heads, not normalised; its projector's last layer is linear. Its
            `.backbone` is what evaluators and exports take.
        num_images: N, of the training set.
        seed: of the initial labels.
        num_heads: H, which divides the projector's width.
        num_moments: how many times the labels are made anew during the run.
        spacing: of the moments t_j, in epochs, where E is the run's number of epochs and j goes from 0 to J =
            num_moments - 1: "quadratic", (E + 1.01) (j / J)^2, dense at first; "linear", (E + 1.01) j / J. A step has
            at most one moment; further moments that are due wait for the next steps.
        one_head_at_a_time: whether a moment makes the labels of head (epoch mod H) alone (the authors' CIFAR recipe).
        power: lambda, the power of the probabilities; higher is nearer to each image's own most probable label.
        tolerance: of the balance, as a sum over all images.

    Source: arXiv 1911.05371.
    Raises:
        UserError: a projector whose outputs are not the heads' logits.
    """

    needs = Needs(indices=True)

    labels: Tensor  # int32 [H, N], each head's label of each image

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        num_images: Count,
        seed: Seed = 0,
        num_heads: Count = 10,
        num_moments: Natural = 100,
        spacing: Literal["quadratic", "linear"] = "quadratic",
        one_head_at_a_time: bool = False,
        power: AboveZero = 25.0,
        tolerance: AboveZero = 0.1,
    ):
        super().__init__()
        if encoder.projector.dim % num_heads or encoder.projector.dim // num_heads < 2:
            raise UserError(
                f"method.num_heads: expected a divisor of projector.dim, {encoder.projector.dim}, that leaves 2 labels"
                f" or more to a head; got {num_heads}"
            )
        if not isinstance(encoder.projector, Projector):
            raise UserError(
                "projector: this method's heads are the last layer of a caco.nn.heads.Projector; expected such a"
                f" projector, got {type(encoder.projector).__name__}"
            )
        if not isinstance(encoder.projector[-1], nn.Linear):
            raise UserError(
                "projector.last_batch_norm=true: the heads are the projector's last layer, which has to be linear;"
                " expected false"
            )
        self.encoder, self.num_images = encoder, num_images
        self.num_heads, self.num_labels = num_heads, encoder.projector.dim // num_heads
        self.num_moments, self.spacing, self.one_head_at_a_time = num_moments, spacing, one_head_at_a_time
        self.power, self.tolerance = power, tolerance
        generator = torch.Generator().manual_seed(mixed_seed(seed) % 2**63)
        shuffled = [torch.randperm(num_images, generator=generator) % self.num_labels for _ in range(num_heads)]
        self.register_buffer("labels", torch.stack(shuffled).to(torch.int32))

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # as an attribute it would be in the state twice
        return self.encoder.backbone

    def _layers(self) -> tuple[list[nn.Module], nn.Linear]:
        """The projector's layers without the last, and the last layer, whose outputs are the heads' logits."""
        assert isinstance(self.encoder.projector, Projector)
        *before_last, last = self.encoder.projector
        assert isinstance(last, nn.Linear)
        return before_last, last

    def schedules(self, run: RunShape) -> dict[str, Table]:
        """labels_made: 1 at the steps before which the labels are made anew, else 0."""
        last = max(1, self.num_moments - 1)
        shares = [(j / last) ** (2 if self.spacing == "quadratic" else 1) for j in range(self.num_moments)]
        waiting = [
            (run.epochs + 1.01) * share * self.num_images for share in reversed(shares)
        ]  # the moments in images seen, the next one last
        table = []
        for step in range(run.steps):
            is_due = bool(waiting) and step * run.batch >= waiting[-1]
            if is_due:
                waiting.pop()
            table.append(float(is_due))
        return {"labels_made": table}

    def before_step(self, now: Now, images: Images) -> None:
        if now["labels_made"]:
            heads = range(self.num_heads)
            self.make_labels(
                images, now.step, [(now.epoch or 0) % self.num_heads] if self.one_head_at_a_time else list(heads)
            )

    @torch.no_grad()
    def make_labels(self, images: Images, step: int, heads: list[int]) -> None:
        """Make the labels of these heads anew, for all images. A collective.

        Args:
            images: makes the pass over all images.
            step: of the run; it determines the order and the views of the pass.
            heads: numbers of the heads.
        Raises:
            UserError: the network has collapsed, see `assignments.balanced_labels`.
        """
        before_last, last = self._layers()
        index, hidden = [], []
        for batch in images("train", stream=step):
            x_BF = self.encoder.backbone(batch.views[0])
            for layer in before_last:
                x_BF = layer(x_BF)
            index.append(batch.index[batch.index >= 0])
            hidden.append(x_BF[batch.index >= 0].clone())
        index_P, hidden_PF = torch.cat(index), torch.cat(hidden)
        for head in heads:
            part = slice(head * self.num_labels, (head + 1) * self.num_labels)
            logit_PK = F.linear(hidden_PF, last.weight[part], None if last.bias is None else last.bias[part])
            label_P = assignments.balanced_labels(
                F.log_softmax(logit_PK.double(), 1), power=self.power, tolerance=self.tolerance
            )
            of_all = torch.zeros_like(self.labels[head])
            of_all[index_P] = label_P.to(of_all.dtype)
            self.labels[head] = distributed.sum_(of_all)  # each image was labelled on one rank, and is 0 on the others

    def forward(self, batch: Batch, now: Now) -> Outputs:
        label_BH = self.labels[:, batch.index].T.long()
        losses, right, logits = [], [], [self.encoder(view, unit=False) for view in batch.views]
        for of_view in logits:
            logit_BHK = of_view.unflatten(1, (self.num_heads, self.num_labels))
            losses.append(F.cross_entropy(logit_BHK.flatten(0, 1), label_BH.flatten()))
            right.append((logit_BHK.detach().argmax(2) == label_BH).double().mean())
        return Outputs(torch.stack(losses).mean(), {"labels_predicted": torch.stack(right).mean()}, logits[0])

    def statistics(self) -> dict[str, float]:
        """How evenly the images are distributed over the first head's labels."""
        return assignments.use_statistics(torch.bincount(self.labels[0].long(), minlength=self.num_labels))

    def warning(self, statistics: Mapping[str, Any]) -> str | None:
        wrong = assignments.collapse(statistics)
        if wrong is None:
            return super().warning(statistics)
        return (
            f"The labels have collapsed: {wrong}. What helps: a lower method.power, which balances them more, a lower"
            " optimizer.lr."
        )

    def costs(self, sizes: list[int]) -> Costs:
        """A pass over all images holds for each image the last layer's input and, for one head at a time, the logits
        and, in float64, logits, log probabilities and their powers.
        """
        last = self._layers()[1]
        return Costs(encoded=list(range(len(sizes))), pass_bytes=4 * last.in_features + (4 + 3 * 8) * self.num_labels)
