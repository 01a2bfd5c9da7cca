"""A toy PACS in which the colour gives the class and the brightness the domain, so that the mean of each channel
suffices to learn it.
"""

import numpy as np
from PIL import Image

from caco.data.sets.domains import CLASSES, DOMAINS
from experiments.toy_sets import pacs
from experiments.toy_sets.pacs import LAYOUTS

__all__ = ["LAYOUTS", "write_pacs"]


def write_pacs(root, layout="dassl", *, size=16, noise=0, **counts):
    """Like experiments.toy_sets.pacs.write_pacs, with other images."""

    def coloured(domain, name, rng):
        corner = np.array([(CLASSES.index(name) + 1) >> bit & 1 for bit in range(3)])
        pixels = 30 * DOMAINS.index(domain) + 100 * corner + rng.integers(0, 20 + noise, (size, size, 3)) - noise // 2
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return pacs.write_pacs(root, layout, draw=coloured, **counts)
