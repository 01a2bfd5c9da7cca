"""Backbones, projectors and the twin follow the paper's recipe."""

import pytest
import torch
from torch import nn

from caco.nn.backbones import feature_width, small_resnet, timm_backbone
from caco.nn.heads import Encoder, Projector
from caco.nn.twin import MomentumTwin


def test_resnet50_is_torchvision_s_resnet50():
    """The published code trains torchvision's ResNet-50; timm's must have the same parameters and initial scale."""
    import torchvision

    ours, theirs = timm_backbone(name="resnet50"), torchvision.models.resnet50()
    del theirs.fc
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]
    assert ours.num_features == 2048
    assert (ours.layer1[0].bn3.weight == 1).all(), "no residual branch may start at zero"


def test_blocks_may_start_as_the_identity():
    model = timm_backbone(name="resnet50", zero_init_last=True)
    assert all((block.bn3.weight == 0).all() for stage in (model.layer1, model.layer4) for block in stage)


def test_the_two_resnets_compute_the_same():
    import torchvision

    ours, theirs = timm_backbone(name="resnet18").eval(), torchvision.models.resnet18().eval()
    theirs.fc = nn.Identity()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


def test_the_cifar_stem_keeps_the_resolution():
    model = timm_backbone(name="resnet18", cifar_stem=True)
    assert model.maxpool(model.conv1(torch.zeros(1, 3, 32, 32))).shape == (1, 64, 32, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize(("size", "stem_stride"), [(16, 1), (24, 1), (32, 1), (32, 2)])
def test_the_small_resnet_takes_small_images(size, stem_stride):
    model = small_resnet(width=8, stem_stride=stem_stride)
    assert model.conv1(torch.zeros(1, 3, size, size)).shape == (1, 8, size // stem_stride, size // stem_stride)
    assert feature_width(model) == 64
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 64)


def test_a_vit_takes_crops_of_two_sizes():
    model = timm_backbone(name="vit_tiny_patch16_224", image_size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == model(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm_backbone(name="resnet5"), "'resnet5'; similar names: .*resnet50"),
        (lambda: timm_backbone(name="vit_tiny_patch16_224", cifar_stem=True), "cifar_stem is for ResNets"),
        (lambda: timm_backbone(name="vit_tiny_patch16_224", zero_init_last=True), "zero_init_last is for ResNets"),
        (lambda: small_resnet(width=7), "even width.*got width=7"),
        (lambda: small_resnet(blocks=[1, 1]), r"4 stages; got width=16, blocks=\[1, 1\]"),
        (lambda: small_resnet(stem_stride=4), "must be 1 or 2; got 4"),
        (lambda: Projector(in_dim=4, dim=0), "dim: expected int from 1 up to 1048576, got 0"),
        (lambda: Projector(in_dim=4, last_affine=False), "last_affine=false is for the last BatchNorm"),
        (lambda: feature_width(nn.Linear(2, 2)), "num_features; Linear has None"),
    ],
)
def test_impossible_networks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_paper_s_projector():
    head = Projector(in_dim=2048)
    kinds = [type(m).__name__ for m in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [(m.in_features, m.out_features, m.bias) for m in head if isinstance(m, nn.Linear)] == [
        (2048, 2048, None), (2048, 2048, None), (2048, 256, None)
    ]  # fmt: skip


def biases_of(head):
    return [m.bias is not None for m in head if isinstance(m, nn.Linear)]


def test_heads_with_biases_in_some_layers_and_a_last_batchnorm_without_scale():
    byol = Projector(
        in_dim=8, hidden_dim=16, dim=4, layers=2, bias=True, last_bias=False, initialisation="truncated_normal_fan_in"
    )
    assert biases_of(byol) == [True, False] and (byol[0].bias == 0).all()
    assert 0 < byol[0].weight.abs().max() <= 2 / 8**0.5, (
        "the weights must be truncated at two standard deviations, 2 / sqrt(inputs)"
    )
    predictor = Projector(in_dim=8, hidden_dim=16, dim=4, layers=2, last_bias=True)
    assert biases_of(predictor) == [False, True]
    simsiam = Projector(in_dim=8, hidden_dim=16, dim=4, last_batch_norm=True, last_affine=False)
    assert biases_of(simsiam) == [False] * 3
    assert simsiam[-1].weight is None and simsiam[1].weight is not None


def test_simclr_s_head_is_drawn_from_a_normal_law_of_a_hundredth():
    torch.manual_seed(0)
    head = Projector(in_dim=512, hidden_dim=512, dim=128, layers=2, bias=True, initialisation="normal_0.01")
    for layer in (head[0], head[3]):
        w = layer.weight.detach()
        assert w.std().item() == pytest.approx(0.01, rel=0.01) and w.mean().abs() < 2e-4
        assert w.abs().max() > 0.035, (
            "the normal law must not be truncated: some of 65,536 or more numbers are beyond 3.5 standard deviations"
        )
        assert (layer.bias == 0).all()


def test_embeddings_are_float32_under_autocast_and_unit_unless_a_predictor_takes_them():
    torch.manual_seed(0)
    encoder = Encoder(backbone=small_resnet(width=8), projector=Projector(in_dim=64, hidden_dim=32, dim=4))
    images = torch.randn(6, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding, projected = encoder(images), encoder(images, unit=False)
    assert embedding.dtype == projected.dtype == torch.float32
    assert torch.allclose(embedding.norm(dim=1), torch.ones(6), atol=1e-6)
    assert torch.equal(nn.functional.normalize(projected, dim=1), embedding)
    assert projected.norm(dim=1).std() > 1e-3


def test_a_twin_from_another_draw_has_the_encoder_s_values_in_another_order():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 20))
    encoder[2].weight.requires_grad_(False)
    twin = MomentumTwin(encoder, initialisation="random").encoder
    ours, theirs = twin[0].weight.flatten(), encoder[0].weight.flatten()
    assert torch.equal(ours.sort().values, theirs.sort().values)
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1].abs() < 0.2
    assert (twin[1].weight == 1).all() and torch.equal(twin[2].weight, encoder[2].weight), (
        "parameters that are not learned must not be drawn again"
    )
    assert not any(p.requires_grad for p in twin.parameters())


def test_the_twin_follows_parameters_only():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    twin = MomentumTwin(encoder)
    with torch.no_grad():
        encoder[0].weight.add_(1.0)
        encoder[1].running_mean.fill_(7.0)
    before = twin.encoder[0].weight.clone()
    twin.update(encoder, 0.9)
    assert torch.allclose(twin.encoder[0].weight, 0.9 * before + 0.1 * encoder[0].weight)
    assert torch.equal(twin.encoder[0].weight, before.lerp(encoder[0].weight, 1 - 0.9)), (
        "torch.optim.swa_utils averages differently now, so a resumed run would differ from an uninterrupted one"
    )
    assert (twin.encoder[1].running_mean == 0).all(), "the twin must keep its own BatchNorm statistics"
    twin.update(encoder, 1.0)
    assert torch.allclose(twin.encoder[0].weight, 0.9 * before + 0.1 * encoder[0].weight)
    twin.update(encoder, 0.0)
    assert torch.equal(twin.encoder[0].weight, encoder[0].weight)
    assert not any(p.requires_grad for p in twin.parameters())
    assert not twin(torch.randn(4, 3)).requires_grad
