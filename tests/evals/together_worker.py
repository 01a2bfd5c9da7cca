"""Functions for the ranks of a test in which several processes evaluate together."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from colours import Colours
from processes import PATIENCE_S

from caco import distributed
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.folders import folder
from caco.data.views.augmentation import View, Views
from caco.evals.base import Evaluator
from caco.evals.domain import Domain
from caco.evals.evaluation import Evaluation
from caco.evals.features import FeatureStore
from caco.evals.geometry import Geometry
from caco.evals.knn import KNN
from caco.evals.linear import Linear
from caco.evals.probe import Probe
from caco.evals.transfer import Transfer


class Counting(Colours):
    """A backbone that counts its images."""

    images = 0

    def forward(self, images):
        self.images += len(images)
        return super().forward(images)


class Own(Evaluator):
    """An evaluator like a user's own, which knows nothing of ranks: it runs on rank 0 and needs half of the features
    that others need.
    """

    when = "end"

    def build(self, store, *, seed):
        self.store = store

    def run(self, backbone):
        yield "own_mean", self.store.features(backbone, "train", np.arange(0, 33, 2)).mean().item()


def evaluation(root: str, names: list[str], **settings) -> Evaluation:
    """An evaluation of the images in root/images, with root/PACS and the transfer set root/own."""
    splits = folder(root=f"{root}/images", in_memory_mb=0)
    views = Views(size=8, plain_crop=1.0, views={"two": View(count=2)}, mean=[0.5] * 3, std=[0.25] * 3)
    every = {
        "knn": KNN(k=3, fraction=0.5),
        "own": Own(),
        "probe": Probe(),
        "geometry": Geometry(images=20),
        "transfer": Transfer(root=root, sets=["own"], size=8, num_strengths=3),
        "domain": Domain(root=root, size=8, num_strengths=3, ways=["frozen"]),
        "linear": Linear(epochs=2, batch=20, lr=4.0, larc=False),
    }
    # Batches of five, so that one rank has none of the images left at the end.
    return Evaluation({name: every[name] for name in names}, splits, views, batch=5, device="cpu", precision="fp32",
    seed=0,
                      loader=TorchLoader(num_workers=0), **settings)  # fmt: skip


def all_of(root: str, names: list[str], kept: bool) -> tuple[dict[str, float], int]:
    torch.manual_seed(0)
    backbone = Counting()
    folder = Path(root) / f"kept{distributed.world()}" if kept else None
    results = evaluation(root, names, folder=folder).run(backbone, "end")
    return results, backbone.images


def evaluate(root: str, out: str, names: list[str], kept: bool) -> None:
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    results, images = all_of(root, names, kept)
    Path(f"{out}{distributed.rank()}").write_text(json.dumps([results, images]))
    distributed.stop()


def fail(root: str, out: str) -> None:
    """Evaluate while a test image cannot be read and another evaluator fails on rank 0 alone; a third evaluator is
    affected by neither.
    """
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    made = evaluation(root, ["knn", "geometry", "probe", "domain"])
    (Path(root) / "images" / "test" / "b" / "1.png").write_bytes(b"no image")
    distributed.barrier()
    told = []
    original = FeatureStore.of

    def of(self, backbone, source, views):
        result = original(self, backbone, source, views)
        if distributed.is_main() and source.name == "folder/train":
            raise MemoryError("of rank 0 alone")
        return result

    with mock.patch.object(FeatureStore, "of", of):
        results = made.run(Counting(), "end", lambda name, error: told.append(f"{name}: {error}"))
    Path(f"{out}{distributed.rank()}").write_text(json.dumps([sorted(results), told]))
    distributed.stop()
