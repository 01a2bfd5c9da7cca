"""Helpers for tests that compare the batches of loaders."""

import contextlib

import pytest
import torch

from caco import instructions
from caco.data.loaders.batches import Batch
from caco.data.loaders.ffcv_loader import FFCVLoader
from caco.data.loaders.torch_loader import TorchLoader

needs_ffcv = pytest.mark.skipif(
    instructions.LEVEL == "torch",
    reason="FFCV's pipeline calls the compiled views, which CACO_INSTRUCTIONS=torch turns off",
)
FFCV = pytest.param(FFCVLoader, marks=needs_ffcv)
EVERY_PART = [
    {"epochs": (-1, 0, 1)},
    {"epochs": (3,), "start_step": 2},
    {"epochs": (0, 1), "rank": 1, "world": 2},
    {"epochs": (0,), "seed": 11, "batch": 15, "start_step": 1},
    {"epochs": (0,), "start_step": 3},
]


def batches(
    source,
    views,
    epochs=(0,),
    *,
    kind=TorchLoader,
    workers=0,
    prefetch=2,
    corrupt="fail",
    batch=8,
    start_step=0,
    **options,
) -> list[Batch]:
    settings = kind(num_workers=workers, prefetch=prefetch, corrupt=corrupt)
    loader = settings.bind(source, views, **{"batch": batch, "seed": 7} | options)
    with contextlib.closing(loader):
        return [one for epoch in epochs for one in loader.epoch(epoch, start_step)]


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.label, b.label)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        if a.patches is None or b.patches is None:
            assert a.patches is b.patches
        else:
            assert torch.equal(a.patches, b.patches)


def by_image(made: list[Batch]) -> dict[int, list[torch.Tensor]]:
    return {int(i): [view[row] for view in one.views] for one in made for row, i in enumerate(one.index)}
