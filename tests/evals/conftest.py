"""Feature stores of images whose class is their colour."""

from collections.abc import Callable

import pytest
import torch
from colours import Colours, coloured
from torch import nn

from caco.data.sets.sources import Splits
from caco.data.views.augmentation import View, Views
from caco.evals.features import FeatureStore


@pytest.fixture
def colours() -> nn.Module:
    torch.manual_seed(0)
    return Colours()


@pytest.fixture
def store_of() -> Callable[..., FeatureStore]:
    """store_of(train=60, test=30, folder=...) makes a store of coloured images."""

    def make(train: int = 60, test: int = 30, **settings) -> FeatureStore:
        source = coloured(train, "train")
        views = Views(size=8, plain_crop=1.0, views={"two": View(count=2)}, mean=[0.5] * 3, std=[0.25] * 3)
        splits = Splits(source, source, coloured(test, "test", seed=1))
        return FeatureStore(splits, views, **{"batch": 8, "device": "cpu", "precision": "fp32", **settings})

    return make
