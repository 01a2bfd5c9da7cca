"""What a bank's positives are worth, by labels that the training never sees: how often a key's row stands for its own
class.

Shapes: A anchors, N training images, R rows that are looked at, D embedding width.
"""

from collections.abc import Iterator
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed, metrics
from caco.banks.base import Bank
from caco.banks.scoring import most_probable_row
from caco.data.sets.sources import choose
from caco.errors import UserError
from caco.evals.base import Evaluator
from caco.evals.extraction import full_float32
from caco.evals.features import FeatureStore
from caco.evals.knn import nearest
from caco.ranges import Several, held


class Purity(Evaluator):
    """Of the test images, whose keys choose rows of the bank as a query's positive (Eq. 11), the share whose row stands
    for their class.

    A row is no image and has no class; it stands for that of the training image whose key is nearest to it. The keys
    are the momentum encoder's, of plain views. purity/positives: percent of the test images whose row is of their own
    class. purity/chance: the same for a row drawn at random, on average. Of another number of images:
    purity_images-512/... (caco/metrics.py).

    Args:
        images: test images, drawn by the seed; all where there are fewer.
        train_images: training images that rows are compared with, drawn by the seed; all where there are fewer.
        rows: drawn by the seed, for the chance; all where there are fewer.
        when: "epoch" (while training, and at its end) or "end".
    """

    on_all_ranks = True  # the bank's rows lie on all of them
    needs_labels = True
    needs_method = True

    @held
    def __init__(
        self,
        *,
        images: Several = 5000,
        train_images: Several = 50_000,
        rows: Several = 2048,
        when: Literal["epoch", "end"] = "epoch",
    ) -> None:
        self.images, self.train_images, self.rows, self.when = images, train_images, rows, when
        self.protocol = metrics.purity(images=images, train_images=train_images, rows=rows)

    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Draws the images.

        Raises:
            UserError: there are no labels.
        """
        train, test = store.splits.labelled("purity")
        labels = dict(zip(("train", "test"), store.labels("purity"), strict=True))
        self._store, self._seed = store, seed
        self._sources, self._labels = {}, {}
        for split, source, count in (("train", train, self.train_images), ("test", test, self.images)):
            chosen = choose(None, min(count, len(source)), len(source), seed=seed, balanced=False)
            self._sources[split] = source.part(chosen, source.name)
            self._labels[split] = torch.from_numpy(labels[split][chosen])

    def attach(self, method: nn.Module) -> None:
        """
        Raises:
            UserError: there is no bank whose rows keys choose.
        """
        if getattr(method, "bank", None) is None:
            raise UserError("looks into the bank, and this method has none; leave it out")
        parts = dict(method.named_children())
        self._bank = cast(Bank, parts["bank"])
        self._key_encoder = parts["twin"].get_submodule("encoder") if "twin" in parts else parts["encoder"]

    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (`<protocol>/positives` and `<protocol>/chance`, percent)."""
        rows = self._bank.rows
        device = rows.weight.device
        keys = {
            split: self._store.outputs(self._key_encoder, source, self._store.views)
            for split, source in self._sources.items()
        }
        k_AD = distributed.shared_object(keys["test"] if distributed.is_main() else None)
        generator = np.random.default_rng(self._seed)
        index_R = generator.choice(self._bank.size, size=min(self.rows, self._bank.size), replace=False)
        with torch.no_grad():
            positive_A = most_probable_row(F.normalize(k_AD.to(device), dim=1), rows.weight, rows.first)
            row_U, place_A = torch.unique(positive_A, return_inverse=True)
            chosen_UD = rows.rows_of_all(row_U)
            drawn_RD = rows.rows_of_all(torch.from_numpy(np.sort(index_R)).to(device))
        if not distributed.is_main():
            return
        label_A = self._labels["test"]
        chosen_A = self._classes(chosen_UD, keys["train"])[place_A.cpu()]
        drawn_R = self._classes(drawn_RD, keys["train"])
        share_C = torch.bincount(drawn_R, minlength=int(label_A.max()) + 1).double() / len(drawn_R)
        yield f"{self.protocol}/positives", 100 * (chosen_A == label_A).double().mean().item()
        yield f"{self.protocol}/chance", 100 * share_C[label_A].mean().item()

    @full_float32()
    def _classes(self, m_RD: Tensor, k_ND: Tensor) -> Tensor:
        """The class that each row stands for, int64 [R]."""
        _, image_R1 = nearest(m_RD.cpu().float(), F.normalize(k_ND, dim=1), k=1)
        return self._labels["train"][image_R1[:, 0]]
