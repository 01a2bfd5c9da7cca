"""Networks and heads that treat groups of an image's channels separately, side by side (CMC)."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from caco.errors import UserError
from caco.nn.backbones import feature_width, small_resnet
from caco.nn.first_layer import with_channels
from caco.nn.heads import Head, Projector
from caco.ranges import Count, Layers, Length, Several, Width, held


class ChannelGroups(nn.Module):
    """Two networks (CMC): one for an image's first channel, its lightness, and one for the two other channels, its
    colours. Images [B, 3, H, W] give the features of both side by side, [B, num_features].

    Args:
        lightness, colours: networks for images of three channels. Their first convolution is replaced by one that takes
            1 and 2 channels.
    """

    def __init__(self, *, lightness: nn.Module, colours: nn.Module):
        super().__init__()
        self.lightness, self.colours = with_channels(lightness, 1), with_channels(colours, 2)
        self.num_features = feature_width(lightness) + feature_width(colours)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.lightness(images[:, :1]), self.colours(images[:, 1:])], 1)


def small_channel_groups(
    *,
    width: Width = 16,
    blocks: Annotated[Sequence[Layers], Length(least=4, most=4)] = (1, 1, 1, 1),
    stem_stride: Count = 1,
) -> nn.Module:
    """`ChannelGroups` of two `small_resnet`s with the same arguments, which are those of `small_resnet`."""
    lightness, colours = (small_resnet(width=width, blocks=blocks, stem_stride=stem_stride) for _ in range(2))
    return ChannelGroups(lightness=lightness, colours=colours)


class GroupedProjector(Head):
    """Several perceptrons side by side, with biases and without BatchNorm. Each takes an equal share of the features
    and gives an equal share of the embedding. In CMC the shares belong to an image's lightness and to its colours.

    Args:
        in_dim: width of all features together.
        hidden_dim: width between the layers of each perceptron.
        dim: width of all outputs together.
        layers: number of linear layers of each perceptron.
        groups: number of perceptrons.
    Raises:
        UserError: `groups` does not divide `in_dim` and `dim`.
    """

    @held
    def __init__(
        self, *, in_dim: Width, hidden_dim: Width = 2048, dim: Width = 256, layers: Layers = 1, groups: Several = 2
    ):
        super().__init__()
        if in_dim % groups or dim % groups:
            raise UserError(
                f"projector.groups: expected a number of 2 or more that divides both the {in_dim} features and"
                f" projector.dim; got dim={dim}, groups={groups}"
            )
        self.each = nn.ModuleList(
            Projector(
                in_dim=in_dim // groups,
                hidden_dim=hidden_dim,
                dim=dim // groups,
                layers=layers,
                batch_norm=False,
                bias=True,
            )
            for _ in range(groups)
        )
        self.dim, self.groups = dim, groups

    def forward(self, features_BF: Tensor) -> Tensor:
        parts = features_BF.chunk(self.groups, 1)
        return torch.cat([head(part) for head, part in zip(self.each, parts, strict=True)], 1)
