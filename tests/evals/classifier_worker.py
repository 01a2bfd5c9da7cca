"""Functions for the ranks of a test that trains a classifier whose last batch cannot be divided evenly."""

import torch
from colours import Colours, coloured
from processes import PATIENCE_S

from caco import distributed
from caco.data.sets.sources import Splits
from caco.data.views.augmentation import View, Views
from caco.evals import classifier
from caco.evals.classifier import Recipe
from caco.evals.features import FeatureStore


def write_head(path) -> None:
    distributed.start(torch.device("cpu"), timeout_s=PATIENCE_S)
    source = coloured(49, "train")
    views = Views(size=8, plain_crop=1.0, views={"two": View(count=2)}, mean=[0.5] * 3, std=[0.25] * 3)
    store = FeatureStore(Splits(source, source, source), views, batch=8, device="cpu", precision="fp32")
    torch.manual_seed(0)
    recipe = Recipe(epochs=2, batch=20, lr=2.0, reference_batch=None, drop_last=False)
    network = classifier.train_classifier(
        Colours(), source, recipe, store, num_classes=3, frozen=True, seed=3, name="it"
    )
    if distributed.is_main():
        torch.save(network[1].state_dict(), path)
    distributed.stop()
