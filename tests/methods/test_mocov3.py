"""MoCo v3 computes what its authors' code computes: the loss, the heads, a twin that moves before the keys, fifty
steps, and the initialisation of the ViT.

There is no comparison with lightly, which has no loss for this method.
"""

import math

import fifty
import pytest
import torch
from fifty import B, backbone, normed
from tiny import batch_of, now

from caco.config.composition import compose, job_config
from caco.engine import optimizers
from caco.engine.assembly import build_method
from caco.methods.mocov3 import MoCoV3
from caco.nn.backbones import mocov3_vit, sines_and_cosines

TAU = 0.3


def mocov3(vit=False, **settings):
    projector = {"layers": 3 if vit else 2, "last_batch_norm": True, "last_affine": False}
    return MoCoV3(
        encoder=fifty.encoder(**projector), temperature=TAU, predictor_hidden_dim=16, predictor_last_batch_norm=vit,
        **settings
    ).double()  # fmt: skip


def head(w, name, x, layers, *, ends_in_norm):
    for layer in range(layers - 1):
        x = x @ w[f"{name}.{3 * layer}.weight"].T
        x = normed(x, w[f"{name}.{3 * layer + 1}.weight"], w[f"{name}.{3 * layer + 1}.bias"]).clamp_min(0)
    x = x @ w[f"{name}.{3 * layers - 3}.weight"].T
    return normed(x) if ends_in_norm else x


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def by_hand(w, twin, views, vit=False):
    layers = 3 if vit else 2
    z = [head(w, "encoder.projector", backbone(w, view), layers, ends_in_norm=True) for view in views]
    q = [unit(head(w, "predictor", x, 2, ends_in_norm=vit)) for x in z]
    with torch.no_grad():
        k = [unit(head(twin, "encoder.projector", backbone(twin, view), layers, ends_in_norm=True)) for view in views]

    def direction(a, b):
        p = torch.softmax(q[a] @ k[b].T / TAU, 1)
        return 2 * TAU * -p.diagonal().log().mean()

    return direction(0, 1) + direction(1, 0)


@pytest.mark.parametrize("vit", [False, True])
def test_loss_and_gradient(vit):
    method, views = mocov3(vit), fifty.views_of(0)
    with torch.no_grad():
        method.twin.encoder.projector[0].weight.add_(
            0.1
        )  # make the twin differ from the encoder, so that the test can tell them apart
    w, twin = fifty.weights_of(method), fifty.twin_of(method.twin)
    outputs = method(batch_of(views), now())
    outputs.loss.backward()
    expected = by_hand(w, twin, views, vit)
    assert torch.allclose(outputs.loss, expected, atol=1e-12)
    gradients = fifty.gradients_of(expected, w)
    for name, p in method.named_parameters():
        assert (p.grad is None) == name.startswith("twin."), name
        assert p.grad is None or torch.allclose(p.grad, gradients[name], atol=1e-12), name


def test_fifty_steps():
    """The twin moves with this step's momentum before the keys are computed, so before the optimiser's step."""
    method = mocov3(momentum=0.9)
    w, twin, velocity, losses = fifty.weights_of(method), fifty.twin_of(method.twin), {}, []
    optimizer = optimizers.lars(method.parameter_groups(), batch=B, reference_batch=None, lr=0.3, weight_decay=1e-2)
    ours = fifty.train(method, optimizer, **fifty.FROM_ZERO, final_fraction=0.0)
    for t in range(fifty.STEPS):
        fifty.follow(twin, w, 1 - (1 - 0.9) * (1 + math.cos(math.pi * t / fifty.STEPS)) / 2)
        loss = by_hand(w, twin, fifty.views_of(t))
        fifty.lars(w, fifty.gradients_of(loss, w), velocity, fifty.from_zero(t, 0.3, 0.0), 1e-2)
        losses.append(loss)
    fifty.assert_same_training(ours, method, losses, w, twin)


