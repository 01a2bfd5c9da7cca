"""Backbones from timm: images in, pooled features out. Each has `num_features`, the width of what it gives."""

from collections.abc import Sequence

import timm
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from caco.errors import UserError


def timm_backbone(*, name: str, cifar_stem: bool = False, drop_path_rate: float = 0.0, image_size: int | None = None) -> nn.Module:
    """A timm model without its classifier, randomly initialised.

    Args:
        name: timm's, for example resnet50 or vit_small_patch16_224.
        cifar_stem: for ResNets: a 3x3 convolution of stride 1 and no max-pooling, for 32-pixel images.
        drop_path_rate: stochastic depth.
        image_size: for ViTs, the pixels of a square image; None is the model's own.
    Raises:
        ValueError: timm knows no such model, or a CIFAR stem is asked of something that is no ResNet.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name[:6]}*")[:5]
        raise UserError(f"backbone.name must be a model of timm; got {name!r}; near: {', '.join(near) or 'none'}")
    options: dict = {"num_classes": 0, "drop_path_rate": drop_path_rate}
    if image_size is not None:
        # Crops of several sizes go through one ViT, so its position embeddings are interpolated.
        options |= {"img_size": image_size, "dynamic_img_size": True}
    if name.startswith("resnet"):
        # torchvision's default, which the published code keeps; timm's own starts residual branches at zero.
        options["zero_init_last"] = False
    model = timm.create_model(name, pretrained=False, **options)
    if cifar_stem:
        if not isinstance(model, ResNet):
            raise UserError(f"backbone.cifar_stem is for ResNets; got {name!r}")
        _use_cifar_stem(model)
    return model


def small_resnet(*, width: int = 16, blocks: Sequence[int] = (1, 1, 1, 1), stem_stride: int = 1) -> nn.Module:
    """A ResNet of basic blocks for images of 16 to 32 pixels on a CPU; its features are 8 * width wide.

    Args:
        width: channels of the first stage, even; each of the three later ones halves the resolution and doubles them.
        blocks: basic blocks in each of the four stages.
        stem_stride: 2 halves the resolution before the first stage already, for a quarter of the arithmetic.
    """
    # Not below 8: on processors with AVX2 alone torch (2.14.1 for one) then writes beyond the gradient of the 1x1
    # convolutions that halve the resolution, and the process dies.
    if width < 8 or width % 2 or len(blocks) != 4 or min(blocks) < 1:
        raise UserError(
            f"small_resnet needs an even width of at least 8 and a block or more in each of 4 stages; got width={width}, "
            f"blocks={list(blocks)}"
        )
    if stem_stride not in (1, 2):
        raise UserError(f"small_resnet's stem_stride must be 1 or 2; got {stem_stride}")
    channels = tuple(width * 2**stage for stage in range(4))
    # timm fixes the plain stem at 64 channels; only the deep one, which the CIFAR stem replaces, can be narrower.
    stem = {"stem_type": "deep", "stem_width": width // 2}
    model = ResNet(BasicBlock, tuple(blocks), channels=channels, num_classes=0, zero_init_last=False, **stem)
    _use_cifar_stem(model, stem_stride)
    return model


def _use_cifar_stem(model: ResNet, stride: int = 1) -> None:
    model.conv1 = nn.Conv2d(3, model.bn1.num_features, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def feature_width(backbone: nn.Module) -> int:
    """Width of a backbone's output, from its `num_features`."""
    width = getattr(backbone, "num_features", None)
    if not isinstance(width, int):
        raise UserError(f"a backbone must have an integer num_features; {type(backbone).__name__} has {width!r}")
    return width
