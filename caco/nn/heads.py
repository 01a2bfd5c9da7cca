"""Heads between a backbone's features and the embedding that the loss sees."""

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from caco.errors import UserError



ACTIVATIONS = {"relu": lambda: nn.ReLU(inplace=True), "gelu": nn.GELU}


class Projector(nn.Sequential):
    """A multilayer perceptron: linear layers, (BatchNorm and) an activation between them, nothing after the last.

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
        activation: between the layers.
        initialisation: of the linear layers: torch's, or "truncated_normal_0.02": that spread, cut at 2, and biases of 0 (DINO).
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
        activation: Literal["relu", "gelu"] = "relu",
        initialisation: Literal["torch", "truncated_normal_0.02"] = "torch",
    ):
        if activation not in ACTIVATIONS:
            raise UserError(f"projector.activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if initialisation not in ("torch", "truncated_normal_0.02"):
            raise UserError(f"projector.initialisation: expected torch or truncated_normal_0.02, got {initialisation!r}")
        if min(in_dim, hidden_dim, dim, layers) < 1:
            raise UserError(
                "projector widths and layers must be at least 1; got "
                f"in_dim={in_dim}, hidden_dim={hidden_dim}, dim={dim}, layers={layers}"
            )
        widths = [in_dim] + [hidden_dim] * (layers - 1) + [dim]
        modules: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            if modules:
                modules += ([nn.BatchNorm1d(narrow)] if batch_norm else []) + [ACTIVATIONS[activation]()]
            modules.append(nn.Linear(narrow, wide, bias=bias))
            if initialisation == "truncated_normal_0.02":
                nn.init.trunc_normal_(modules[-1].weight, std=0.02)
                if bias:
                    nn.init.zeros_(modules[-1].bias)
        if last_batch_norm:
            modules.append(nn.BatchNorm1d(dim))
        super().__init__(*modules)
        self.dim = dim


class Encoder(nn.Module):
    """Backbone, then projector, then the unit sphere. Images [B, 3, H, W] to float32 embeddings [B, D].

    Several views at once, a list of [B, 3, H, W], give [V * B, D]: neighbours of one size go through the backbone together and all
    through the projector. So BatchNorm's statistics are of a size there and of all views here, as in SwAV's and DINO's code.
    """

    def __init__(self, *, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        embedding = self.projector(self._features(images))
        # float32 at least from here on: similarities at tau 0.08 do not survive bf16's eight bits of mantissa.
        return nn.functional.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=1)

    def _features(self, images: Tensor | list[Tensor]) -> Tensor:
        if isinstance(images, Tensor):
            return self.backbone(images)
        by_size = itertools.groupby(images, key=lambda view: view.shape[-1])
        return torch.cat([self.backbone(torch.cat(list(views))) for _, views in by_size])
