"""Weighted k-nearest-neighbour accuracy of frozen features; the search is exact and its memory bounded.

Shapes: Q queries, N rows of the feature bank, D feature width, C classes, k neighbours.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caco import distributed, metrics
from caco.data.sets.sources import Source
from caco.errors import UserError
from caco.evals.base import Evaluator
from caco.evals.extraction import full_float32
from caco.evals.features import FeatureStore
from caco.ranges import AboveZero, Count, ShareAboveZero, held

_LAST_INDEX = 2**32 - 1


def _ordered_keys(sim_QN: Tensor, first_index: int) -> Tensor:
    """An int64 for each pair whose order is that of similarity, and then of the smaller index; so equal similarities
    are ranked deterministically.

    The bits of float32 numbers have the order of integers once those of negative numbers are inverted.
    """
    bits = (sim_QN + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    bits = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    index_N = torch.arange(first_index, first_index + sim_QN.shape[1], device=sim_QN.device)
    return bits.long() * 2**32 + (_LAST_INDEX - index_N)


def _read_keys(key_Qk: Tensor) -> tuple[Tensor, Tensor]:
    """The similarities float32 and indices int64 in keys from `_ordered_keys`."""
    bits = (key_Qk >> 32).int()
    sim = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).view(torch.float32)
    return sim, _LAST_INDEX - (key_Qk & _LAST_INDEX)


@full_float32()
def nearest(
    query_QD: Tensor, bank_ND: Tensor, *, k: int, block: int = 2048, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Find the k rows of the bank that are most similar to each query by cosine, most similar first, ties by the
    smaller index.

    On `device` it holds block x (block + k) similarities and keys, twice block x D features, and Q x k keys at a time.

    Returns:
        similarities [Q, k] float32 and bank indices [Q, k] int64, on the CPU.
    Raises:
        ValueError: k is not in [1, N], the widths differ, or block < 1.
    """
    if query_QD.ndim != 2 or bank_ND.ndim != 2 or query_QD.shape[1] != bank_ND.shape[1]:
        raise ValueError(f"expected [Q, D] and [N, D], got {list(query_QD.shape)} and {list(bank_ND.shape)}")
    if not 1 <= k <= len(bank_ND):
        raise ValueError(f"k: expected 1 to {len(bank_ND)}, the size of the feature bank, got {k}")
    if block < 1:
        raise ValueError(f"block: expected at least 1, got {block}")
    # The bank may be mapped from a file larger than memory, so it is read only once; the queries are read again for
    # each of its blocks.
    best = [torch.empty(len(query), 0, dtype=torch.int64, device=device) for query in query_QD.split(block)]
    for first in range(0, len(bank_ND), block):
        rows = F.normalize(bank_ND[first : first + block].to(device, torch.float32), dim=1)
        for part, query in enumerate(query_QD.split(block)):
            query = F.normalize(query.to(device, torch.float32), dim=1)
            candidates = torch.cat([best[part], _ordered_keys(query @ rows.T, first)], dim=1)
            best[part] = candidates.topk(min(k, candidates.shape[1]), dim=1).values
    sim_Qk, index_Qk = _read_keys(torch.cat(best))
    return sim_Qk.cpu(), index_Qk.cpu()


def knn_votes(sim_Qk: Tensor, label_Qk: Tensor, *, temperature: float, num_classes: int) -> Tensor:
    """Votes [Q, C] float64: each neighbour gives its class exp(sim / temperature), up to a common factor for each
    query.

    The factor, exp(-largest sim / temperature), prevents overflow at small temperatures and changes no winner.

    Source: Wu et al. 2018 (arXiv 1805.01978), Section 3.4; CaCo's and MoCo's monitors during training use it too.
    """
    sim_Qk = sim_Qk.double()
    weight_Qk = ((sim_Qk - sim_Qk.amax(dim=1, keepdim=True)) / temperature).exp()
    return weight_Qk.new_zeros(len(sim_Qk), num_classes).scatter_add_(1, label_Qk, weight_Qk)


