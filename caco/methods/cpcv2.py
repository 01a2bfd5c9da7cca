"""CPC v2: from the patches above, predict those further down, and so from every side (arXiv 1905.09272).

The authors have published no code; the networks and the loss are those of the pseudocode in the paper's appendix.

Shapes: B this rank's images, G all ranks', H = W patches a side, F features, D width of targets and predictions.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed
from caco.data.loaders.batches import Batch
from caco.errors import UserError
from caco.methods.base import Costs, Method, Needs, Now, Outputs, Phase
from caco.nn.backbones import feature_width
from caco.nn.heads import Encoder, at_least_float32
from caco.nn.twin import MomentumTwin
from caco.ranges import AboveZero, Count, Layers, Length, Range, Several, ShareBelowOne, Width, held
from caco.schedules import RunShape, Table, constant


class ContextNetwork(nn.Module):
    """Features [B, F, H, W] to contexts of that shape: the one at row i sees rows 0 to i.

    Residual blocks of convolutions: 1 x 1, ReLU, 1 x 3 with the neighbours to both sides, 2 x 1 with the row above (a
    row of zeros above the first), ReLU, 1 x 1; at last a ReLU.
    """

    def __init__(self, *, width: int, hidden_dim: int = 256, blocks: int = 5):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, hidden_dim, 1), nn.ReLU(inplace=True),
                nn.Conv2d(hidden_dim, hidden_dim, (1, 3), padding=(0, 1)),
                nn.ZeroPad2d((0, 0, 1, 0)), nn.Conv2d(hidden_dim, hidden_dim, (2, 1)), nn.ReLU(inplace=True),
                nn.Conv2d(hidden_dim, width, 1),
            )
            for _ in range(blocks)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return F.relu(x)


class Prediction(nn.Module):
    """Features of the patches to predictions of the patches k rows further, for each k, from each side.

    Args:
        width: F. dim: D. hidden_dim, blocks: of each side's context network.
        directions: sides from which it predicts: downwards, then as the grid is turned by quarters.
        distances: the k.
        scale: of the predictions.
    """

    def __init__(
        self,
        *,
        width: int,
        dim: int,
        hidden_dim: int,
        blocks: int,
        directions: int,
        distances: Sequence[int],
        scale: float,
    ):
        super().__init__()
        self.contexts = nn.ModuleList(
            ContextNetwork(width=width, hidden_dim=hidden_dim, blocks=blocks) for _ in range(directions)
        )
        self.predictors = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(width, dim, 1) for _ in distances) for _ in range(directions)
        )
        self.distances, self.scale = list(distances), scale

    def forward(self, z_BHWF: Tensor) -> list[list[Tensor]]:
        """By direction, then by distance: [B, H - k, W, D], of the patches from row k of the turned grid on."""
        made = []
        for turns, (context, predictors) in enumerate(zip(self.contexts, self.predictors, strict=True)):
            c_BFHW = context(torch.rot90(z_BHWF, turns, (1, 2)).permute(0, 3, 1, 2))
            assert isinstance(predictors, nn.ModuleList)
            made.append([
                self.scale * at_least_float32(predictor(c_BFHW[:, :, :-k])).permute(0, 2, 3, 1)
                for k, predictor in zip(self.distances, predictors, strict=True)
            ])  # fmt: skip
        return made


class CPCv2(Method):
    """What lies k rows further in an image is predicted from the rows up to here, and told from all other patches.

    L = sum over directions and distances k of mean CE(s c W_k . targets), where the right target is the patch of the
    same image and column k rows further, and the others are all patches of all images (of a group). Gradients flow into
    predictions and targets.

    Evaluators and exports see the average of the encoder's weights over the steps.

    Args:
        encoder: its projector makes the targets of a patch's features, a linear layer as published; the same for all
            directions.
        grid: patches a side, H.
        distances: k, in rows. Published are "several"; the pseudocode's default is [3], the nearest that shares no
            pixels with its context.
        directions: 1, downwards, up to 4.
        hidden_dim, blocks: of the context networks.
        scale: s, of the predictions.
        group_size: images whose patches are told apart from each other, neighbours in a rank's batch (published: a
            worker's 16); None: those of the batch of all ranks.
        averaging: m of the running average of the encoder's weights, made after each step; None for none.
    """

    needs = Needs(patches="row by row")

    @held
    def __init__(
        self,
        *,
        encoder: Encoder,
        grid: Several = 6,
        distances: Annotated[Sequence[Count], Length(least=1)] = (3, 4, 5),
        directions: Annotated[int, Range(least=1, most=4)] = 4,
        hidden_dim: Width = 256,
        blocks: Layers = 5,
        scale: AboveZero = 0.1,
        group_size: Several | None = None,
        averaging: ShareBelowOne | None = 0.9999,
    ):
        super().__init__()
        if len(set(distances)) != len(distances) or max(distances) >= grid:
            raise UserError(
                f"method.distances must be different numbers from 1 to grid - 1, {grid - 1}; got {list(distances)}"
            )
        self.encoder = encoder
        self.prediction = Prediction(
            width=feature_width(encoder.backbone), dim=encoder.projector.dim, hidden_dim=hidden_dim, blocks=blocks,
            directions=directions, distances=distances, scale=scale,
        )  # fmt: skip
        self.twin = None if averaging is None else MomentumTwin(encoder)
        self.grid, self.group_size, self.averaging = grid, group_size, averaging
        self.needs = Needs(patches="row by row", num_patches=grid**2, whole_batch=group_size is None)

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override] # one of the encoders'; an attribute would be a second part of the state
        backbone = self.encoder.backbone if self.twin is None else self.twin.encoder.backbone
        assert isinstance(backbone, nn.Module)
        return backbone

    def phases(self, run: RunShape) -> list[Phase]:
        self._check_groups(run.batch // distributed.world())
        return super().phases(run)

    def _check_groups(self, num_images: int) -> None:
        if self.group_size is not None and num_images % self.group_size:
            raise UserError(
                f"method.group_size: expected null, or a divisor of the {num_images} images that a process takes at"
                f" once; got {self.group_size}"
            )

    def schedules(self, run: RunShape) -> dict[str, Table]:
        """The average's m, if there is one."""
        return {} if self.averaging is None else {"twin_momentum": constant(run, self.averaging)}

    def forward(self, batch: Batch, now: Now) -> Outputs:
        assert batch.patches is not None, "needs"
        num_images = len(batch.patches)
        self._check_groups(num_images)  # a batch may have been cut into parts
        z_ND = self.encoder.backbone(batch.patches.flatten(0, 1))
        target_BHWD = at_least_float32(self.encoder.projector(z_ND)).unflatten(0, (num_images, self.grid, self.grid))
        predictions = self.prediction(z_ND.unflatten(0, (num_images, self.grid, self.grid)))
        targets, first = target_BHWD, 0
        if self.group_size is None:
            targets, first = distributed.gather_with_gradient(target_BHWD), distributed.rank() * num_images
        losses = [
            _losses(p_BHWD, torch.rot90(targets, turns, (1, 2)), first=first, group_size=self.group_size)
            for turns, of_direction in enumerate(predictions)
            for p_BHWD in of_direction
        ]
        loss = torch.stack([loss_N.mean() for loss_N in losses]).sum()
        embedding_BD = target_BHWD.detach().mean((1, 2))  # of an image, over its patches
        return Outputs(loss, {"positive_probability": (-torch.cat(losses).detach()).exp().mean()}, embedding_BD)

    def after_step(self, now: Now) -> None:
        """The average moves; of what is no parameter it has the encoder's, for no image goes through it."""
        if self.twin is not None:
            self.twin.update(self.encoder, now["twin_momentum"])
            for ours, theirs in zip(self.twin.encoder.buffers(), self.encoder.buffers(), strict=True):
                ours.copy_(theirs)

    def costs(self, sizes: list[int]) -> Costs:
        """A term for each predicted patch of an image; the targets of all patches are gathered, unless groups keep to
        their rank.
        """
        patches = self.grid**2
        predicted = sum((self.grid - k) * self.grid for k in self.prediction.distances) * len(self.prediction.contexts)
        gathered = 0 if self.group_size else patches
        return Costs(
            encoded=[],
            terms=predicted,
            columns_per_image=gathered,
            columns=patches * (self.group_size or 0),
            gathers=gathered,
            gathers_with_gradient=gathered,
            patch_network=_PatchNetwork(self.encoder, self.prediction),
        )


