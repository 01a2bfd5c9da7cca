"""Measures the bank's positives with labels that the training never sees: how often a key's positive row stands for the
key's own class.

Shapes: A anchors, N training images, R rows, D embedding width.
"""

from collections.abc import Iterator
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed, metrics
from caco.banks.base import Bank
from caco.banks.nearest import most_probable_row
from caco.data.sets.choosing import choose
from caco.errors import UserError
from caco.evals.base import Evaluator
from caco.evals.extraction import full_float32
from caco.evals.features import FeatureStore
from caco.evals.knn import nearest
from caco.ranges import Several, held


class Purity(Evaluator):
    """The share of test images whose positive row in the bank (Eq. 11) stands for their own class.

    A row belongs to no image and has no class; it stands for the class of the training image whose key is nearest to
    it. Keys are embeddings of plain views by the momentum encoder, or by the encoder if the method has none.
    purity/positives: percent of the test images whose positive row is of their own class. purity/chance: the same for
    a row drawn at random, on average. Another number of images appears in the names: purity_images-512/...
    (caco/metrics.py).

    Args:
        images: number of test images, drawn by the seed; all if there are fewer.
        train_images: number of training images to compare rows with, drawn by the seed; all if there are fewer.
        rows: number of rows for purity/chance, drawn by the seed; all if there are fewer.
        when: "epoch" (during training and at its end) or "end".
    """

    on_all_ranks = True  # the rows of the bank are divided among the ranks
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
        """Draw the images.

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
        """Get the bank and the encoder of keys from the method.

        Raises:
            UserError: the method has no bank.
        """
        if getattr(method, "bank", None) is None:
            raise UserError("needs a bank, and this method has none; leave it out")
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
        """The class that each row of m_RD stands for, int64 [R]; k_ND are the training images' keys."""
        _, image_R1 = nearest(m_RD.cpu().float(), F.normalize(k_ND, dim=1), k=1)
        return self._labels["train"][image_R1[:, 0]]
