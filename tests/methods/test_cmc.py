"""CMC's loss, its two networks and its two banks are as published; the expected values are computed independently
here.
"""

import fifty
import pytest
import torch
from fifty import B, D, sgd
from test_instdisc import TAU, M, N, drawn_by_hand, nce_by_hand, normaliser_by_hand, softmax_by_hand
from torch import nn

from caco.banks.by_image import ImageBank
from caco.data.loaders.batches import mixed_seed
from caco.engine.optimizers import sgd as sgd_of
from caco.methods.cmc import CMC
from caco.nn.backbones import small_resnet
from caco.nn.channel_groups import ChannelGroups, GroupedProjector, with_channels
from caco.nn.heads import Encoder


class Groups(nn.Module):
    """Two backbones like that of `fifty`, for the first 4 and the other 8 pixels."""

    num_features = 2 * fifty.FEATURES

    def __init__(self):
        super().__init__()
        F = fifty.FEATURES
        self.lightness, self.colours = (
            nn.Sequential(nn.Flatten(), nn.Linear(pixels, F), nn.BatchNorm1d(F), nn.ReLU()) for pixels in (4, 8)
        )

    forward = ChannelGroups.forward


def cmc(**settings) -> CMC:
    torch.manual_seed(0)
    encoder = Encoder(backbone=Groups(), projector=GroupedProjector(in_dim=2 * fifty.FEATURES, dim=2 * D))
    bank = ImageBank(size=N, dim=2 * D, seed=3, parts=2)
    return CMC(
        encoder=encoder, bank=bank, num_images=N, **{"temperature": TAU, "num_noise": M, "seed": 5, **settings}
    ).double()


