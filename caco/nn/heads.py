"""Heads between a backbone's features and the embedding that the loss sees."""

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from caco.errors import UserError
from caco.ranges import Layers, Width, held

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": lambda: nn.ReLU(inplace=True), "gelu": nn.GELU}
INITIALISATIONS: dict[
    str, Callable[[int], tuple[float, float]] | None
] = {  # by a layer's inputs: a normal law's spread and cut
    "torch": None,
    "normal_0.01": lambda inputs: (0.01, math.inf),
    "truncated_normal_0.02": lambda inputs: (0.02, 2.0),
    "truncated_normal_fan_in": lambda inputs: (inputs**-0.5, 2 * inputs**-0.5),
}


class Head(nn.Module):
    """Features [B, F] to embeddings [B, `dim`]."""

    dim: int


class Projector(nn.Sequential, Head):
    """A multilayer perceptron: linear layers, (BatchNorm and) an activation between them. Predictors are of this class
    too.

    The paper's projector is 2048-2048-2048-256 with BatchNorm and without biases; AdCo's and MoCo v2's 2048-2048-128
    has biases and no BatchNorm.

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
        activation: between the layers.
        initialisation: of the linear layers: torch's; or a normal law, and biases of 0: "normal_0.01": of that spread
            (SimCLR);
            "truncated_normal_0.02": of that spread, cut at 2 (DINO); "truncated_normal_fan_in": of a spread of
            1/sqrt(inputs), cut at twice that (BYOL).
    """

    @held
    def __init__(
        self,
        *,
        in_dim: Width,
        hidden_dim: Width = 2048,
        dim: Width = 256,
        layers: Layers = 3,
        batch_norm: bool = True,
        last_batch_norm: bool = False,
        last_affine: bool = True,
        bias: bool = False,
        last_bias: bool | None = None,
        activation: Literal["relu", "gelu"] = "relu",
        initialisation: Literal["torch", "normal_0.01", "truncated_normal_0.02", "truncated_normal_fan_in"] = "torch",
    ):
        if not (last_affine or last_batch_norm):
            raise UserError(
                "projector.last_affine=false is of the last BatchNorm, and last_batch_norm=false leaves that out"
            )
        widths = [in_dim] + [hidden_dim] * (layers - 1) + [dim]
        biases = [bias] * (layers - 1) + [bias if last_bias is None else last_bias]
        law = INITIALISATIONS[initialisation]
        modules: list[nn.Module] = []
        for (narrow, wide), with_bias in zip(itertools.pairwise(widths), biases, strict=True):
            if modules:
                modules += ([nn.BatchNorm1d(narrow)] if batch_norm else []) + [ACTIVATIONS[activation]()]
            layer = nn.Linear(narrow, wide, bias=with_bias)
            if law is not None:
                spread, cut = law(layer.in_features)
                if cut < math.inf:
                    nn.init.trunc_normal_(layer.weight, std=spread, a=-cut, b=cut)
                else:
                    nn.init.normal_(layer.weight, std=spread)
                if with_bias:
                    nn.init.zeros_(layer.bias)
            modules.append(layer)
        if last_batch_norm:
            modules.append(nn.BatchNorm1d(dim, affine=last_affine))
        super().__init__(*modules)
        self.dim = dim


class JigsawHead(nn.Module):
    """Features of the patches of some images to an embedding of each image: one perceptron for all patches, then one
    linear layer for what it gives of an image's patches, one after the other. Nothing is made unit.

    Source: the published code of InfoMin (PyContrast, networks/util.py: JigsawHead, whose perceptron has two layers)
    and of PIRL (vissl, one layer); InfoMin's shuffles an image's patches here, the views have done it already.

    Args:
        in_dim: width of the features.
        hidden_dim: between the perceptron's layers.
        dim: width of what it gives of a patch, and of the embedding.
        layers: of the perceptron, with biases, without BatchNorm.
        num_patches: of an image.
    """

    def __init__(self, *, in_dim: int, hidden_dim: int = 2048, dim: int = 128, layers: int = 2, num_patches: int = 9):
        super().__init__()
        if num_patches < 2:
            raise UserError(f"a jigsaw head needs 2 patches or more; got {num_patches}")
        self.each = Projector(in_dim=in_dim, hidden_dim=hidden_dim, dim=dim, layers=layers, batch_norm=False, bias=True)
        self.together = nn.Linear(num_patches * dim, dim)

    def forward(self, features_ND: Tensor) -> Tensor:
        """[B * P, F], an image's patches one after the other, to [B, D]."""
        return self.together(self.each(features_ND).view(-1, self.together.in_features))


def at_least_float32(x: Tensor) -> Tensor:
    """What a head gives under autocast has bf16's eight bits of mantissa, which similarities at tau 0.08 do not
    survive.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Encoder(nn.Module):
    """Backbone, then projector, then the unit sphere. Images [B, 3, H, W] to float32 embeddings [B, D].

    `unit=False` stops before the sphere, at what the projector gives: predictors take that, and losses of its
    covariance.

    Several views at once, a list of [B, 3, H, W], give [V * B, D]: neighbours of one size go through the backbone
    together and all through the projector. So BatchNorm's statistics are of a size there and of all views here, as in
    SwAV's and DINO's code.

    Args:
        backbone: has `num_features`, the width of its output.
        projector: a `Projector` or another `Head`, which says by `dim` how wide its output is.
    """

    def __init__(self, *, backbone: nn.Module, projector: Head):
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor | list[Tensor], unit: bool = True) -> Tensor:
        embedding = at_least_float32(self.projector(self._features(images)))
        return nn.functional.normalize(embedding, dim=1) if unit else embedding

    def _features(self, images: Tensor | list[Tensor]) -> Tensor:
        if isinstance(images, Tensor):
            return self.backbone(images)
        by_size = itertools.groupby(images, key=lambda view: view.shape[-1])
        return torch.cat([self.backbone(torch.cat(list(views))) for _, views in by_size])
