"""Scores of a segmentation, all computed from one confusion matrix over all pixels of all test images.

Shapes: K classes.
"""

import torch
from torch import Tensor

from caco.evals.dense.segmentation_sets import IGNORED


def confusion(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """The confusion matrix, int64 [K, K]: the number of pixels of class (row) that were predicted as class (column).
    Pixels labelled 255 are left out.

    Args:
        truth, predicted: integers, both of the same shape and on the same device.
    """
    counts = truth != IGNORED
    cell = truth[counts].long() * num_classes + predicted[counts].long()
    return torch.bincount(cell, minlength=num_classes**2).view(num_classes, num_classes)


def scores(matrix_KK: Tensor) -> dict[str, float]:
    """The scores, in percent: `miou`, the mean over classes of intersection over union; `mean_accuracy`, the mean over
    classes of the share of the class's pixels that were found; `pixel_accuracy`, the share of all pixels.

    A class without any pixel in truth and prediction is left out of the means. The real set has pixels of all 21
    classes.

    Raises:
        ValueError: there is no labelled pixel.
    """
    matrix_KK = matrix_KK.double().cpu()
    right, true, predicted = matrix_KK.diagonal(), matrix_KK.sum(dim=1), matrix_KK.sum(dim=0)
    union = true + predicted - right
    if not matrix_KK.sum() > 0:
        raise ValueError("mIoU: expected labelled pixels, got none")
    return {
        "miou": 100 * (right / union)[union > 0].mean().item(),
        "mean_accuracy": 100 * (right / true)[true > 0].mean().item(),
        "pixel_accuracy": 100 * (right.sum() / true.sum()).item(),
    }
