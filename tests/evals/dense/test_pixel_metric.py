"""mIoU and related metrics, computed by hand and compared with scikit-learn's confusion matrix."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from caco.evals.dense.pixel_metric import confusion, scores


def test_an_image_of_six_pixels_by_hand():
    """The labels are 0 0 1 / 1 255 2 and the predictions 0 1 1 / 1 0 0; the fifth pixel does not count."""
    truth, found = torch.tensor([[0, 0, 1], [1, 255, 2]], dtype=torch.uint8), torch.tensor([[0, 1, 1], [1, 0, 0]])
    matrix = confusion(truth, found, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    # The IoU of class 0 is one of three, of class 1 two of three, of class 2 zero; class 3 does not occur.
    assert scores(matrix) == pytest.approx(
        {"miou": 100 * (1 / 3 + 2 / 3 + 0) / 3, "mean_accuracy": 100 * (1 / 2 + 1 + 0) / 3, "pixel_accuracy": 60.0}
    )


def test_a_class_that_is_predicted_and_never_there_costs():
    matrix = confusion(torch.zeros(4, dtype=torch.uint8), torch.tensor([0, 0, 0, 1]), 2)
    assert scores(matrix) == pytest.approx(
        {"miou": 100 * (3 / 4 + 0) / 2, "mean_accuracy": 75.0, "pixel_accuracy": 75.0}
    )


def test_the_mean_is_of_classes_over_all_images_and_not_of_images():
    small, large = (torch.full((n,), 1, dtype=torch.uint8) for n in (10, 1000))
    together = confusion(small, torch.zeros(10, dtype=torch.int64), 2) + confusion(
        large, torch.ones(1000, dtype=torch.int64), 2
    )
    assert scores(together)["miou"] == pytest.approx(100 * (1000 / 1010 + 0) / 2)


def test_as_scikit_learn_has_it():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 21, 5000), rng.integers(0, 21, 5000)
    truth[rng.random(5000) < 0.1] = 255
    matrix = confusion(torch.from_numpy(truth), torch.from_numpy(found), 21)
    counts = truth != 255
    assert np.array_equal(matrix.numpy(), confusion_matrix(truth[counts], found[counts]))
    assert scores(matrix)["miou"] == pytest.approx(100 * jaccard_score(truth[counts], found[counts], average="macro"))


def test_without_a_labelled_pixel_there_is_no_score():
    with pytest.raises(ValueError, match="expected labelled pixels, got none"):
        scores(confusion(torch.full((3,), 255), torch.zeros(3), 2))