def knn_predict(
    query_QD: Tensor,
    bank_ND: Tensor,
    label_N: Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
    block: int = 2048,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The class [Q] with the most votes among each query's k nearest bank rows; of equal votes the smaller class
    number."""
    sim_Qk, index_Qk = nearest(query_QD, bank_ND, k=k, block=block, device=device)
    return knn_votes(sim_Qk, label_N[index_Qk], temperature=temperature, num_classes=num_classes).argmax(dim=1)


def balanced_share(labels: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a random share of each class, at least one image of each; a fraction of 1 takes all."""
    chosen = []
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        size = max(1, round(fraction * len(members)))
        # Each class has its own random stream, so that adding a class does not change the shares of others.
        chosen.append(np.random.default_rng([seed, c]).permutation(members)[:size])
    return np.sort(np.concatenate(chosen))


def first_share(source: Source, labels: np.ndarray, *, fraction: float) -> np.ndarray:
    """Sorted indices of the first int(fraction * n) of each class's n images, but at least one. If the images are
    files, they are ordered by folder and then by name; otherwise they are in the order of the set (`caco.write` keeps
    the order of the files that it reads).

    Source: CaCo's published code, data_processing/imagenet.py: the images of its k-NN monitor. That code takes no image
    from a class of four at a fraction of 20 %.
    """
    are_files = len(source) > 0 and source.path(0) is not None
    chosen = []
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        # One class at a time, because the names of all of ImageNet's images would take a third of a gigabyte.
        if are_files:
            members = np.array(sorted(members.tolist(), key=lambda index: _folder_and_name(source, index)))
        chosen.append(members[: max(1, int(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))


def _folder_and_name(source: Source, index: int) -> tuple[str, str]:
    path = source.path(index)
    assert path is not None, "a set has files for all of its images or for none"
    return str(path.parent), path.name


class KNN(Evaluator):
    """k-NN top-1 accuracy on the test set, percent, with the training set or a share of it as the feature bank:
    `knn20_top1`, `knn20_20pct_top1`, ... (caco/metrics.py).

    Args:
        k: number of neighbours that vote.
        temperature: a neighbour's weight is exp(cosine / temperature).
        fraction: share of each training class that forms the bank.
        choice: which images form this share: "random" draws them once by the seed; "first" takes the first ones by file
            name, rounded down to whole images, as in the published code.
        block: number of queries and of bank rows compared at a time; it bounds memory.
        when: "epoch" (during training and at its end) or "end".
    """

    on_all_ranks = True  # the ranks share the reading of images
    needs_labels = True
    bounded = {"k": "fraction"}

    @held
    def __init__(
        self,
        *,
        k: Count = 20,
        temperature: AboveZero = 0.2,
        fraction: ShareAboveZero = 1.0,
        choice: Literal["random", "first"] = "random",
        block: Count = 2048,
        when: Literal["epoch", "end"] = "epoch",
    ) -> None:
        self.k, self.temperature, self.fraction, self.choice, self.block, self.when = (
            k,
            temperature,
            fraction,
            choice,
            block,
            when,
        )
        self.protocol = metrics.knn(k=k, temperature=temperature, fraction=fraction, choice=choice)

    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Choose the images of the bank.

        Raises:
            UserError: there are no labels, or fewer images in the bank than k.
        """
        labels, test_labels = store.labels("k-NN")
        self._store = store
        if self.choice == "random":
            self._bank = balanced_share(labels, fraction=self.fraction, seed=seed)
        else:
            train, _ = store.splits.labelled("k-NN")
            self._bank = first_share(train, labels, fraction=self.fraction)
        if len(self._bank) < self.k:
            raise UserError(f"k: expected at most {len(self._bank)}, the images in the feature bank, got {self.k}")
        self._bank_labels = torch.from_numpy(labels[self._bank])
        self._test_labels = torch.from_numpy(test_labels)
        self._num_classes = int(labels.max()) + 1

    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (`<protocol>_top1`, percent)."""
        predicted = self.predicted(backbone)
        if predicted is not None:
            yield f"{self.protocol}_top1", 100 * (predicted == self._test_labels).double().mean().item()

    def predicted(self, backbone: nn.Module) -> Tensor | None:
        """The class that the neighbours of each test image vote for; on ranks but the first None."""
        bank_ND = self._store.features(backbone, "train", self._bank)
        test_QD = self._store.features(backbone, "test")
        if not distributed.is_main():
            return None
        return knn_predict(
            test_QD,
            bank_ND,
            self._bank_labels,
            k=self.k,
            temperature=self.temperature,
            num_classes=self._num_classes,
            block=self.block,
            device=self._store.device,
        )
