"""Small images of any number of channels, smooth and with a little noise."""

import numpy as np


def wave(seed: int, count: int, size: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    return np.stack(
        [np.sin(6 * x * (c + 1)) * (c + 1) + 0.1 * rng.standard_normal((size, size)) for c in range(count)], 2
    ).astype(np.float32)
