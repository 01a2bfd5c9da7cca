"""The smallest dense task, predicting the brightness of each pixel for images of different shapes, and the functions
for the processes of its tests.
"""

from pathlib import Path
from typing import Any

import torch
from colours import coloured
from processes import PATIENCE_S
from torch import nn
from torch.nn import functional as F

from caco import distributed
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.sources import Splits, UnreadableImage
from caco.data.views.augmentation import View, Views
from caco.errors import UserError
from caco.evals.dense.recipe import Recipe
from caco.evals.dense.training import Task, train
from caco.evals.features import FeatureStore

RECIPE = Recipe(steps=7, images=3, rate=0.3, reference_images=3, milestones=[0.6], warmup_steps=2, weight_decay=0.01)


class Brightness(Task):
    """Eight images of different shapes; the target is the brightness, shifted a little by the seed."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = [torch.rand(3, 4 + i, 9 - i // 2, generator=generator, dtype=torch.float64) for i in range(8)]
        self.files = coloured(len(self.images), "bright")
        self.asked: list[tuple[int, int]] = []

    def example(self, index, seed):
        self.asked.append((index, seed))
        image = self.images[index] + 0.01 * (seed % 7)
        return image, image.mean(dim=0)

    def loss(self, network, examples):
        pixels = torch.tensor(float(sum(wanted.numel() for _, wanted in examples)))
        total = distributed.sum_(pixels)
        # Images have different shapes, so each is embedded alone, and all pixels are normalised together in one row.
        row = torch.cat([image.flatten(1) for image, _ in examples], dim=1)[None, :, None]
        wanted = torch.cat([wanted.flatten() for _, wanted in examples])
        return F.mse_loss(network(row).flatten(), wanted, reduction="sum") / total * distributed.world()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1)).double()


def store_of(folder=None, num_workers=0, said=None, corrupt="fail") -> FeatureStore:
    source = coloured(6, "train")
    views = Views(size=8, plain_crop=1.0, views={"two": View(count=2)}, mean=[0.5] * 3, std=[0.25] * 3)
    loader = TorchLoader(num_workers=num_workers, corrupt=corrupt)
    say = (lambda text, passing=False: said.append(text)) if said is not None else lambda text, passing=False: None
    return FeatureStore(
        Splits(source, source, source),
        views,
        batch=8,
        device="cpu",
        precision="fp32",
        loader=loader,
        folder=folder,
        say=say,
    )


def trained(folder=None, recipe=RECIPE, task=None, **settings) -> dict[str, torch.Tensor]:
    options: dict[str, Any] = {"seed": 3, "name": "it", "made_from": {"a": 1}}
    options |= {"precision": "fp32", "save_every_steps": 2}
    store = store_of(
        folder, **{key: settings.pop(key) for key in ("num_workers", "said", "corrupt") if key in settings}
    )
    return train(network(), task or Brightness(), recipe, store, **options | settings).state_dict()


class OneDamaged(Brightness):
    def example(self, index, seed):
        if index == 1:
            raise UnreadableImage("photo_1.jpg: expected an image")
        return super().example(index, seed)


def read_what_one_rank_cannot(folder) -> None:
    """Write the error message of each rank."""
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    try:
        trained(task=OneDamaged())
    except UserError as error:
        (Path(folder) / f"{distributed.rank()}.txt").write_text(str(error))
    distributed.stop()


def write_weights(path) -> None:
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    weights = trained()
    if distributed.is_main():
        torch.save(weights, path)
    distributed.stop()
