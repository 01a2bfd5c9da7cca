"""Random numbers that depend on a stream and an image alone, drawn many at once: every device and every process draws
the same numbers.
"""

import torch
from torch import Tensor

from caco import devices

# SplitMix64's constants as signed integers: int64 arithmetic wraps modulo 2**64 as unsigned arithmetic does.
_STEP = 0x9E3779B97F4A7C15 - 2**64
CACHED = 1 << 15  # how many numbers a CPU makes at a time, so that they stay in its cache
_FIRST_FACTOR, _SECOND_FACTOR = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def uniform(stream: int, image_B: Tensor, count: int) -> Tensor:
    """`count` random numbers from [0, 1) for each image, float64 [B, count]: SplitMix64, started from stream and image.

    Args:
        stream: 64 bits, different for each seed and step.
        image_B: int64, the images' indices in the training set.
        count: numbers for each image.
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    start_B = _mix(_signed(stream) + _STEP * (image_B + 1))
    step_M = _STEP * torch.arange(1, count + 1, device=image_B.device)
    number_BM = torch.empty(len(image_B), count, dtype=torch.float64, device=image_B.device)
    rows = len(image_B) if devices.runs_ahead(image_B.device) else max(1, CACHED // max(1, count))
    for start_b, number_bM in zip(start_B.split(rows), number_BM.split(rows), strict=True):
        number_bM.copy_(_shifted(_mix(start_b[:, None] + step_M), 11)).mul_(2.0**-53)
    return number_BM


def _signed(bits: int) -> int:
    return (bits + 2**63) % 2**64 - 2**63


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Bits shifted to the right as those of an unsigned number: zeros come in, not copies of the sign."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = _shifted(bits, 30).bitwise_xor_(bits).mul_(_FIRST_FACTOR)
    bits = _shifted(bits, 27).bitwise_xor_(bits).mul_(_SECOND_FACTOR)
    return _shifted(bits, 31).bitwise_xor_(bits)
