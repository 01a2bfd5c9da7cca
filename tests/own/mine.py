"""Components as a user might write them, one of each kind, which caco finds through --config-dir
(tests/test_config_dir.py).
"""

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from caco.data.sets.sources import Source, Splits
from caco.evals.base import Evaluator, When
from caco.methods.base import Method, Needs, Outputs
from caco.methods.sources import Positive, Positives


class Agree(Method):
    """A method that makes the embeddings of both views of an image agree, and those of different images differ."""

    needs = Needs(whole_batch=True)

    def __init__(self, *, encoder: nn.Module, temperature: float = 0.2):
        super().__init__()
        self.encoder, self.temperature = encoder, temperature

    @property
    def backbone(self):
        return self.encoder.backbone

    def forward(self, batch, now):
        q, k = (self.encoder(view) for view in batch.views)
        return Outputs(F.cross_entropy(q @ k.T / self.temperature, torch.arange(len(q))), {})


class Halfway(Positives):
    """A source of positives: the mean of the other view's key and the nearest row."""

    needs_bank = True
    searches = lookups = 1

    def __call__(self, k_BD, bank):
        return Positive(vector_BD=F.normalize(k_BD + bank.rows.lookup(bank.rows.most_probable(k_BD)), dim=1))


class Spread(Evaluator):
    """An evaluator: how far apart the features of the test images are."""

    def __init__(self, *, when: When = "epoch"):
        self.when = when

    def build(self, store, *, seed):
        self.store = store

    def run(self, backbone):
        yield "spread", self.store.features(backbone, "test").std(0).mean().item()


class Stripes(Source):
    """Images of noisy stripes in one of four directions, drawn when they are read; the label is the direction."""

    classes = ["-", "/", "|", "\\"]

    def __init__(self, index: np.ndarray, *, name: str, size: int):
        self.index, self.name, self.size = index, name, size
        self.labels = index % 4

    def __len__(self) -> int:
        return len(self.index)

    def image(self, index: int) -> Image.Image:
        number = int(self.index[index])
        draw = np.random.default_rng(number)
        y, x = np.mgrid[: self.size, : self.size]
        angle = np.pi / 4 * (number % 4)
        wave = np.sin(x * np.sin(angle) + y * np.cos(angle) + draw.uniform(0, 6))[..., None]
        return Image.fromarray(
            (127 + 80 * wave + draw.normal(0, 15, (self.size, self.size, 3))).clip(0, 255).astype(np.uint8)
        )

    def part(self, indices: np.ndarray, name: str) -> "Stripes":
        return Stripes(self.index[indices], name=name, size=self.size)

    def digest(self) -> str:
        return f"{self.size} pixels, {self.index.min()} to {self.index.max()}"


def stripes(*, count: int = 256, size: int = 16) -> Splits:
    train = Stripes(np.arange(count), name="stripes/train", size=size)
    return Splits(train, train, Stripes(np.arange(count, count + 100), name="stripes/test", size=size))


class Flat(nn.Module):
    """A backbone of one layer on a few pixels."""

    def __init__(self, *, width: int = 32):
        super().__init__()
        self.num_features = width
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, width), nn.BatchNorm1d(width), nn.ReLU()
        )

    def forward(self, images):
        return self.layers(images)
