"""CPC v2: from an image's upper patches, predict patches further down, and likewise from the other three sides (arXiv
1905.09272).

The authors have published no code. The networks and the loss are those of the pseudocode in the paper's appendix.

Shapes: B this rank's images, G all ranks' images, N the patches of all images, H = W patches a side, F features, D
width of targets and predictions.
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
    """Maps features [B, F, H, W] to contexts of the same shape; a context in row i depends on rows 0 to i alone.

    Each residual block consists of a 1 x 1 convolution, ReLU, a 1 x 3 convolution over the neighbours on both sides, a
    2 x 1 convolution over the row and the row above it (zeros above the first row), ReLU, and a 1 x 1 convolution. A
    ReLU follows the last block.

    Args:
        width: F.
        hidden_dim: channels inside a block.
        blocks: number of blocks.
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
    """From the features of an image's patches, predicts the patches k rows further on, for each k and each direction.

    Args:
        width: F.
        dim: D.
        hidden_dim, blocks: of each direction's context network.
        directions: number of directions: first downwards, then after each quarter turn of the grid.
        distances: the values of k, in rows.
        scale: a factor on the predictions.
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
        """Predictions by direction, then by distance, [B, H - k, W, D] each: those of the patches in row k and further
        rows of the turned grid.

        Args:
            z_BHWF: the patches' features.
        """
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
    """From the rows of patches up to some row of an image, predicts the patch k rows further on; the prediction has to
    identify this patch among all other patches.

    L = sum over directions and distances k of mean CE(s c W_k . targets), where c is the context. The right target is
    the patch k rows further on in the same column of the same image; the other targets are all patches of all images,
    or of the images of a group. Gradients flow into predictions and targets.

    Evaluators and exports take a running average of the encoder's weights over the steps.

    Args:
        encoder: its projector maps the features of a patch to the target, by a linear layer as published, the same for
            all directions.
        grid: patches a side, H.
        distances: the values of k, in rows. The paper says "several"; its pseudocode's default is [3], the nearest
            patch that shares no pixels with the context.
        directions: 1 (downwards) to 4.
        hidden_dim, blocks: of the context networks.
        scale: s, a factor on the predictions.
        group_size: number of images whose patches are the targets together; a group's images are neighbours in a rank's
            batch (published: a worker's 16). None: the images of the batch of all ranks.
        averaging: m of the running average, which moves after each step; None for no average.

    Source: arXiv 1905.09272, the appendix's pseudocode.
    Raises:
        UserError: distances that are not different numbers below `grid`; later, a rank's batch that `group_size` does
            not divide.
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
    def backbone(self) -> nn.Module:  # type: ignore[override] # as an attribute it would be in the state twice
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
        """The running average's m, if there is an average."""
        return {} if self.averaging is None else {"twin_momentum": constant(run, self.averaging)}

    def forward(self, batch: Batch, now: Now) -> Outputs:
        assert batch.patches is not None, "needs"
        num_images = len(batch.patches)
        self._check_groups(num_images)  # again, as the batch may have been cut into parts
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
        embedding_BD = target_BHWD.detach().mean((1, 2))  # an image's embedding is the mean over its patches
        return Outputs(loss, {"positive_probability": (-torch.cat(losses).detach()).exp().mean()}, embedding_BD)

    def after_step(self, now: Now) -> None:
        """The running average moves. It copies the encoder's buffers: no image goes through it, so it gathers no
        statistics of its own.
        """
        if self.twin is not None:
            self.twin.update(self.encoder, now["twin_momentum"])
            for ours, theirs in zip(self.twin.encoder.buffers(), self.encoder.buffers(), strict=True):
                ours.copy_(theirs)

    def costs(self, sizes: list[int]) -> Costs:
        """Each predicted patch of an image is a term. Without groups, the targets of all patches are gathered."""
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
    """The cross entropies of predictions [B, H - k, W, D], those of the patches in row k and further rows; returns
    [B (H - k) W].

    Args:
        target_GHWD: the targets of all images.
        first: position of this rank's first image among these.
        group_size: as in `CPCv2`.
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
    """Everything that the loss takes of patches, as one tensor: `caco.plan` counts this network's arithmetic."""

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
