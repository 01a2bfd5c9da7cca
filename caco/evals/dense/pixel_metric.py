"""How well pixels are classified: everything from one confusion matrix over all pixels of all test images.

Shapes: K classes.
"""

import torch
from torch import Tensor

from caco.evals.dense.segmentation_sets import IGNORED


def confusion(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """int64 [K, K]: how many pixels of class (row) were taken for class (column); pixels labelled 255 are left out.

    Args:
        truth, predicted: integers of any one shape, on one device.
    """
    counts = truth != IGNORED
    cell = truth[counts].long() * num_classes + predicted[counts].long()
    return torch.bincount(cell, minlength=num_classes**2).view(num_classes, num_classes)


def scores(matrix_KK: Tensor) -> dict[str, float]:
    """`miou`, the mean over the classes of intersection over union; `mean_accuracy`, of the share of a class's pixels
    that were found; `pixel_accuracy`, the share of all pixels; in percent.

    A class of which there is no pixel and which is nowhere predicted is left out of the mean. Of the real set all 21
    are there.

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
