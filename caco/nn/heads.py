"""Heads between a backbone's features and the embedding that the loss sees."""

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from caco.errors import UserError


class Projector(nn.Sequential):
    """A multilayer perceptron: linear layers, (BatchNorm and) ReLU between them. Projectors are of this class, and predictors.

    The paper's projector is 2048-2048-2048-256 with BatchNorm and without biases; AdCo's and MoCo v2's 2048-2048-128 has biases
    and no BatchNorm.

    Args:
        in_dim: width of its input, the backbone's features.
        hidden_dim: width between the layers.
        dim: width D of the embedding.
        layers: number of linear layers.
        batch_norm: BatchNorm after every layer but the last.
        last_batch_norm: a BatchNorm after the last layer too (SimCLR, NNCLR).
        last_affine: whether that one has a scale and a shift (not in SimSiam and MoCo v3).
        bias: biases in the linear layers.
        last_bias: a bias in the last one; None for what `bias` says.
        initialisation: of the linear layers: torch's, or "truncated_normal" of spread 1/sqrt(inputs), cut at twice that, and biases
            of 0 (BYOL, whose library does so).
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
        last_affine: bool = True,
        bias: bool = False,
        last_bias: bool | None = None,
        initialisation: Literal["torch", "truncated_normal"] = "torch",
    ):
        if min(in_dim, hidden_dim, dim, layers) < 1:
            raise UserError(
                "projector widths and layers must be at least 1; got "
                f"in_dim={in_dim}, hidden_dim={hidden_dim}, dim={dim}, layers={layers}"
            )
        if not (last_affine or last_batch_norm):
            raise UserError("projector.last_affine=false is of the last BatchNorm, and last_batch_norm=false leaves that out")
        widths = [in_dim] + [hidden_dim] * (layers - 1) + [dim]
        biases = [bias] * (layers - 1) + [bias if last_bias is None else last_bias]
        modules: list[nn.Module] = []
        for (narrow, wide), with_bias in zip(itertools.pairwise(widths), biases, strict=True):
            if modules:
                modules += ([nn.BatchNorm1d(narrow)] if batch_norm else []) + [nn.ReLU(inplace=True)]
            modules.append(nn.Linear(narrow, wide, bias=with_bias))
        if last_batch_norm:
            modules.append(nn.BatchNorm1d(dim, affine=last_affine))
        super().__init__(*modules)
        if initialisation == "truncated_normal":
            for layer in self:
                if isinstance(layer, nn.Linear):
                    spread = layer.in_features**-0.5
                    nn.init.trunc_normal_(layer.weight, std=spread, a=-2 * spread, b=2 * spread)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        self.dim = dim


def at_least_float32(x: Tensor) -> Tensor:
    """What a head gives under autocast is of eight bits of mantissa, which similarities at tau 0.08 do not survive."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Encoder(nn.Module):
    """Backbone, then projector, then the unit sphere. Images [B, 3, H, W] to float32 embeddings [B, D].

    `unit=False` stops before the sphere, at what the projector gives: a predictor takes that, and losses of its covariance.
    """

    def __init__(self, *, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor, unit: bool = True) -> Tensor:
        embedding = at_least_float32(self.projector(self.backbone(images)))
        return nn.functional.normalize(embedding, dim=1) if unit else embedding
