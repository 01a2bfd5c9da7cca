"""Networks for images of other than three channels: the first layer follows, whoever wrote the network."""

from torch import nn

from caco.errors import UserError


def with_channels(network: nn.Module, channels: int) -> nn.Module:
    """A network whose first convolution, of three channels, is a new one of so many, drawn by the same law."""
    name, first = next(
        ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)), ("", None)
    )
    if first is None or first.in_channels != 3 or not isinstance(first.padding, tuple):
        raise UserError(
            f"a network for {channels} of the channels needs a first convolution of three; {type(network).__name__} has"
            " none"
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
