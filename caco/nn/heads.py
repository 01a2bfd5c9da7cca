"""The heads that map a backbone's features to the embedding that the loss is computed from.

Shapes: B images, V views of each, F features, D width of the embedding, P patches of an image.
"""

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
] = {  # from a layer's number of inputs: standard deviation of a normal distribution, and where it is cut off
    "torch": None,
    "normal_0.01": lambda inputs: (0.01, math.inf),
    "truncated_normal_0.02": lambda inputs: (0.02, 2.0),
    "truncated_normal_fan_in": lambda inputs: (inputs**-0.5, 2 * inputs**-0.5),
}


class Head(nn.Module):
    """A module that maps features [B, F] to embeddings [B, `dim`]."""

    dim: int


class Projector(nn.Sequential, Head):
    """A multilayer perceptron: linear layers with an activation, and usually BatchNorm, between them. The methods'
    predictors are of this class too.

    CaCo's projector is 2048-2048-2048-256 with BatchNorm and without biases; that of AdCo and MoCo v2 is 2048-2048-128
    with biases and without BatchNorm.

    Args:
        in_dim: width of the input, the backbone's features.
        hidden_dim: width between the layers.
        dim: width D of the embedding.
        layers: number of linear layers.
        batch_norm: whether a BatchNorm follows every layer but the last.
        last_batch_norm: whether a BatchNorm follows the last layer too (SimCLR, NNCLR).
        last_affine: whether the last BatchNorm has a scale and a shift (not in SimSiam and MoCo v3).
        bias: whether the linear layers have biases.
        last_bias: whether the last linear layer has a bias; None takes `bias`.
        activation: between the layers.
        initialisation: of the linear layers: "torch" is torch's own. The others draw weights from a normal distribution
            and set biases to 0: "normal_0.01" with standard deviation 0.01 (SimCLR); "truncated_normal_0.02" with 0.02,
            cut off at 2 (DINO); "truncated_normal_fan_in" with 1/sqrt(inputs), cut off at twice that (BYOL).
    Raises:
        UserError: last_affine=false without a last BatchNorm.
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
                "projector.last_affine=false is for the last BatchNorm, which last_batch_norm=false leaves out;"
                " expected projector.last_batch_norm=true, or projector.last_affine=true"
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
    """Maps the features of an image's patches to one embedding of the image. One perceptron takes each patch; then one
    linear layer takes the concatenated outputs for an image's patches. The embedding is not normalised.

    Source: the published code of InfoMin (PyContrast, networks/util.py: JigsawHead, whose perceptron has two layers)
    and of PIRL (vissl, one layer). InfoMin's code shuffles an image's patches in this head; here the views are shuffled
    before they come.

    Args:
        in_dim: width of the features.
        hidden_dim: width between the perceptron's layers.
        dim: width of the perceptron's output for a patch, and of the embedding.
        layers: number of the perceptron's linear layers, which have biases and no BatchNorm.
        num_patches: number of patches of an image.
    Raises:
        UserError: fewer than 2 patches.
    """

    def __init__(self, *, in_dim: int, hidden_dim: int = 2048, dim: int = 128, layers: int = 2, num_patches: int = 9):
        super().__init__()
        if num_patches < 2:
            raise UserError(f"a jigsaw head needs 2 patches or more; got {num_patches}")
        self.each = Projector(in_dim=in_dim, hidden_dim=hidden_dim, dim=dim, layers=layers, batch_norm=False, bias=True)
        self.together = nn.Linear(num_patches * dim, dim)

    def forward(self, features_ND: Tensor) -> Tensor:
        """Maps features [B * P, F], in which an image's patches follow one another, to embeddings [B, D]."""
        return self.together(self.each(features_ND).view(-1, self.together.in_features))


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if its precision is higher. Under autocast a head's output is bf16, whose eight bits
    of mantissa are too coarse for cosines that are divided by a temperature of 0.08.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Encoder(nn.Module):
    """Backbone, projector, and scaling to norm 1: maps images [B, 3, H, W] to float32 embeddings [B, D].

    `unit=False` leaves the scaling out and gives the projector's output, which predictors take, and losses that are
    computed from covariances.

    A list of several views, each [B, 3, H, W], gives [V * B, D], one view after the other. Neighbouring views of one
    size go through the backbone together, and all views go through the projector together. So BatchNorm's statistics
    are those of one size in the backbone and those of all views in the projector, as in SwAV's and DINO's code.

    Args:
        backbone: a network with `num_features`, the width of its output.
        projector: a `Projector` or another `Head`; its `dim` is the width of its output.
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
