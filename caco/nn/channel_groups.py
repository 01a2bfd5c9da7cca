"""Networks and heads for groups of an image's channels, side by side (CMC)."""

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
    """Two networks, one for an image's first channel, its lightness, and one for the two others, its colours (CMC).
    Their features, side by side, are the image's.

    Args:
        lightness, colours: networks for images of three channels, whose first convolution is replaced by one of as many
            channels.
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
    """`ChannelGroups` of two `small_resnet`s; the arguments are of each."""
    lightness, colours = (small_resnet(width=width, blocks=blocks, stem_stride=stem_stride) for _ in range(2))
    return ChannelGroups(lightness=lightness, colours=colours)


class GroupedProjector(Head):
    """Several perceptrons side by side: each takes its equal share of the features and gives its share of the embedding
    (CMC, whose groups are the features of an image's lightness and of its colours).

    Args:
        in_dim: width of all features. dim: width of what all give.
        groups: how many.
        hidden_dim, layers: of each; with biases and without BatchNorm.
    """

    @held
    def __init__(
        self, *, in_dim: Width, hidden_dim: Width = 2048, dim: Width = 256, layers: Layers = 1, groups: Several = 2
    ):
        super().__init__()
        if in_dim % groups or dim % groups:
            raise UserError(
                f"projector needs 2 groups or more, which share its {in_dim} features and its dim evenly; got"
                f" dim={dim}, groups={groups}"
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
