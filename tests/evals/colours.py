"""Images whose class is their colour, and a backbone that sees colours."""

import numpy as np
import torch
from torch import nn

from caco.data.sets.memory import ImagesInMemory


def coloured(count: int, name: str, *, labelled: bool = True, seed: int = 0, classes: int = 3) -> ImagesInMemory:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 120, (count, 8, 8, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 100
    return ImagesInMemory(
        images, name=name, labels=labels if labelled else None, classes=["red", "green", "blue"][:classes]
    )


class Colours(nn.Module):
    """A backbone: the mean of each channel, then a linear layer and a BatchNorm, which an evaluation must not
    change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.num_features = 4
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(4, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(images.mean((2, 3))))
