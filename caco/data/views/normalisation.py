"""Normalises pixels by the mean and standard deviation of each channel, on the CPU and on other devices.

Pixels come as [..., H, W, 3]; the results are [..., 3, H, W] with channels_last strides, on the same device.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

_VALUES_AT_ONCE = 2**17  # half a megabyte of float32, for normalisation on a CPU


def scale_and_offset(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The factor and the summand of each channel that normalise its 8-bit values; mean and std are of values scaled to
    0..1.
    """
    # NumPy, because a plan builds the views on PyTorch's meta device, where tensors have no values.
    mean_C, std_C = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return tuple((1 / (255 * std_C)).tolist()), tuple((-mean_C / std_C).tolist())


def standardised(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Subtract the mean from float32 pixels and divide by the standard deviation, in place."""
    mean_C, std_C = (_on(tuple(values), pixels.device) for values in (mean, std))
    return pixels.sub_(mean_C).div_(std_C).movedim(-1, -3)


def scaled(
    pixels: torch.Tensor,
    scale: tuple[float, ...],
    offset: tuple[float, ...],
    take: Callable[[tuple[int, ...]], torch.Tensor],
) -> torch.Tensor:
    """Multiply each channel of uint8 pixels by its scale and add its offset, in float32.

    Args:
        take: shape -> a float32 tensor on the CPU, whose memory becomes that of the result of pixels on the CPU.
    """
    if pixels.device.type != "cpu":
        scale_C, offset_C = _on(scale, pixels.device), _on(offset, pixels.device)
        return pixels.float().mul_(scale_C).add_(offset_C).movedim(-1, -3)
    # Several times as fast on a CPU: whole rows of W * 3 values, and few enough at a time to stay in the cache.
    width = 3 * pixels.shape[-2]
    of_row, added = (_on(values * pixels.shape[-2], pixels.device) for values in (scale, offset))
    made, rows = take(pixels.shape), pixels.reshape(-1, width)
    step = max(1, _VALUES_AT_ONCE // width)
    for some, theirs in zip(made.view(-1, width).split(step), rows.split(step), strict=True):
        some.copy_(theirs).mul_(of_row).add_(added)
    return made.movedim(-1, -3)


@functools.lru_cache(maxsize=64)
def _on(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Numbers on a device, sent there once."""
    return torch.tensor(values, device=device)
