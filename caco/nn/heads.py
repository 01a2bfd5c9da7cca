"""Heads between a backbone's features and the embedding that the loss sees."""

import itertools

import torch
from torch import Tensor, nn

from caco.errors import UserError


class Projector(nn.Sequential):
    """A multilayer perceptron: linear layers, (BatchNorm and) ReLU between them, nothing after the last.

    The paper's is 2048-2048-2048-256 with BatchNorm and without biases; AdCo's and MoCo v2's 2048-2048-128 has biases
    and no BatchNorm.

    Args:
        in_dim: width of its input, the backbone's features.
        hidden_dim: width between the layers.
        dim: width D of the embedding.
        layers: number of linear layers.
        batch_norm: BatchNorm after every layer but the last.
        last_batch_norm: a BatchNorm after the last layer too (SimCLR, NNCLR).
        bias: biases in the linear layers.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        hidden_dim: int = 2048,
        dim: int = 256,
        layers: int = 3,
        batch_norm: bool = True,
        last_batch_norm: bool = False,
        bias: bool = False,
    ):
        if min(in_dim, hidden_dim, dim, layers) < 1:
            raise UserError(
                "projector widths and layers must be at least 1; got "
                f"in_dim={in_dim}, hidden_dim={hidden_dim}, dim={dim}, layers={layers}"
            )
        widths = [in_dim] + [hidden_dim] * (layers - 1) + [dim]
        modules: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            if modules:
                modules += ([nn.BatchNorm1d(narrow)] if batch_norm else []) + [nn.ReLU(inplace=True)]
            modules.append(nn.Linear(narrow, wide, bias=bias))
        if last_batch_norm:
            modules.append(nn.BatchNorm1d(dim))
        super().__init__(*modules)
        self.dim = dim


class Encoder(nn.Module):
    """Backbone, then projector, then the unit sphere. Images [B, 3, H, W] to float32 embeddings [B, D].

    Args:
        backbone: has `num_features`, the width of its output.
        projector: or another head that says by `dim` how wide its output is.
    """

    def __init__(self, *, backbone: nn.Module, projector: Projector):
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor) -> Tensor:
        embedding = self.projector(self.backbone(images))
        # float32 at least from here on: similarities at tau 0.08 do not survive bf16's eight bits of mantissa.
        return nn.functional.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=1)
