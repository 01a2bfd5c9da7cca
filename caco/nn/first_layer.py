"""Adapts any network to images with another number of channels than three, by replacing its first convolution."""

from torch import nn

from caco.errors import UserError


def with_channels(network: nn.Module, channels: int) -> nn.Module:
    """The network itself, its first convolution of three channels replaced by a new one of `channels` channels. The new
    weights are drawn as `kaiming_normal_` draws them (fan_out, ReLU); the convolution keeps size, stride and padding.

    Raises:
        UserError: the network's first convolution does not take three channels, or there is none.
    """
    name, first = next(
        ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)), ("", None)
    )
    if first is None or first.in_channels != 3 or not isinstance(first.padding, tuple):
        raise UserError(
            f"a network for {channels} of the channels needs a first convolution that takes three channels, which is"
            f" then replaced; {type(network).__name__} has none"
        )
    size, stride, padding = (_pair(values) for values in (first.kernel_size, first.stride, first.padding))
    new = nn.Conv2d(channels, first.out_channels, size, stride, padding, bias=first.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    new.weight.requires_grad_(first.weight.requires_grad)
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, new)
    return network


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    down, across = values
    return down, across
