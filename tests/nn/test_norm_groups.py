"""BatchNorm over groups of the batch, and keys that are embedded in a shuffled order."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d, SplitBatchNorm2d
from tiny import batch_of, compose, now, train
from torch import nn
from torch.nn import functional as F

from caco import distributed
from caco.engine.assembly import build_method
from caco.engine.continuing import refuse_other_groups
from caco.nn.backbones import small_resnet, timm_backbone
from caco.nn.heads import Encoder, Projector
from caco.nn.norm import BATCH_NORMS, GroupedBatchNorm, groups_of_a_rank, in_groups, over_all_ranks
from caco.nn.twin import MomentumTwin

CPU = torch.device("cpu")
SMALL = ["augmentation=digits", "projector=small", "projector.hidden_dim=16", "projector.dim=8", "optimizer=sgd"]


def layer_with_a_past(kind=nn.BatchNorm2d, **settings):
    torch.manual_seed(0)
    layer = kind(3, **settings).double().train()
    for values in (layer.weight, layer.bias, layer.running_mean):
        nn.init.normal_(values)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("shape", [(), (4, 5)])
def test_each_group_is_normalised_by_itself_and_the_statistics_are_their_mean(views, shape):
    """Eight images in four groups. The rows of the second view follow those of the first, and an image is in one group
    with all of its views.
    """
    plain = layer_with_a_past(nn.BatchNorm2d if shape else nn.BatchNorm1d)
    ours = GroupedBatchNorm(copy.deepcopy(plain), groups=4, images=8)
    x = torch.randn(views * 8, 3, *shape, dtype=torch.float64, requires_grad=True)
    out, expected, means, variances = ours(x), torch.zeros_like(x), [], []
    for group in range(4):
        rows = [view * 8 + image for view in range(views) for image in (2 * group, 2 * group + 1)]
        mean, variance = plain.running_mean.clone(), plain.running_var.clone()
        normalised = F.batch_norm(x[rows], mean, variance, plain.weight, plain.bias, True, 0.1)
        expected = expected.index_copy(0, torch.tensor(rows), normalised)
        over = x[rows].transpose(0, 1).flatten(1)
        assert torch.allclose(mean, 0.9 * plain.running_mean + 0.1 * over.mean(1)), (
            "the running mean must follow torch's rule"
        )
        means.append(mean), variances.append(0.9 * plain.running_var + 0.1 * over.var(1, correction=1))
    assert torch.allclose(out, expected, atol=1e-12)
    assert torch.allclose(ours.running_mean, torch.stack(means).mean(0), atol=1e-12)
    assert (
        torch.allclose(ours.running_var, torch.stack(variances).mean(0), atol=1e-12) and ours.num_batches_tracked == 1
    )
    goal = torch.randn_like(x)
    for a, b in zip(
        torch.autograd.grad((out * goal).sum(), [x, ours.weight, ours.bias]),
        torch.autograd.grad((expected * goal).sum(), [x, plain.weight, plain.bias]),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)
    learned = F.batch_norm(x, ours.running_mean, ours.running_var, ours.weight, ours.bias)
    assert torch.allclose(ours.eval()(x), learned, atol=1e-12), "in evaluation mode it must be an ordinary BatchNorm"


def test_it_computes_what_moco_s_notebook_computes_of_the_same_groups():
    """The notebook turns groups into channels: group g has every fourth image from image g on."""
    layer = layer_with_a_past()
    ours = GroupedBatchNorm(copy.deepcopy(layer), groups=4, images=8)
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    mean, variance = layer.running_mean.repeat(4), layer.running_var.repeat(4)
    theirs = F.batch_norm(
        x.reshape(2, 12, 5, 5), mean, variance, layer.weight.repeat(4), layer.bias.repeat(4), True, 0.1
    )
    neighbours = torch.arange(8).reshape(2, 4).T.flatten()
    assert torch.allclose(ours(x[neighbours]), theirs.reshape(8, 3, 5, 5)[neighbours], atol=1e-12)
    assert torch.allclose(ours.running_mean, mean.reshape(4, 3).mean(0))
    assert torch.allclose(ours.running_var, variance.reshape(4, 3).mean(0))


def test_what_a_layer_does_besides_it_does_still():
    layer = layer_with_a_past(BatchNormAct2d, act_layer=nn.PReLU)
    ours = GroupedBatchNorm(copy.deepcopy(layer), groups=2, images=4)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert torch.allclose(ours(x), torch.cat([layer(x[:2]), layer(x[2:])]), atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: small_resnet(width=8),
        lambda: timm_backbone(name="resnet18", cifar_stem=True),
        lambda: torchvision.models.resnet18(num_classes=8),
        lambda: timm.create_model("test_efficientnet", num_classes=0),
        lambda: nn.Sequential(nn.Flatten(), Projector(in_dim=3 * 16 * 16, hidden_dim=16, dim=8, last_batch_norm=True)),
    ],
    ids=["small_resnet", "timm's resnet18", "torchvision's resnet18", "timm's efficientnet", "a head"],
)
def test_every_layer_of_a_network_is_replaced_and_images_of_other_groups_change_nothing(make):
    torch.manual_seed(0)
    network = make().double().train()
    names = set(network.state_dict())
    grouped = in_groups(network, CPU, 2, images=4)
    layers = [layer for layer in grouped.modules() if isinstance(layer, BATCH_NORMS)]
    assert (
        layers and all(isinstance(layer, GroupedBatchNorm) for layer in layers) and set(grouped.state_dict()) == names
    )
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    others = torch.cat([images[:2], torch.randn_like(images[2:])])
    assert torch.equal(grouped(images)[:2], grouped(others)[:2])
    whole = over_all_ranks(copy.deepcopy(grouped), CPU)
    assert not torch.allclose(whole(images)[:2], whole(others)[:2]), "a copy for fine-tuning must not use groups"
    assert torch.equal(grouped(images)[:2], grouped(others)[:2])


# Shuffled keys.


def twin_of(network, *, images, groups=2):
    encoder = Encoder(backbone=network, projector=Projector(in_dim=8, hidden_dim=8, dim=4)).double()
    return in_groups(MomentumTwin(encoder).train(), CPU, groups, images=images, shuffle_keys=True)


class Mean(nn.Sequential):
    """A backbone from images [B, 3, H, W] to features [B, 8]."""

    num_features = 8

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("views", [1, 2])
def test_keys_meet_other_statistics_and_come_back_in_order(views):
    torch.manual_seed(0)
    twin = twin_of(Mean(), images=8)
    images = [torch.randn(8, 3, 6, 6, dtype=torch.float64) for _ in range(views)]
    given = images if views > 1 else images[0]
    plain = copy.deepcopy(twin).encoder
    torch.manual_seed(3)
    order = torch.randperm(8)
    assert order.tolist() != list(range(8)) and set(order[:4].tolist()) != {0, 1, 2, 3}
    mixed = [view[order] for view in images]
    expected = torch.empty(views * 8, 4, dtype=torch.float64)
    for view, rows in enumerate(plain(mixed if views > 1 else mixed[0]).split(8)):
        expected[view * 8 + order] = rows
    torch.manual_seed(3)
    assert torch.allclose(twin(given), expected, atol=1e-12)
    assert not torch.allclose(expected, copy.deepcopy(plain)(given), atol=1e-3), (
        "in the given order, other images share the statistics"
    )
    first, second = twin(given), twin(given)
    assert not torch.allclose(first, second, atol=1e-3), "each call draws a new order"
    assert torch.allclose(twin.eval()(given), twin.encoder(given), atol=1e-12), (
        "in evaluation mode keys are not shuffled"
    )


def test_two_parts_of_one_group_each_are_two_groups_of_the_whole():
    """With `accumulate`, each part of the batch is divided into groups on its own."""
    losses, gradients = [], []
    for groups, parts in ((4, 1), (2, 2)):
        cfg = compose("method=mocov2", *SMALL)
        method = in_groups(build_method(cfg).double().train(), CPU, groups, images=16 // parts)
        views = [
            torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(view), dtype=torch.float64)
            for view in (0, 1)
        ]
        loss = sum(method(part, now()).loss / parts for part in batch_of(views).parts(parts))
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for group in method.parameter_groups() for p in group.parameters])
    assert torch.allclose(losses[0], losses[1], atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients, strict=True))


# What is refused.


@pytest.mark.parametrize(
    ("norm_groups", "world", "images", "expected"),
    [
        (3, 1, 16, "expected 1, rank, or a multiple of the 1 process that cuts the 16 images .* at least 2; got 3"),
        (16, 1, 16, "at least 2; got 16"),
        (2, 4, 8, "a multiple of the 4 processes .* got 2"),
        (6, 2, 8, "got 6"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(norm_groups, world, images, expected):
    with pytest.raises(ValueError, match=f"^norm_groups: .*{expected}"):
        groups_of_a_rank(norm_groups, world=world, images=images)


def test_groups_are_shared_out():
    shared = [(1, 4, 8), (8, 1, 64), (8, 4, 16), ("rank", 4, 16), ("rank", 1, 16), (1, 1, 1)]
    assert [groups_of_a_rank(groups, world=world, images=images) for groups, world, images in shared] == [
        1,
        8,
        2,
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("network", "norm_groups", "shuffle_keys", "expected"),
    [
        (nn.Linear(2, 2), 2, False, "^norm_groups: expected 1, as this method's networks have no BatchNorm; got 2"),
        (
            nn.BatchNorm1d(2),
            2,
            True,
            "^shuffle_keys: expected false, as this method has no momentum twin with BatchNorm",
        ),
        (nn.Sequential(nn.BatchNorm1d(2), MomentumTwin(nn.Linear(2, 2))), 2, True, "no momentum twin with BatchNorm"),
        (
            MomentumTwin(nn.BatchNorm1d(2)),
            "rank",
            True,
            "^shuffle_keys: shuffling changes nothing with one group of images; .* got rank",
        ),
        (
            MomentumTwin(nn.BatchNorm1d(2)),
            1,
            True,
            "^shuffle_keys: shuffling changes nothing with one group of images; .* got 1",
        ),
    ],
)
def test_what_would_change_nothing_is_refused(network, norm_groups, shuffle_keys, expected):
    with pytest.raises(ValueError, match=expected):
        in_groups(network, CPU, norm_groups, images=8, shuffle_keys=shuffle_keys)


def test_layers_and_batches_that_groups_are_not_made_for_are_refused():
    with pytest.raises(
        ValueError, match=r"^1: expected .* groups of the batch, got SplitBatchNorm2d: norm_groups=1, or choose"
    ):
        in_groups(nn.Sequential(nn.Conv2d(3, 4, 1), SplitBatchNorm2d(4)), CPU, 2, images=4)
    with pytest.raises(
        ValueError, match="expected a batch of 4 images, or several views of it one after the other; got 6 rows"
    ):
        in_groups(nn.BatchNorm1d(2), CPU, 2, images=4)(torch.zeros(6, 2))


def test_a_group_for_each_rank_asks_for_the_same_ranks_again(tmp_path, monkeypatch):
    command = ["norm_groups=rank", "max_steps=3", "eval=[]"]
    train(tmp_path, *command)
    train(tmp_path, *command)
    refuse_other_groups(1)
    with pytest.raises(
        ValueError, match="had 2 groups, one for each process, and would have 1 from here on; start 2 processes"
    ):
        refuse_other_groups(2)
    seen = []
    monkeypatch.setattr("caco.engine.training.refuse_other_groups", seen.append)
    train(tmp_path, *command)
    assert seen == [1], "the number of ranks must be checked when the run resumes"
    assert distributed.world() == 1
