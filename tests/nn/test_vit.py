"""ViTs with other patch sizes, registers and pooling, and DINO's class token and positions."""

import copy
import math

import numpy as np
import pytest
import torch
from tiny import batch_of, now
from torch.nn import functional as F

from caco.config.composition import compose, instantiate
from caco.methods.dino import DINO
from caco.nn.backbones import mocov3_vit, timm_backbone
from caco.nn.heads import Encoder, Projector
from caco.nn.vit import DINOViT, interpolated

TINY = "vit_tiny_patch16_224"
MAKERS = {
    "timm": lambda **how: timm_backbone(name=TINY, image_size=56, **how),
    "dino": lambda **how: timm_backbone(name=TINY, image_size=56, variant="dino", **how),
    "mocov3": lambda **how: mocov3_vit(name=TINY, num_heads=3, image_size=56, **how),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("register_tokens", [0, 4])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_patches_of_14_registers_and_pooling(maker, register_tokens, pool):
    torch.manual_seed(0)
    vit = MAKERS[maker](patch_size=14, register_tokens=register_tokens, pool=pool).eval()
    assert vit.patch_embed.proj.weight.shape == (192, 3, 14, 14) and vit.num_prefix_tokens == 1 + register_tokens
    for height, width in ((56, 56), (28, 70)):
        images = torch.randn(2, 3, height, width)
        tokens = vit.forward_features(images)
        assert tokens.shape == (2, 1 + register_tokens + height * width // 14**2, 192)
        feature = tokens[:, 0] if pool == "cls" else tokens[:, 1 + register_tokens :].mean(1)
        assert torch.allclose(vit(images), feature, atol=1e-6), "the feature is taken after the last norm"
        assert torch.allclose(tokens.mean(-1), torch.zeros(()), atol=1e-5), "the last norm must have been applied"
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == ({"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"} if maker == "mocov3" else set())
    vit.train()(images).sum().backward()
    assert all(p.grad is not None for name, p in vit.named_parameters() if name not in frozen)


def test_one_file_of_weights_serves_both_ways_to_pool():
    names = [set(timm_backbone(name=TINY, image_size=32, pool=pool).state_dict()) for pool in ("cls", "mean", None)]
    assert names[0] == names[1] == names[2]


def test_what_is_not_said_is_as_timm_has_it():
    vit = timm_backbone(name="vit_small_patch14_reg4_dinov2", image_size=28)
    assert vit.num_reg_tokens == 4 and vit.patch_embed.patch_size == (14, 14) and vit.global_pool == "token"
    torch.manual_seed(0)
    timm_s = timm_backbone(name=TINY, image_size=32)
    torch.manual_seed(0)
    said = timm_backbone(name=TINY, image_size=32, patch_size=16, register_tokens=0, pool="cls", variant="timm")
    assert all(torch.equal(a, b) for a, b in zip(timm_s.state_dict().values(), said.state_dict().values(), strict=True))


def test_mocov3_s_positions_are_of_the_patches_alone():
    vit = mocov3_vit(name=TINY, num_heads=3, image_size=56, patch_size=14, register_tokens=2)
    assert (
        (vit.pos_embed[0, :3] == 0).all()
        and (vit.pos_embed[0, 3:].abs().amax(1) > 0.5).all()
        and vit.pos_embed.shape[1] == 3 + 16
    )
    bound = math.sqrt(6 / (3 * 14**2 + 192))
    assert bound * 0.99 < vit.patch_embed.proj.weight.abs().max() <= bound


# DINO's ViT.


@pytest.fixture(scope="module")
def dino_vit():
    torch.manual_seed(0)
    return timm_backbone(name=TINY, image_size=64, variant="dino").double().eval()


def test_every_tensor_starts_as_published(dino_vit):
    """Class token, positions and linear layers start from a truncated normal law with standard deviation 0.02, biases
    at 0, and the patch projection with torch's default.
    """
    assert dino_vit.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert dino_vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    linear = [p for name, p in dino_vit.named_parameters() if name.startswith("blocks") and p.ndim == 2]
    assert len(linear) == 12 * 4 and all(p.std().item() == pytest.approx(0.02, rel=0.02) for p in linear)
    one = {name: p for name, p in dino_vit.named_parameters() if p.ndim == 1 and "patch_embed" not in name}
    assert all((p == float("norm" in name and name.endswith("weight"))).all() for name, p in one.items())
    bound = 1 / math.sqrt(3 * 16**2)
    for p in dino_vit.patch_embed.proj.parameters():
        assert bound * 0.95 < p.abs().max() <= bound
    assert {block.norm1.eps for block in dino_vit.blocks} == {1e-6}


def cubic(t):
    """Keys' cubic kernel with a = -0.75, as in torch."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def line(old, new):
    """The matrix [new, old] that interpolates a line: position i of the new line is position (i + 1/2) old / (new +
    0.1) - 1/2 of the old line.
    """
    weights = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / (new + 0.1) - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            weights[i, min(max(j, 0), old - 1)] += cubic(at - j)
    return weights


@pytest.mark.parametrize("wanted", [(6, 6), (14, 3), (20, 14)])
def test_positions_are_interpolated_as_published(wanted):
    place = torch.randn(1, 14 * 14, 8, dtype=torch.float64)
    grid = place.reshape(14, 14, 8).numpy()
    expected = np.einsum("ir,jc,rcd->ijd", line(14, wanted[0]), line(14, wanted[1]), grid).reshape(1, -1, 8)
    assert np.abs(interpolated(place, (14, 14), wanted).numpy() - expected).max() < 1e-12
    assert interpolated(place, (14, 14), (14, 14)) is place


@pytest.mark.parametrize("register_tokens", [0, 2])
def test_a_crop_s_tokens_have_those_positions_and_the_others_their_own(register_tokens):
    torch.manual_seed(0)
    vit = timm_backbone(name=TINY, image_size=64, variant="dino", register_tokens=register_tokens).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    seen = []
    vit.pos_drop.register_forward_hook(lambda module, given, out: seen.append(out))
    vit(images)
    first = 1 + register_tokens
    special = (
        torch.cat([token for token in (vit.cls_token, vit.reg_token) if token is not None], 1)
        + vit.pos_embed[:, :first]
    )
    patches = (
        F.conv2d(images, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=16).flatten(2).transpose(1, 2)
    )
    expected = torch.cat(
        [special.expand(2, -1, -1), patches + interpolated(vit.pos_embed[:, first:], (4, 4), (2, 3))], 1
    )
    assert torch.allclose(seen[0], expected, atol=1e-12)


def test_only_other_sizes_differ_from_timm_s(dino_vit):
    timm_s = timm_backbone(name=TINY, image_size=64).double().eval()
    timm_s.load_state_dict(dino_vit.state_dict())
    same, other = torch.randn(1, 3, 64, 64, dtype=torch.float64), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(dino_vit(same), timm_s(same), atol=1e-12) and not torch.allclose(
        dino_vit(other), timm_s(other), atol=1e-6
    )


@pytest.mark.parametrize("settings", [{"patch_size": 14, "register_tokens": 4, "pool": "mean"}, {"patch_size": 14}])
def test_dino_s_multi_crop_goes_through_it(settings):
    torch.manual_seed(0)
    backbone = timm_backbone(name=TINY, image_size=56, variant="dino", drop_path_rate=0.1, **settings)
    projector = Projector(in_dim=192, hidden_dim=16, dim=8, batch_norm=False, bias=True, activation="gelu")
    method = DINO(encoder=Encoder(backbone=backbone, projector=projector), num_prototypes=7).train()
    assert isinstance(method.twin.encoder.backbone, DINOViT)
    views = [torch.randn(3, 3, side, side) for side in (56, 56, 28, 28)]
    loss = method(batch_of(views), now()).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in method.encoder.parameters())
    with pytest.raises(
        ValueError,
        match="patches of 14 pixels takes images that consist of whole patches; got 96 x 96 pixels, .* 84 and 98$",
    ):
        copy.deepcopy(method)(batch_of([*views[:2], torch.zeros(3, 3, 96, 96)]), now())


def test_the_options_of_conf_are_these():
    dino, mocov3, vit = (
        compose([f"backbone={name}"]).backbone for name in ("dino_vit_small", "mocov3_vit_small", "vit_small")
    )
    assert dino.variant == "dino" and vit.variant == "timm"
    for node in (dino, mocov3, vit):
        small = {**node, "name": TINY, "image_size": 28, "patch_size": 14, "pool": "mean"}
        small |= {"num_heads": 3} if "num_heads" in node else {}
        assert instantiate(small)(torch.zeros(1, 3, 28, 28)).shape == (1, 192)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": TINY, "pool": "max"}, "^backbone.pool: expected cls, mean or null, got 'max'"),
        ({"name": TINY, "patch_size": 0}, "^backbone needs a patch_size of at least 1 .* got 0 and None"),
        ({"name": TINY, "register_tokens": -1}, "register_tokens of 0 or more, or null; got None and -1"),
        ({"name": TINY, "variant": "dinov2"}, "^backbone.variant: expected timm or dino, got 'dinov2'"),
        ({"name": TINY, "variant": "dino"}, "^backbone.variant=dino needs position embeddings and an image_size"),
        (
            {"name": TINY, "image_size": 40},
            "patches of 16 pixels takes .* whole patches; got 40 x 40 pixels, .* 32 and 48$",
        ),
        ({"name": TINY, "patch_size": 15}, "patches of 15 pixels takes .* got 224 x 224 pixels, .* 210 and 225$"),
        (
            {"name": "resnet18", "pool": "mean"},
            "^backbone.name must be a ViT of timm's for MoCo v3's .* patch_size, .* got 'resnet18'",
        ),
        (
            {"name": "vit_wee_patch16_reg1_gap_256", "pool": "cls"},
            "timm makes no vit_wee.* Token pooling needs the class token",
        ),
        (
            {"name": "vit_small_patch16_rope_224", "register_tokens": 1},
            "timm makes no vit_small_patch16_rope_224 with .*reg_tokens",
        ),
    ],
)
def test_what_a_vit_is_not_made_with_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        timm_backbone(**settings)