def _losses(p_BHWD: Tensor, target_GHWD: Tensor, *, first: int, group_size: int | None) -> Tensor:
    """Cross entropies of predictions [B, H - k, W, D] of the rows from k on, [B (H - k) W].

    Args:
        first: position of this rank's images among those of the targets; group_size: see `CPCv2`.
    """
    num_images, rows, columns, width = p_BHWD.shape
    side = target_GHWD.shape[1]
    groups = 1 if group_size is None else num_images // group_size
    image = torch.arange(num_images, device=p_BHWD.device) % (group_size or num_images) + first
    within = torch.arange(rows * columns, device=p_BHWD.device) + (side - rows) * columns
    label_N = (image[:, None] * side * columns + within).flatten()
    with torch.autocast(p_BHWD.device.type, enabled=False):
        logits = torch.bmm(
            p_BHWD.reshape(groups, -1, width), target_GHWD.reshape(groups, -1, width).transpose(1, 2)
        ).flatten(0, 1)
        return F.cross_entropy(logits, label_N, reduction="none")


class _PatchNetwork(nn.Module):
    """What the loss takes of patches, as one tensor, for counting."""

    def __init__(self, encoder: Encoder, prediction: Prediction):
        super().__init__()
        self.backbone, self.projector, self.prediction = encoder.backbone, encoder.projector, prediction

    def forward(self, patches: Tensor) -> Tensor:
        z_ND = self.backbone(patches.flatten(0, 1))
        side = math.isqrt(patches.shape[1])
        made = [
            p for of_direction in self.prediction(z_ND.unflatten(0, (len(patches), side, side))) for p in of_direction
        ]
        return torch.cat([self.projector(z_ND).flatten(), *(p.flatten() for p in made)])
