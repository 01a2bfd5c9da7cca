"""ViTs from timm with other patch sizes, registers and pooling; and DINO's ViT, whose class token and position
embeddings differ from timm's.
"""

from functools import partial
from typing import Any, Literal

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from caco.errors import UserError

POOLS: dict[str, dict[str, Any]] = {
    "cls": {"global_pool": "token"},
    "mean": {"global_pool": "avg", "fc_norm": False},
}  # timm's arguments for each pooling


class DINOViT(VisionTransformer):
    """timm's ViT with the class token's initialisation and the position embeddings of DINO (arXiv 2104.14294).

    The class token is drawn from a truncated normal distribution with standard deviation 0.02; timm's is 1e-6. DINO has
    no registers; here they are drawn as timm draws them. For n x m patches, the position embeddings learned for N x N
    patches are interpolated bicubically, without timm's smoothing (antialias), and with the scale factors of
    (n + 0.1) x (m + 0.1) patches.

    Source: the authors' code, vision_transformer.py: trunc_normal_(self.cls_token, std=.02), interpolate_pos_encoding.
    """

    def start_as_published(self) -> None:
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """From the patch tokens [B, n, m, D], all tokens with their position embeddings added, [B, T, D], in the order
        class token, registers, patches.
        """
        num_images, rows, columns, width = x.shape
        num_placed = (
            self.pos_embed.shape[1] - self.patch_embed.num_patches
        )  # position embeddings of the class token and the registers, if they have any
        first, patches = self.pos_embed[:, :num_placed], self.pos_embed[:, num_placed:]
        place = interpolated(patches, self.patch_embed.grid_size, (rows, columns))
        tokens = [token.expand(num_images, -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        before = torch.cat([*tokens, x.new_empty(num_images, 0, width)], 1)
        return self.pos_drop(torch.cat([before + first if num_placed else before, x.flatten(1, 2) + place], 1))


def interpolated(place: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Position embeddings [1, N * M, D] of one grid, interpolated to those of another grid, [1, n * m, D]; see
    `DINOViT`.
    """
    if grid == wanted:
        return place
    factors = [(new + 0.1) / old for new, old in zip(wanted, grid, strict=True)]
    square = place.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.interpolate(square, scale_factor=factors, mode="bicubic").flatten(2).transpose(1, 2)


def vit_options(
    *, patch_size: int | None, register_tokens: int | None, pool: Literal["cls", "mean"] | None
) -> dict[str, Any]:
    """timm's arguments for those of these options that are not None.

    Raises:
        UserError: an unknown pool, a patch_size below 1 or negative register_tokens.
    """
    if pool is not None and pool not in POOLS:
        raise UserError(f"backbone.pool: expected cls, mean or null, got {pool!r}")
    if patch_size is not None and patch_size < 1 or (register_tokens or 0) < 0:
        raise UserError(
            "backbone needs a patch_size of at least 1 and register_tokens of 0 or more, or null; got "
            f"{patch_size} and {register_tokens}"
        )
    options: dict[str, Any] = {"patch_size": patch_size, "reg_tokens": register_tokens}
    return {key: value for key, value in options.items() if value is not None} | (POOLS[pool] if pool else {})


def created_vit(name: str, *, variant: Literal["timm", "dino"] = "timm", **options: Any) -> VisionTransformer:
    """A ViT from timm, randomly initialised.

    Args:
        name: the model's name in timm.
        variant: "timm", or "dino" for a `DINOViT`.
        options: timm's arguments.
    Raises:
        UserError: the model is no plain ViT, or timm cannot make it with these options.
    """
    if variant not in ("timm", "dino"):
        raise UserError(f"backbone.variant: expected timm or dino, got {variant!r}")
    if not name.startswith("vit_"):
        raise UserError(
            "backbone.name must be a ViT of timm's for MoCo v3's backbone and for the settings patch_size,"
            f" register_tokens, pool and variant; got {name!r}"
        )
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except (AssertionError, TypeError) as error:  # timm raises either
        shown = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UserError(f"backbone: timm makes no {name} with {shown}: {error}") from error
    if type(model) is not VisionTransformer:
        raise UserError(f"backbone.name must be a plain ViT of timm's; got {name!r}, a {type(model).__name__}")
    if variant == "dino":
        if model.pos_embed is None or not model.dynamic_img_size:
            raise UserError(f"backbone.variant=dino needs position embeddings and an image_size; got {name!r}")
        model.__class__ = DINOViT  # it has no further state; timm's function makes objects of its own class only
        model.start_as_published()
    return model


def refuse_parts_of_patches(model: nn.Module) -> None:
    """Make a ViT refuse images that do not consist of whole patches. The size that it is made for is checked now, other
    sizes when such images come.

    Raises:
        UserError: images of the size that it is made for do not consist of whole patches.
    """
    embed = getattr(model, "patch_embed", None)
    sides, size = getattr(embed, "patch_size", None), getattr(embed, "img_size", None)
    if isinstance(embed, nn.Module) and sides is not None and size is not None:
        _refuse_parts(tuple(sides), embed, (torch.empty(0, 3, *size, device="meta"),))
        embed.register_forward_pre_hook(partial(_refuse_parts, tuple(sides)))


def _refuse_parts(sides: tuple[int, int], embed: nn.Module, images: tuple[Tensor]) -> None:
    shape = images[0].shape[-2:]
    if any(pixels % side for pixels, side in zip(shape, sides, strict=True)):
        near = sorted(
            {max(1, pixels // side + more) * side for pixels, side in zip(shape, sides, strict=True) for more in (0, 1)}
        )
        raise UserError(
            f"a ViT with patches of {sides[0]} pixels takes images that consist of whole patches; got {shape[0]} x"
            f" {shape[1]} pixels, the nearest fitting sides are {' and '.join(map(str, near))}"
        )