def test_its_batch_stays_whole_and_small_views_query_the_large_ones():
    method = mocov3()
    assert method.needs.whole_batch, "the batch's other images are its negatives"
    assert [(term.query, term.key) for term in method.terms([16, 16, 8])] == [(1, 0), (0, 1), (2, 0), (2, 1)]
    costs = method.costs([16, 16, 8])
    assert (costs.encoded, costs.followed, costs.gathers, costs.columns_per_image) == ([0, 1, 2], [0, 1], 2, 1)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"momentum": 2.0}, r"momentum: expected float from 0 up to 1, got 2\.0")]
)
def test_impossible_numbers_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        mocov3(**wrong)
    with pytest.raises(ValueError, match="temperature: expected float above 0, got 0"):
        MoCoV3(encoder=fifty.encoder(), temperature=0.0)


# The ViT.


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return mocov3_vit(name="vit_small_patch16_224", image_size=32)


def test_the_patch_projection_is_uniform_without_bias_and_stays(vit):
    bound = math.sqrt(6 / (3 * 16**2 + 384))
    weight = vit.patch_embed.proj.weight
    assert bound * 0.999 < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert (vit.patch_embed.proj.bias == 0).all()
    assert not any(p.requires_grad for p in vit.patch_embed.parameters()) and not vit.pos_embed.requires_grad
    assert all(
        p.requires_grad for name, p in vit.named_parameters() if not name.startswith(("patch_embed.", "pos_embed"))
    )


def test_positions_are_sines_and_cosines_of_row_and_column_and_none_for_the_class_token(vit):
    place = vit.pos_embed[0]
    assert (place[0] == 0).all()
    row, column = 1, 0  # token 2 in a grid of 2 x 2
    frequency = [10000 ** (-i / 96) for i in range(96)]
    by_hand = [f(at * w) for at in (row, column) for f in (math.sin, math.cos) for w in frequency]
    assert torch.allclose(place[1 + 2], torch.tensor(by_hand), atol=1e-6)
    assert sines_and_cosines(2, 3, 8).shape == (6, 8)
    with pytest.raises(ValueError, match="multiple of 4; got 6"):
        sines_and_cosines(2, 2, 6)


def test_its_linear_layers_are_xavier_s_and_queries_keys_and_values_three_of_them(vit):
    block = vit.blocks[0]
    assert block.attn.num_heads == 12
    bounds = {
        block.attn.qkv: math.sqrt(6 / (384 + 384)),
        block.mlp.fc1: math.sqrt(6 / (384 + 1536)),
        block.attn.proj: math.sqrt(6 / 768),
    }
    for layer, bound in bounds.items():
        assert bound * 0.999 < layer.weight.abs().max() <= bound and (layer.bias == 0).all()
    assert vit.cls_token.std().item() == pytest.approx(1e-6, rel=0.2)


def test_its_feature_is_the_class_token_s_at_any_size_of_whole_patches(vit):
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(vit(images), vit.forward_features(images)[:, 0])


@pytest.mark.parametrize(
    ("name", "heads", "message"),
    [
        ("resnet50", 12, "must be a ViT of timm's for MoCo v3's backbone"),
        ("vit_smal", 12, "must be a model of timm"),
        ("vit_wee_patch16_reg1_gap_256", 8, "a ViT with a class token"),
        ("vit_wee_patch16_reg1_gap_256", 12, "no vit_wee_patch16_reg1_gap_256 with .*num_heads=12"),
    ],
)
def test_other_backbones_are_refused(name, heads, message):
    with pytest.raises(ValueError, match=message):
        mocov3_vit(name=name, num_heads=heads)


def test_the_frozen_projection_is_in_no_group_and_the_twin_has_it_too():
    narrow = ["projector.hidden_dim=16", "projector.dim=8", "method.predictor_hidden_dim=16"]
    method = build_method(job_config(compose(["method=mocov3_vit", "backbone.image_size=32", *narrow])))
    (group,) = method.parameter_groups()
    frozen = {id(p) for p in (*method.backbone.patch_embed.parameters(), method.backbone.pos_embed)}
    assert not frozen & {id(p) for p in group.parameters}
    assert torch.equal(method.twin.encoder.backbone.patch_embed.proj.weight, method.backbone.patch_embed.proj.weight)
