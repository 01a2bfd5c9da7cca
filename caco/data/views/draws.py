"""A view's random numbers, and the position of each step's numbers among them. They depend on (stream, image, view)
alone, so any process can make any view. random.h draws the same numbers for the compiled views.
"""

import numpy as np

# Each view takes one vector of uniform random numbers; these are the positions of its numbers in that vector. Every
# number has a fixed position, so changing one setting (say blur_p) leaves all other draws of the same seed unchanged.
# random.h repeats these positions for the compiled views.
CROP_TRIES = 10
CROP = slice(0, 2 * CROP_TRIES)
CROP_TOP, CROP_LEFT, JITTER, GRAY, BLUR, SIGMA, SOLARIZE, FLIP, ANGLE, SHIFT_X, SHIFT_Y = range(20, 31)
ORDER = slice(31, 35)
FACTOR = slice(35, 39)
NUM_UNIFORMS = FACTOR.stop  # every view takes these; `then` and patches take further ones


def uniforms(stream: int, samples: np.ndarray, v: int, count: int = NUM_UNIFORMS) -> np.ndarray:
    """The random numbers of view number v of a batch: uniform in [0, 1), float64 [B, count].

    They depend on (stream, sample, v) alone and not on earlier draws, so any process can make any view. The generator
    is SplitMix64, started from these three.

    Args:
        stream: a 64-bit number, different for each seed and epoch.
        samples: int [B], the number of each image.
        v: the number of the view.
        count: how many numbers each image takes; a larger count does not change the first ones.
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64
        start = _mix(np.uint64(stream) + step * (np.asarray(samples).astype(np.uint64) + np.uint64(1)))
        start = _mix(start + step * np.uint64(v + 1))
        bits = _mix(start[:, None] + step * np.arange(1, count + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


def stream_of(stream: int, v: int) -> int:
    """A separate stream for the patches of view number v, because each patch is augmented as an image of its own."""
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        return int(_mix(np.asarray(np.uint64(stream) + step * np.uint64(2**32 + v))))


def between(low: float, high: float, u: float) -> float:
    """The number that a random number u in [0, 1) chooses from the range."""
    return low + (high - low) * u


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