def embedding_by_hand(w, channels, number, name):
    x = channels.flatten(1) @ w[f"encoder.backbone.{name}.1.weight"].T + w[f"encoder.backbone.{name}.1.bias"]
    x = fifty.normed(x, w[f"encoder.backbone.{name}.2.weight"], w[f"encoder.backbone.{name}.2.bias"]).clamp_min(0)
    x = x @ w[f"encoder.projector.each.{number}.0.weight"].T + w[f"encoder.projector.each.{number}.0.bias"]
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("settings", [{}, {"loss": "softmax"}])
def test_fifty_steps_are_those_of_a_plain_loop(settings):
    """Each half is contrasted with the bank of the other half. Both use the same draws, each bank has its own constant
    Z, and rows of both banks move halfway to the new embedding.
    """
    method, peak = cmc(**settings), 0.05
    w, velocity = fifty.weights_of(method), {}
    bank_l, bank_c = (part.clone() for part in method.bank.rows.weight.detach().chunk(2, 1))
    Z_l = Z_c = None
    first = lambda step: 3 * step % (N - B)  # noqa: E731
    optimizer = sgd_of(method.parameter_groups(), batch=B, lr=peak, reference_batch=None, weight_decay=1e-3)
    losses = fifty.train(
        method, optimizer, count=1, first=first, warmup_epochs=0, final_fraction=None, drops=[0.5, 0.6667, 0.8333]
    )
    by_hand = []
    for step in range(fifty.STEPS):
        (view,), images = fifty.views_of(step, 1), list(range(first(step), first(step) + B))
        lightness, colours = (
            embedding_by_hand(w, view[:, :1], 0, "lightness"),
            embedding_by_hand(w, view[:, 1:], 1, "colours"),
        )
        draws = [drawn_by_hand(mixed_seed(5, step), image, M, N) for image in images]
        if settings:
            loss = softmax_by_hand(colours, bank_l, images, draws, TAU) + softmax_by_hand(
                lightness, bank_c, images, draws, TAU
            )
        else:
            Z_l = normaliser_by_hand(colours.detach(), bank_l, images, draws, TAU) if Z_l is None else Z_l
            Z_c = normaliser_by_hand(lightness.detach(), bank_c, images, draws, TAU) if Z_c is None else Z_c
            loss = nce_by_hand(colours, bank_l, images, draws, TAU, Z_l) + nce_by_hand(
                lightness, bank_c, images, draws, TAU, Z_c
            )
        by_hand.append(loss)
        rate = peak * 0.1 ** sum(step // 5 >= epoch for epoch in (5, 7, 8))
        sgd(w, fifty.gradients_of(loss, w), velocity, {"": rate}, 1e-3)
        for bank, x in ((bank_l, lightness), (bank_c, colours)):
            moved = 0.5 * bank[images] + 0.5 * x.detach()
            bank[images] = moved / moved.norm(dim=1, keepdim=True)
    fifty.assert_same_training(losses, method, by_hand, w)
    assert torch.allclose(method.bank.rows.weight, torch.cat([bank_l, bank_c], 1), atol=1e-9)
    if not settings:
        assert method.bank.normaliser.tolist() == pytest.approx([Z_l, Z_c], abs=1e-9)
        assert method.statistics()["bank/normaliser_2"] == pytest.approx(Z_c)


def test_each_part_of_a_row_begins_as_a_row_of_its_own_would():
    rows = ImageBank(size=4000, dim=256, seed=0, parts=2).rows.weight.detach()
    assert rows.abs().max() == pytest.approx((3 / 128) ** 0.5, rel=1e-3) and rows.var().item() == pytest.approx(
        1 / 128, rel=0.01
    )
    unit = ImageBank(size=50, dim=256, seed=0, parts=2, norms="unit").rows.weight.detach()
    assert torch.allclose(unit.unflatten(1, (2, 128)).norm(dim=2), torch.ones(50, 2))
    normal = ImageBank(size=4000, dim=8, seed=0, parts=2, norms="normal").rows.weight.detach()
    assert normal.std().item() == pytest.approx(1, rel=0.02)


def test_a_network_sees_its_channels_alone_and_is_drawn_for_them():
    torch.manual_seed(0)
    backbone = ChannelGroups(lightness=small_resnet(width=8), colours=small_resnet(width=8)).eval()
    images = torch.randn(2, 3, 16, 16)
    grey = images.clone()
    grey[:, 1:] = 0
    features, of_grey = backbone(images), backbone(grey)
    assert features.shape == (2, backbone.num_features) == (2, 128)
    assert torch.equal(features[:, :64], of_grey[:, :64]) and not torch.allclose(features[:, 64:], of_grey[:, 64:])
    first = backbone.colours.conv1
    assert (first.in_channels, first.kernel_size, first.stride, first.padding, first.bias) == (
        2,
        (3, 3),
        (1, 1),
        (1, 1),
        None,
    )
    with pytest.raises(ValueError, match="needs a first convolution that takes three channels.*; Linear has none"):
        with_channels(nn.Linear(3, 3), 2)


@pytest.mark.parametrize(
    ("parts", "projector", "message"),
    [
        ({"parts": 1}, {}, r"and a bank with 2 parts \(bank.parts=2\); got 2 and 1"),
        ({"parts": 3}, {}, "bank.parts: expected a divisor of dim, 10; got 3"),
        ({"parts": 2}, {"dim": 9}, "got dim=9, groups=2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, projector, message):
    with pytest.raises(ValueError, match=message):
        head = GroupedProjector(**{"in_dim": 2 * fifty.FEATURES, "dim": 2 * D, **projector})
        CMC(
            encoder=Encoder(backbone=Groups(), projector=head),
            bank=ImageBank(size=N, dim=2 * D, seed=0, **parts),
            num_images=N,
        )


def test_all_rows_at_once_are_refused():
    with pytest.raises(ValueError, match="this method can contrast with drawn rows only"):
        cmc(loss="softmax", num_noise=None)
    with pytest.raises(ValueError, match="several parts can be contrasted with drawn rows only"):
        cmc().bank.score(torch.eye(2 * D)[:2], torch.arange(2), temperature=0.1)


def test_it_says_what_it_needs():
    method = cmc()
    assert method.needs.indices and method.needs.lightness_first and not method.needs.whole_batch
