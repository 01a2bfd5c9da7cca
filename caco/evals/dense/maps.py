"""Uses a backbone to compute a feature for every place of an image, and interpolates from places back to pixels.

Shapes: B images of H x W pixels, h x w places, D features.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from caco.errors import UserError


class Maps(nn.Module):
    """Turns images [B, 3, H, W] into feature maps [B, D, h, w].

    Place i of a ResNet is at pixel i * stride, because its convolutions reach equally far to both sides. Images are
    therefore padded with zeros, the mean colour, to a multiple of the stride plus one, which has a place at both ends;
    a crop of 513 pixels has this size already. A place of a ViT is in the middle of its patch, and its images must
    consist of whole patches.

    Args:
        backbone: a ResNet or a VisionTransformer from timm; it is not copied.
        purpose: what needs it, for the error message.
    Raises:
        UserError: it is neither of these.
    """

    backbone: Any  # timm's, without types

    def __init__(self, backbone: nn.Module, *, purpose: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.in_patches = isinstance(backbone, VisionTransformer)
        if self.in_patches:
            self.stride, self.width = int(self.backbone.patch_embed.patch_size[0]), int(self.backbone.num_features)
        else:
            self.stride, self.width = stride_and_width(require_resnet(backbone, purpose))

    def forward(self, images: Tensor) -> Tensor:
        if not self.in_patches:
            below, right = (-(side - 1) % self.stride for side in images.shape[-2:])
            return self.backbone.forward_features(F.pad(images, (0, right, 0, below)))
        tokens = self.backbone.forward_features(images)[:, self.backbone.num_prefix_tokens :]
        rows, columns = (side // self.stride for side in images.shape[-2:])
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))

    def to_pixels(self, maps: Tensor, height: int, width: int) -> Tensor:
        """Interpolate values [B, K, h, w] at the places to [B, K, H, W] at the pixels; bilinear, float32."""
        maps = maps.float()
        if self.in_patches:
            return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
        whole = [(places - 1) * self.stride + 1 for places in maps.shape[-2:]]
        return F.interpolate(maps, whole, mode="bilinear", align_corners=True)[..., :height, :width]

    def places(self, side: int) -> Tensor:
        """The pixel of each place along an image's side of `side` pixels, int64. The last place of a ResNet may be in
        the padding, at pixel `side` or beyond.
        """
        if self.in_patches:
            return torch.arange(self.stride // 2, side, self.stride)
        return torch.arange(0, side - 1 + self.stride, self.stride)


def require_resnet(backbone: nn.Module, purpose: str) -> ResNet:
    """Check that a backbone is a ResNet from timm with a stem and four stages; returns it.

    Raises:
        UserError: it is not.
    """
    if not isinstance(backbone, ResNet):
        raise UserError(
            f"{purpose} needs a ResNet of timm's, with a stem and four stages, got {type(backbone).__name__}: choose "
            "backbone=resnet50, resnet18 or small_resnet"
        )
    return backbone


@torch.no_grad()
def stride_and_width(backbone: ResNet) -> tuple[int, int]:
    """The distance in pixels between neighbouring places of the last stage, and the number of its features. Both are
    measured with an image of zeros.
    """
    weight = next(backbone.parameters())
    with as_evaluated(backbone):
        maps = backbone.forward_features(torch.zeros(1, 3, 65, 65, device=weight.device, dtype=weight.dtype))
    return 64 // max(1, maps.shape[-1] - 1), maps.shape[1]


def dilated_last_stage(backbone: ResNet) -> ResNet:
    """Double the resolution of the last stage, in place: its 3x3 convolutions get stride 1 and dilation 2, in all
    blocks. The weights stay the same.

    This is what MoCo's paper describes. timm's output_stride and mmsegmentation instead give the first block half the
    dilation.

    Raises:
        UserError: the last stage halves the resolution in another way.
    """
    before, _ = stride_and_width(backbone)
    for module in backbone.layer4.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (2, 2)
        elif isinstance(module, nn.AvgPool2d):
            module.stride = module.kernel_size = 1
    after, _ = stride_and_width(backbone)
    if 2 * after != before:
        raise UserError(
            f"segment: expected a ResNet whose last stage has a stride of 2, got one of {before} and {after} without"
        )
    return backbone


@contextlib.contextmanager
def as_evaluated(network: nn.Module) -> Iterator[None]:
    """Put a network into eval mode for this context, and restore the modes of its parts afterwards."""
    was_training = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield
    finally:
        for module, training in was_training.items():
            module.training = training
