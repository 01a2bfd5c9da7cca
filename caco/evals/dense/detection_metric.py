"""Scores of detections: PASCAL VOC's 11-point average precision at ten IoU thresholds, and COCO's scores by
pycocotools.

Shapes: D detections, M true objects, K classes.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

THRESHOLDS = (50, 55, 60, 65, 70, 75, 80, 85, 90, 95)  # IoU thresholds in percent


class Boxes(NamedTuple):
    """Boxes in many images: the image of each box, int64 [n], its label, int64 [n], and its corners, [n, 4], with 0 at
    the image's edge."""

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray


def voc_scores(found: Boxes, score: np.ndarray, truth: Boxes, difficult: np.ndarray) -> dict[str, float]:
    """PASCAL VOC's scores in percent: `ap50`, `ap75`, and `ap`, the mean over ten thresholds. Each is a mean over the
    classes.

    They are computed as in detectron2's evaluation of VOC, whose numbers MoCo and later papers report, and not as in
    COCO. Detections are taken in the order of their scores, highest first. One is correct if the true object of its
    class with which it overlaps most overlaps by more than the threshold and was not found before. Detections of
    difficult objects count as neither correct nor wrong, and difficult objects need not be found. Boxes are in whole
    pixels, both edges included. Scores are rounded to 3 decimals and coordinates to 0.1, as in VOC's result files;
    equal scores keep their order.

    Args:
        found: the detections.
        score: float [D], the scores of the detections.
        truth: the true objects.
        difficult: bool [M], which true objects are marked difficult.
    Raises:
        ValueError: there is no true object that is not difficult.
    """
    score = np.round(np.asarray(score, dtype=np.float64), 3)
    published = np.round(np.asarray(found.box, dtype=np.float64) + [1, 1, 0, 0], 1)
    wanted = np.asarray(truth.box, dtype=np.float64) + [1, 1, 0, 0]
    classes = np.unique(truth.label[~difficult])
    if not len(classes):
        raise ValueError("average precision: expected at least one truth that is not difficult, got none")
    precisions = np.zeros((len(classes), len(THRESHOLDS)))
    for row, c in enumerate(classes):
        own, theirs = np.flatnonzero(found.label == c), np.flatnonzero(truth.label == c)
        own = own[np.argsort(-score[own], kind="stable")]
        overlap, best = best_truths(found.image[own], published[own], truth.image[theirs], wanted[theirs])
        is_difficult = difficult[theirs]
        for column, threshold in enumerate(THRESHOLDS):
            hit = np.flatnonzero(overlap > threshold / 100)
            right = np.zeros(len(own), dtype=bool)
            # Only the first detection of each object is correct.
            right[hit[np.unique(best[hit], return_index=True)[1]]] = True
            counts = np.ones(len(own), dtype=bool)
            counts[hit] = ~is_difficult[best[hit]]
            precisions[row, column] = eleven_points(right[counts], int((~is_difficult).sum()))
    means = 100 * precisions.mean(axis=0)
    return {"ap50": float(means[0]), "ap75": float(means[THRESHOLDS.index(75)]), "ap": float(means.mean())}


def best_truths(
    image_D: np.ndarray, box_D4: np.ndarray, truth_image_M: np.ndarray, truth_M4: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The largest overlap of each detection with a true object in its image, [D], and the index of that object, [D]; 0
    and -1 if its image has no object.
    """
    overlap, best = np.zeros(len(image_D)), np.full(len(image_D), -1)
    order = np.argsort(image_D, kind="stable")
    sorted_images = image_D[order]
    for image in np.unique(truth_image_M):
        own = order[np.searchsorted(sorted_images, image) : np.searchsorted(sorted_images, image, side="right")]
        theirs = np.flatnonzero(truth_image_M == image)
        if len(own):
            iou = pixel_iou(box_D4[own], truth_M4[theirs])
            overlap[own], best[own] = iou.max(axis=1), theirs[iou.argmax(axis=1)]
    return overlap, best


def pixel_iou(a_N4: np.ndarray, b_M4: np.ndarray) -> np.ndarray:
    """Intersection over union [N, M] of boxes in whole pixels, both edges included."""
    low = np.maximum(a_N4[:, None, :2], b_M4[None, :, :2])
    high = np.minimum(a_N4[:, None, 2:], b_M4[None, :, 2:])
    common = (high - low + 1).clip(0).prod(axis=2)
    area_N, area_M = ((box[:, 2:] - box[:, :2] + 1).prod(axis=1) for box in (a_N4, b_M4))
    return common / (area_N[:, None] + area_M[None] - common)


def eleven_points(right: np.ndarray, num_truths: int) -> float:
    """The mean, over the recalls 0, 0.1, ..., 1, of the best precision at this or a larger recall; 0 for recalls that
    are never reached.

    Args:
        right: bool [D], whether each detection is correct, in the order of their scores.
    """
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(hits) + 1)
    # Recalls are compared as integers, so that 3 of 10 objects are a recall of exactly 0.3.
    return float(sum(precision[10 * hits >= tenth * num_truths].max(initial=0.0) for tenth in range(11))) / 11


def coco_scores(
    truth: Path,
    rows: Iterable[dict[str, Any]],
    *,
    masks: bool,
    say: Callable[[str], None],
    images: list[int] | None = None,
) -> dict[str, float]:
    """COCO's scores in percent, by pycocotools: `box_ap`, `box_ap50`, `box_ap75`, `box_ap_small`, `box_ap_medium`,
    `box_ap_large`, and the same with `mask_`. A size class without true objects gives no score.

    Args:
        truth: the published annotation file.
        rows: detections as dictionaries: image_id, category_id, bbox (x, y, width, height), score, and for masks
            segmentation (run lengths).
        masks: whether masks are scored too.
        say: receives pycocotools' lines of scores.
        images: ids of the images to score; None scores all images of the annotation file.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rows = list(rows)
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    scores: dict[str, float] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        known = COCO(str(truth))
        for kind, prefix in (("bbox", "box"), ("segm", "mask"))[: 1 + masks]:
            if not rows:  # pycocotools cannot load an empty list
                scores |= {f"{prefix}_{name}": 0.0 for name in names[:3]}
                continue
            # If the rows had `bbox` too, pycocotools would take the areas of masks from the boxes.
            of_kind = [
                {k: v for k, v in row.items() if k != ("segmentation" if kind == "bbox" else "bbox")} for row in rows
            ]
            found = known.loadRes(json.loads(json.dumps(of_kind)))
            evaluation = COCOeval(known, found, kind)
            if images is not None:
                evaluation.params.imgIds = sorted(images)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores |= {
                f"{prefix}_{name}": 100 * float(v)
                for name, v in zip(names, evaluation.stats[:6], strict=True)
                if v > -1
            }
    for line in printed.getvalue().splitlines():
        if "Average" in line:  # not the lines about loading and finishing
            say(line.strip())
    return scores
