"""Backbones from timm: they map images [B, C, H, W] to pooled features [B, `num_features`]."""

import difflib
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import timm
import torch
from timm.layers import GroupNorm1
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from caco.errors import UserError
from caco.nn.vit import created_vit, refuse_parts_of_patches, vit_options
from caco.ranges import Count, Layers, Length, NumChannels, Pixels, ShareBelowOne, Small, Width


def timm_backbone(
    *,
    name: str,
    cifar_stem: bool = False,
    drop_path_rate: ShareBelowOne = 0.0,
    image_size: Pixels | None = None,
    zero_init_last: bool = False,
    patch_size: Pixels | None = None,
    register_tokens: Small | None = None,
    pool: Literal["cls", "mean"] | None = None,
    variant: Literal["timm", "dino"] = "timm",
    layer_norm: bool = False,
    in_channels: NumChannels = 3,
) -> nn.Module:
    """A timm model without its classifier, randomly initialised.

    Args:
        name: the model's name in timm, for example resnet50 or vit_small_patch16_224.
        cifar_stem: for ResNets: whether the stem is a 3x3 convolution of stride 1 without max-pooling, for images of 32
            pixels.
        drop_path_rate: rate of stochastic depth.
        image_size: for ViTs: side of a square image in pixels, a multiple of the patch size. Images of any other size
            that consists of whole patches then fit too. None takes the model's own size, and only images of that size
            fit.
        zero_init_last: for ResNets: whether the scale of each block's last BatchNorm starts at 0, so that the block
            starts as the identity.
        patch_size: for ViTs: side of a square patch in pixels; None takes the model's own.
        register_tokens: for ViTs: number of learned tokens that are not part of the feature (arXiv 2309.16588); None
            takes the model's own number.
        pool: for ViTs: the feature is "cls", the class token after the last norm, or "mean", the mean of the patch
            tokens after the last norm, without class token and registers. The weights have the same names with both.
            None takes the model's own way.
        variant: for ViTs: "timm", or "dino" for DINO's class token and positions, see `DINOViT`.
        layer_norm: for ResNets: whether layer normalisation, over all channels and positions of an image, replaces
            BatchNorm (CPC v2).
        in_channels: channels of the images; a configuration takes data.channels.
    Raises:
        UserError: timm has no such model, an option is for another kind of model, or timm cannot make this model with
            these options.
    """
    _must_be_known(name)
    options: dict = {"num_classes": 0} | (
        {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    )  # not every model takes a drop_path_rate
    options |= {"in_chans": in_channels} if in_channels != 3 else {}
    if image_size is not None:
        # Crops of several sizes go through one ViT, so its position embeddings are interpolated.
        options |= {"img_size": image_size, "dynamic_img_size": True}
    if name.startswith("resnet"):
        # Explicit, because timm's default is True. The published code keeps torchvision's default, False.
        options |= {"zero_init_last": zero_init_last} | ({"norm_layer": GroupNorm1} if layer_norm else {})
    elif zero_init_last or layer_norm:
        raise UserError(f"backbone.{'zero_init_last' if zero_init_last else 'layer_norm'} is for ResNets; got {name!r}")
    of_vits = vit_options(patch_size=patch_size, register_tokens=register_tokens, pool=pool)
    if of_vits or variant != "timm":
        model: nn.Module = created_vit(name, variant=variant, **options, **of_vits)
    else:
        try:
            model = timm.create_model(name, pretrained=False, **options)
        except (
            AssertionError,
            TypeError,
            ValueError,
            RuntimeError,
            NotImplementedError,
        ) as error:  # timm raises any of these
            shown = ", ".join(f"{key}={value}" for key, value in options.items())
            raise UserError(f"backbone: timm makes no {name} with {shown}: {error}") from error
    # In some models (MobileNetV3, VGG) a layer between pooling and classifier gives the feature. Their num_features is
    # the width before that layer.
    model.num_features = getattr(model, "head_hidden_size", None) or model.num_features
    if image_size is not None or of_vits:
        refuse_parts_of_patches(model)
    if cifar_stem:
        if not isinstance(model, ResNet):
            raise UserError(f"backbone.cifar_stem is for ResNets; got {name!r}")
        _use_cifar_stem(model, channels=in_channels)
    return model


def mocov3_vit(
    *,
    name: str,
    num_heads: Layers = 12,
    image_size: Pixels = 224,
    frozen_patches: bool = True,
    patch_size: Pixels | None = None,
    register_tokens: Small | None = None,
    pool: Literal["cls", "mean"] | None = None,
    in_channels: NumChannels = 3,
) -> nn.Module:
    """A ViT from timm as MoCo v3 trains it: the position embeddings are fixed sines and cosines, and the projection of
    the patches stays as it was drawn. The feature is the class token, as published, unless `pool` says otherwise.

    Source: arXiv 2104.02057.
    Args:
        name: the model's name in timm, for example vit_small_patch16_224; it must have a class token.
        num_heads: number of attention heads. MoCo v3's ViT-S has 12, timm's has 6.
        image_size: side of a square image in pixels; crops of other sizes that consist of whole patches fit too.
        frozen_patches: whether the projection of the patches takes no gradient.
        patch_size, register_tokens, pool: as in `timm_backbone`. MoCo v3 itself has no registers; here they have no
            position embeddings.
        in_channels: channels of the images; a configuration takes data.channels.
    Raises:
        UserError: timm has no such model, or it is no ViT with a class token and position embeddings.
    """
    _must_be_known(name)
    of_vits = vit_options(patch_size=patch_size, register_tokens=register_tokens, pool=pool)
    options: dict = {
        "num_classes": 0,
        "img_size": image_size,
        "dynamic_img_size": True,
        "num_heads": num_heads,
        "weight_init": "moco",
    }
    options |= {"in_chans": in_channels} if in_channels != 3 else {}
    model = created_vit(name, **options, **of_vits)
    if not model.has_class_token or model.pos_embed is None:
        raise UserError(f"backbone.name must be a ViT with a class token and position embeddings; got {name!r}")
    refuse_parts_of_patches(model)
    projection = model.patch_embed.proj
    rows, columns = model.patch_embed.grid_size
    bound = (6 / (projection.weight[0].numel() + model.num_features)) ** 0.5  # 6 / (3 p^2 + D)
    with torch.no_grad():
        model.pos_embed.zero_()  # the class token keeps zeros
        model.pos_embed[0, -rows * columns :] = sines_and_cosines(rows, columns, model.num_features)
        nn.init.uniform_(projection.weight, -bound, bound)
        nn.init.zeros_(projection.bias)
    model.pos_embed.requires_grad_(False)
    projection.requires_grad_(not frozen_patches)
    return model


def sines_and_cosines(rows: int, columns: int, width: int) -> Tensor:
    """Position embeddings of a grid, [rows * columns, width], row by row: [sin r w, cos r w, sin c w, cos c w] for row
    r and column c, with the width / 4 frequencies w = 10000^(-4 i / width).

    Raises:
        UserError: `width` is no multiple of 4.
    """
    if width % 4:
        raise UserError(f"positions of sines and cosines need a width that is a multiple of 4; got {width}")
    frequency = 10000.0 ** -(torch.arange(width // 4) * 4 / width)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (row, column)]
    return torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], 1)


def small_resnet(
    *,
    width: Width = 16,
    blocks: Annotated[Sequence[Layers], Length(least=4, most=4)] = (1, 1, 1, 1),
    stem_stride: Count = 1,
    layer_norm: bool = False,
    in_channels: NumChannels = 3,
) -> nn.Module:
    """A ResNet of basic blocks for images of 16 to 32 pixels on a CPU; its features are 8 * width wide.

    Args:
        width: channels of the first stage, an even number of at least 8. Each of the three later stages halves the
            resolution and doubles the channels.
        blocks: number of basic blocks in each of the four stages.
        stem_stride: stride of the stem, 1 or 2. 2 halves the resolution before the first stage, for a quarter of the
            arithmetic.
        layer_norm, in_channels: as in `timm_backbone`.
    Raises:
        UserError: a width, blocks or stem_stride other than these.
    """
    # A width below 8 is refused because, on processors with AVX2 and nothing better, torch (for example 2.14.1) then
    # writes beyond the gradient of the 1x1 convolutions that halve the resolution, and the process dies.
    if width < 8 or width % 2 or len(blocks) != 4 or min(blocks) < 1:
        raise UserError(
            "small_resnet needs an even width of at least 8 and a block or more in each of 4 stages; got"
            f" width={width}, blocks={list(blocks)}"
        )
    if stem_stride not in (1, 2):
        raise UserError(f"small_resnet's stem_stride must be 1 or 2; got {stem_stride}")
    channels = tuple(width * 2**stage for stage in range(4))
    # timm fixes the plain stem at 64 channels. Only its deep stem can be narrower; the CIFAR stem then replaces it.
    options = {"stem_type": "deep", "stem_width": width // 2} | ({"norm_layer": GroupNorm1} if layer_norm else {})
    model = ResNet(BasicBlock, tuple(blocks), channels=channels, num_classes=0, zero_init_last=False, **options)
    _use_cifar_stem(model, stem_stride, channels=in_channels)
    return model


def _must_be_known(name: str) -> None:
    if not timm.is_model(name):
        raise UserError(
            f"backbone.name must be a model of timm; got {name!r}; similar names: {', '.join(_near(name, 5)) or 'none'}"
        )


def _near(name: str, count: int) -> list[str]:
    begins = timm.list_models(f"*{name[:6]}*") if name else []
    near = difflib.get_close_matches(name, timm.list_models(), n=count, cutoff=0.5)
    return list(dict.fromkeys([*near, *begins]))[:count]


def refuse_unfit(sizes: Sequence[int], **settings: Any) -> None:
    """Check, before any weight is drawn, that a `timm_backbone` of these settings gives features [B, num_features] for
    square images of each of these sizes in pixels. The check runs on tensors without contents, once in a process.

    Raises:
        UserError: it does not. The message says what helps, or names similar models that fit.
    """
    for size in dict.fromkeys(sizes):
        problem = why_unfit(size, **settings)
        if problem is None:
            continue
        name = settings["name"]
        message = (
            f"backbone.name={name} gives no features [images, width] for images of {size} x {size} pixels: {problem}."
        )
        if settings.get("image_size") != max(sizes) and all(
            why_unfit(s, **settings | {"image_size": max(sizes)}) is None for s in sizes
        ):
            raise UserError(f"{message} With backbone.image_size={max(sizes)} it does")
        own = own_size(name)
        if own != size and why_unfit(own, **settings) is None:
            raise UserError(
                f"{message} It is made for {own} x {own}: augmentation.size={own}, or another of timm's models"
            )
        near: list[str] = []
        for other in _near(name, 12):
            if other != name and why_unfit(size, name=other) is None:
                near.append(other)
            if len(near) == 3:
                break
        raise UserError(
            f"{message} Similar models that fit: {', '.join(near)}"
            if near
            else f"{message} See docs/backbones.md for models that do"
        )


def own_size(name: str) -> int:
    """The side, in pixels, of the images that a timm model was made for."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return config.input_size[-1] if config else 224


def why_unfit(size: int, **settings: Any) -> str | None:
    """The reason why a `timm_backbone` of these settings does not fit square images of this size in pixels; None if it
    fits.
    """
    return _why_unfit(size, tuple(sorted(settings.items())))


@functools.lru_cache(maxsize=256)
def _why_unfit(size: int, settings: tuple[tuple[str, Any], ...]) -> str | None:
    try:
        with torch.device("meta"), torch.inference_mode():
            model = timm_backbone(**dict(settings))
            out = model(torch.empty(2, dict(settings).get("in_channels", 3), size, size))
    except UserError as error:
        return str(error)
    except Exception as error:  # the model's own code may raise anything
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'none given'}".rstrip(".")
    shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if shape != [2, model.num_features]:
        return f"it gives {shape} for two images"
    return None


def _use_cifar_stem(model: ResNet, stride: int = 1, *, channels: int = 3) -> None:
    model.conv1 = nn.Conv2d(channels, model.feature_info[0]["num_chs"], 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def feature_width(backbone: nn.Module) -> int:
    """Width of a backbone's features, its `num_features`.

    Raises:
        UserError: the backbone has no integer `num_features`.
    """
    width = getattr(backbone, "num_features", None)
    if not isinstance(width, int):
        raise UserError(f"a backbone must have an integer num_features; {type(backbone).__name__} has {width!r}")
    return width


def preact_resnet(*, name: str = "resnetv2_50", in_channels: NumChannels = 3) -> nn.Module:
    """A pre-activation ResNet from timm as SeLa trains it: without BatchNorm after the stem, and without BatchNorm and
    ReLU between the last block and the pooling.

    Source: arXiv 1911.05371.
    Args:
        name: the model's name in timm, resnetv2_50 or another one with BatchNorm.
        in_channels: channels of the images; a configuration takes data.channels.
    Raises:
        UserError: timm has no such model, or it is no pre-activation ResNet.
    """
    _must_be_known(name)
    if not name.startswith("resnetv2_"):
        raise UserError(f"backbone.name must be a pre-activation ResNet of timm's; got {name!r}")
    model = timm.create_model(name, pretrained=False, num_classes=0, zero_init_last=False, in_chans=in_channels)
    model.norm = nn.Identity()
    return model
