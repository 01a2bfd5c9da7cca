"""k-NN predicts exactly as defined, for any block size, and its bank is a balanced share drawn with a seed."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from caco.data.sets.image_files import ImageFiles
from caco.data.sets.memory import ImagesInMemory
from caco.evals.knn import (
    KNN,
    _ordered_keys,
    _read_keys,
    balanced_share,
    first_share,
    knn_predict,
    knn_votes,
    nearest,
)


def brute_force(query, bank, labels, *, k, temperature, num_classes):
    """The definition in float64, by loops. Neighbours are ordered by cosine, then by smaller index; classes by votes,
    then by smaller class.
    """
    predicted = []
    for q in query.double():
        sims = [float(q @ m / (q.norm() * m.norm())) for m in bank.double()]
        neighbours = sorted(range(len(sims)), key=lambda j: (-sims[j], j))[:k]
        votes = [
            math.fsum(math.exp(sims[j] / temperature) for j in neighbours if labels[j] == c) for c in range(num_classes)
        ]
        predicted.append(votes.index(max(votes)))
    return torch.tensor(predicted)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 5, 150])  # 150 is the whole bank
def test_predictions_equal_a_float64_brute_force_in_blocks_of_any_size(k, block):
    torch.manual_seed(0)
    centres = torch.randn(4, 16)
    labels = torch.randint(4, (150,))
    bank = centres[labels] + 2 * torch.randn(150, 16)
    query = centres[torch.randint(4, (61,))] + 2 * torch.randn(61, 16)
    expected = brute_force(query, bank, labels, k=k, temperature=0.2, num_classes=4)
    got = knn_predict(query, bank, labels, k=k, temperature=0.2, num_classes=4, block=block)
    assert torch.equal(got, expected)
    assert len(expected.unique()) == 4


@pytest.mark.parametrize("block", [1, 3, 5, 64])
def test_ties_go_to_the_smaller_index_and_class(block):
    # The corners of a cube in 4 dimensions: after normalisation every coordinate is 0.5 or -0.5, and every cosine is a
    # multiple of 0.5, which float32 represents exactly. So most neighbours and many votes are equal.
    torch.manual_seed(1)
    bank, query = torch.randint(2, (40, 4)) * 2.0 - 1, torch.randint(2, (30, 4)) * 2.0 - 1
    labels = torch.randint(5, (40,))
    _, indices = nearest(query, bank, k=9, block=block)
    sims = query.long() @ bank.long().T
    for q, row in enumerate(indices.tolist()):
        assert row == sorted(range(40), key=lambda j: (-sims[q, j].item(), j))[:9]
    expected = brute_force(query, bank, labels, k=9, temperature=0.5, num_classes=5)
    got = knn_predict(query, bank, labels, k=9, temperature=0.5, num_classes=5, block=block)
    assert torch.equal(got, expected)


def test_neighbours_of_opposite_and_orthogonal_rows_are_ordered():
    bank = torch.tensor([[-1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [1.0, 0.0], [0.5, -0.5], [-3.0, 4.0]])
    sims, indices = nearest(torch.tensor([[2.0, 0.0]]), bank, k=6, block=2)
    assert indices.tolist() == [[3, 4, 1, 2, 5, 0]]
    torch.testing.assert_close(sims, torch.tensor([[1.0, 0.5**0.5, 0.0, 0.0, -0.6, -1.0]]))


def test_keys_rank_by_value_then_smaller_index_and_read_back():
    sims = torch.tensor([[-0.0, -0.25, 1.0, 0.0, -1.0, 0.25, -0.25, 1e-30]])
    read, indices = _read_keys(_ordered_keys(sims, 2**31).sort(dim=1, descending=True).values)
    assert (indices - 2**31).tolist() == [[2, 5, 7, 0, 3, 1, 6, 4]]
    assert torch.equal(read, sims[:, indices[0] - 2**31])


def test_votes_are_exp_of_similarity_over_temperature():
    votes = knn_votes(torch.tensor([[0.9, 0.5, 0.4]]), torch.tensor([[2, 0, 0]]), temperature=0.2, num_classes=4)
    expected = torch.tensor([[math.exp(2.5) + math.exp(2.0), 0, math.exp(4.5), 0]], dtype=torch.float64) / math.exp(4.5)
    torch.testing.assert_close(votes, expected, rtol=1e-6, atol=0)


def test_a_class_smaller_than_k_still_wins_by_weight():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.05, 1.0], [-0.05, 1.0]])
    labels = torch.tensor([1, 0, 0, 0])
    query = torch.tensor([[1.0, 0.1]])
    for temperature, winner in ((0.1, 1), (10.0, 0)):
        assert knn_predict(query, bank, labels, k=4, temperature=temperature, num_classes=2).item() == winner


def test_tiny_temperatures_stay_finite():
    votes = knn_votes(torch.tensor([[0.9, 0.8]]), torch.tensor([[1, 0]]), temperature=1e-3, num_classes=2)
    assert torch.isfinite(votes).all()
    assert votes.argmax().item() == 1


def test_agrees_with_lightly_where_nothing_ties():
    from lightly.utils.benchmarking import knn_predict as lightly_predict

    torch.manual_seed(2)
    labels = torch.randint(7, (300,))
    bank, query = torch.randn(300, 32), torch.randn(200, 32)
    unit = F.normalize(bank, dim=1)
    expected = lightly_predict(F.normalize(query, dim=1), unit.T, labels, num_classes=7, knn_k=20, knn_t=0.1)[:, 0]
    got = knn_predict(query, bank, labels, k=20, temperature=0.1, num_classes=7, block=37)
    assert torch.equal(got, expected)


def test_training_with_reduced_matmul_precision_changes_no_similarity():
    torch.manual_seed(3)
    bank, query = torch.randn(50, 64), torch.randn(20, 64)
    expected, _ = nearest(query, bank, k=5)
    torch.set_float32_matmul_precision("medium")
    try:
        got, _ = nearest(query, bank, k=5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(got, expected)


def test_share_is_balanced_seeded_and_sorted():
    labels = np.repeat([0, 1, 2], [100, 50, 2])[np.random.default_rng(0).permutation(152)]
    chosen = balanced_share(labels, fraction=0.2, seed=5)
    assert np.bincount(labels[chosen]).tolist() == [20, 10, 1]
    assert np.array_equal(chosen, np.unique(chosen))
    assert np.array_equal(chosen, balanced_share(labels, fraction=0.2, seed=5))
    assert not np.array_equal(chosen, balanced_share(labels, fraction=0.2, seed=6))
    assert np.array_equal(balanced_share(labels, fraction=1.0, seed=5), np.arange(152))


def test_the_first_of_each_class_are_as_many_as_int_says():
    labels = np.repeat([0, 1, 2], [14, 5, 3])
    # there are no file names, so the order counts
    source = ImagesInMemory(np.zeros((22, 2, 2, 3), np.uint8), name="it")
    # int(0.2 * 14) = 2, although rounding gives 3; int(0.2 * 5) = 1; and a class of three still gets one.
    assert first_share(source, labels, fraction=0.2).tolist() == [0, 1, 14, 19]
    assert len(balanced_share(labels, fraction=0.2, seed=0)) == 3 + 1 + 1
    assert np.array_equal(first_share(source, labels, fraction=1.0), np.arange(22))


def test_the_first_images_of_a_class_are_those_of_the_first_names(tmp_path):
    """The order of the set and the folders within a class do not matter."""
    files = [
        "b/10.png",
        "b/9.png",
        "b/1.png",
        "a/z.png",
        "a/y/x.png",
        "a/c.png",
        "a/b.png",
        "b/2.png",
        "a/y/a.png",
        "b/3.png",
    ]
    labels = np.array([file.startswith("b/") for file in files], int)
    chosen = first_share(ImageFiles(tmp_path, files, name="it", labels=labels), labels, fraction=0.6)
    assert sorted(files[i] for i in chosen) == ["a/b.png", "a/c.png", "a/z.png", "b/1.png", "b/10.png", "b/2.png"]


def test_k_nn_among_the_first_is_by_another_name(colours, store_of):
    drawn, first = (KNN(k=3, fraction=0.5, choice=choice) for choice in ("random", "first"))
    for one in (drawn, first):
        one.build(store_of(), seed=0)
    assert first._bank.tolist() == list(range(30)), (
        "the labels are 0, 1, 2, 0, ..., so these are the first ten of each class"
    )
    assert drawn._bank.tolist() != first._bank.tolist()
    assert [*dict(first.run(colours))] == ["knn3_50pct_first_top1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"choice": "last"}, r"choice: expected random \| first, got 'last'"),
        ({"k": 0}, "k: expected int from 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected float above 0, got 0.0"),
        ({"fraction": 1.5}, r"fraction: expected float above 0 up to 1, got 1\.5"),
        ({"when": "often"}, r"when: expected epoch \| end, got 'often'"),
    ],
)
def test_refuses_settings_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        KNN(**arguments)


def test_refuses_more_neighbours_than_rows():
    with pytest.raises(ValueError, match="k: expected 1 to 3, .* got 4"):
        nearest(torch.randn(2, 8), torch.randn(3, 8), k=4)


def test_refuses_widths_that_differ():
    with pytest.raises(ValueError, match=r"got \[2, 8\] and \[3, 9\]"):
        nearest(torch.randn(2, 8), torch.randn(3, 9), k=1)
