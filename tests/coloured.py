"""Small synthetic images with colours and shapes, for methods that need larger or coloured images than digits."""

import numpy as np

from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.sources import Splits


def images(
    *, size: int = 32, limit: int | None = None, validation_fraction: float | None = None, seed: int = 0
) -> Splits:
    """512 training and 64 test images of four classes: noisy gradients between two colours in one of four
    directions.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    directions = np.stack([x, y, (x + y) / 2, (x - y + 1) / 2])
    label = np.arange(576) % 4
    first, second = rng.uniform(0, 255, (2, 576, 1, 1, 3))
    share = directions[label][..., None]
    pixels = (
        (first * share + second * (1 - share) + rng.normal(0, 20, (576, size, size, 3))).clip(0, 255).astype(np.uint8)
    )
    every = ImagesInMemory(pixels, name="coloured", labels=label, classes=["x", "y", "+", "-"])
    train = every.part(np.arange(512), "coloured/train")
    return Splits(train, train, every.part(np.arange(512, 576), "coloured/test"))
