"""A toy PACS whose classes are told by colour and its domains by brightness: what a mean over each channel can
learn.
"""

import numpy as np
from PIL import Image

from caco.data.sets.domains import CLASSES, DOMAINS
from experiments.toy_sets import pacs
from experiments.toy_sets.pacs import LAYOUTS

__all__ = ["LAYOUTS", "write_pacs"]


def write_pacs(root, layout="dassl", *, size=16, noise=0, **counts):
    """As experiments.toy_sets.pacs has it, with images of another kind."""

    def coloured(domain, name, rng):
        corner = np.array([(CLASSES.index(name) + 1) >> bit & 1 for bit in range(3)])
        pixels = 30 * DOMAINS.index(domain) + 100 * corner + rng.integers(0, 20 + noise, (size, size, 3)) - noise // 2
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return pacs.write_pacs(root, layout, draw=coloured, **counts)
