"""A view's random numbers: of (stream, image, view) alone, so that any process may make any view. random.h draws the
same.
"""

import numpy as np

NUM_UNIFORMS = (
    39  # that every view takes (augmentation.py says for what); further ones are those of its `then` and its patches
)


def uniforms(stream: int, samples: np.ndarray, v: int, count: int = NUM_UNIFORMS) -> np.ndarray:
    """The random numbers in [0, 1) of view v of some samples, float64 [B, count]: SplitMix64, started from the three.

    Of (stream, sample, view) alone, whichever numbers were drawn before: so any process may make any view.

    Args:
        stream: 64 bits, different for each seed and epoch.
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64
        start = _mix(np.uint64(stream) + step * (np.asarray(samples).astype(np.uint64) + np.uint64(1)))
        start = _mix(start + step * np.uint64(v + 1))
        bits = _mix(start[:, None] + step * np.arange(1, count + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


def stream_of(stream: int, v: int) -> int:
    """A stream of its own for what lies inside view v: its patches, each of which is an image there."""
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        return int(_mix(np.asarray(np.uint64(stream) + step * np.uint64(2**32 + v))))


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
