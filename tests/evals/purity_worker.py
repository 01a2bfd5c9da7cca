"""Functions for the processes of the tests of purity."""

import json
from pathlib import Path

import torch
from colours import coloured
from processes import PATIENCE_S
from torch import nn

from caco import distributed
from caco.banks.fifo import FifoBank
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.sources import Splits
from caco.data.views.augmentation import View, Views
from caco.evals.evaluation import Evaluation
from caco.evals.purity import Purity


class Toy(nn.Module):
    """A method with an encoder of mean colours in a few dimensions, and a bank of random rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
        self.encoder = nn.Sequential(self.backbone)
        self.bank = FifoBank(size=rows, dim=4, seed=3)


def measured(store, method: Toy) -> dict[str, float]:
    purity = Purity(images=17)
    purity.build(store, seed=0)
    purity.attach(method)
    store.all_ranks = True
    return dict(purity.run(method.backbone))


def evaluation() -> Evaluation:
    source = coloured(60, "train")
    views = Views(size=8, plain_crop=1.0, views={"two": View(count=2)}, mean=[0.5] * 3, std=[0.25] * 3)
    return Evaluation({"purity": Purity(images=17)}, Splits(source, source, coloured(30, "test", seed=1)), views,
    batch=7, device="cpu", precision="fp32", seed=0, loader=TorchLoader(num_workers=0))  # fmt: skip


def of_two(rows: int) -> dict[str, float]:
    method, found = Toy(rows), evaluation()
    found.require(method.backbone, method)
    return found.run(method.backbone, "end")


def evaluate(out: str) -> None:
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    Path(f"{out}{distributed.rank()}").write_text(json.dumps(of_two(rows=8)))
    distributed.stop()
