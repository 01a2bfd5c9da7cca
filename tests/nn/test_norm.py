"""BatchNorm over several processes computes the same as in one process, including whatever else the layer does."""

from collections import Counter

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, SplitBatchNorm2d
from torch import nn

from caco import distributed
from caco.nn.norm import AllRanksBatchNorm, over_all_ranks


@pytest.fixture
def two_ranks(monkeypatch):
    """Pretend to be one of two ranks, which is enough for replacing layers; tests/test_ranks.py trains with two
    processes.
    """
    monkeypatch.setattr(distributed, "world", lambda: 2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_network_keeps_its_activations_parameters_and_names(two_ranks, device):
    network = timm.create_model("efficientnet_b0", num_classes=0)
    activations = Counter(type(layer).__name__ for layer in network.modules())["SiLU"]
    parameters, state = dict(network.named_parameters()), set(network.state_dict())
    replaced = over_all_ranks(network, torch.device(device))
    layers = Counter(type(layer).__name__ for layer in replaced.modules())
    assert activations == layers["SiLU"] == 49
    assert layers["BatchNorm2d"] == layers["BatchNormAct2d"] == 0
    assert dict(replaced.named_parameters()) == parameters and set(replaced.state_dict()) == state


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_with_drop_out_and_activation_computes_the_same(training):
    torch.manual_seed(0)
    layer = BatchNormAct2d(3, act_layer=nn.PReLU, drop_layer=nn.Dropout).double().train(training)
    nn.init.uniform_(layer.weight), nn.init.uniform_(layer.bias), nn.init.uniform_(layer.running_mean)
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for one in (
        AllRanksBatchNorm(layer),
        layer,
    ):  # ours first: it has its own statistics, and shares the parameters
        torch.manual_seed(1)
        y = one(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        results.append([y, gradient, one.running_mean, one.running_var])
        assert [p.requires_grad for p in one.parameters()] == [False, True, True]
    assert all(torch.allclose(ours, theirs, atol=1e-12) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_layer_that_does_something_else_is_refused_and_not_made_a_plain_one(two_ranks, device):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), SplitBatchNorm2d(4))
    with pytest.raises(
        ValueError, match=r"^1: expected layers of torch's BatchNorm .* 2 processes, got SplitBatchNorm2d"
    ):
        over_all_ranks(network, torch.device(device))
