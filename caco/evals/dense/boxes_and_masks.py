"""Converts annotated images into a detector's inputs, and a detector's outputs into boxes and masks of the whole image.

Resizing, scaling of boxes and drawing of masks follow detectron2: Pillow resizes the image, polygons are drawn at the
resolution of the mask's own grid, and a predicted mask is mapped back to pixels by bilinear interpolation between the
centres of its cells.

Shapes: H, W pixels of an image; n objects; M cells along a mask's side.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from caco.evals.dense.detection_sets import Objects


@dataclass
class Example:
    """An image as a detector receives it, and its objects in the pixels of this image.

    Attributes:
        image: uint8 [3, H, W].
        boxes: float32 [n, 4], all with a positive area.
        labels: int64 [n], from 1 on; 0 is the background.
        polygons: the rings [points, 2] of each object; None if no masks are learned.
        seed: seed for the draws of anchors and regions.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    polygons: list[list[np.ndarray]] | None
    seed: int = 0


def resized(width: int, height: int, *, short: int, longest: int) -> tuple[int, int]:
    """The (width, height) at which the shorter side has `short` pixels, or less if the longer side would otherwise
    exceed `longest`."""
    scale = min(short / min(width, height), longest / max(width, height))
    return int(width * scale + 0.5), int(height * scale + 0.5)


def example_of(
    image: Image.Image, objects: Objects, *, short: int, longest: int, flip: bool, masks: bool, seed: int = 0
) -> Example:
    """Resize an image and its objects, and flip them if asked. Objects that then have no area inside the image are left
    out."""
    width, height = resized(*image.size, short=short, longest=longest)
    scale = np.array([width / image.width, height / image.height], dtype=np.float32)
    # Two calls, first across, then down: from version 13 on Pillow swaps the two passes for some shapes, which changes
    # the rounding.
    across = image.resize((width, image.height), Image.Resampling.BILINEAR)
    pixels = np.asarray(across.resize((width, height), Image.Resampling.BILINEAR))
    boxes = objects.boxes * np.tile(scale, 2)
    if flip:
        pixels = pixels[:, ::-1]
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    boxes = boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))
    usable = ((boxes[:, 2:] - boxes[:, :2]) > 1e-5).all(axis=1)
    polygons = None
    if masks:
        assert objects.polygons is not None, "a set that has masks"
        polygons = [[_moved(ring * scale, width, flip) for ring in objects.polygons[i]] for i in np.flatnonzero(usable)]
    return Example(
        image=torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
        boxes=torch.from_numpy(boxes[usable].astype(np.float32)),
        labels=torch.from_numpy(objects.labels[usable] + 1),
        polygons=polygons,
        seed=seed,
    )


def _moved(ring: np.ndarray, width: int, flip: bool) -> np.ndarray:
    return np.stack([width - ring[:, 0], ring[:, 1]], axis=1) if flip else ring


def mask_targets(polygons: Sequence[list[np.ndarray]], boxes: np.ndarray, size: int) -> np.ndarray:
    """Each object's polygons as the mask inside its region, a box [x0, y0, x1, y1]: bool [n, size, size]."""
    from pycocotools import mask as rle

    targets = np.zeros((len(boxes), size, size), dtype=bool)
    for target, rings, (x0, y0, x1, y1) in zip(targets, polygons, boxes.astype(np.float64), strict=True):
        cells = size / np.maximum([x1 - x0, y1 - y0], 0.1)
        inside = [((ring - [x0, y0]) * cells).reshape(-1).tolist() for ring in rings]
        target[:] = decoded(rle.merge(rle.frPyObjects(inside, size, size)))
    return targets


def decoded(run_lengths: dict) -> np.ndarray:
    """Decode COCO's run lengths into a bool mask [H, W]."""
    from pycocotools import mask as rle

    with warnings.catch_warnings():
        # pycocotools 2.0.11 passes NumPy 2 an array in a deprecated way.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return rle.decode(run_lengths).astype(bool)


def pasted(mask: Tensor, box: Tensor, width: int, height: int) -> np.ndarray:
    """Map a mask of probabilities [M, M] over its box to the image: bool [height, width], True where the probability is
    at least one half.
    """
    x0, y0, x1, y1 = box.double().tolist()
    left, top = max(int(x0) - 1, 0), max(int(y0) - 1, 0)
    right, bottom = min(int(x1) + 2, width), min(int(y1) + 2, height)
    out = np.zeros((height, width), dtype=bool)
    if right <= left or bottom <= top or x1 <= x0 or y1 <= y0:
        return out
    # The centres of pixels on a scale on which the box reaches from -1 to 1.
    x = (torch.arange(left, right, dtype=torch.float64) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(top, bottom, dtype=torch.float64) + 0.5 - y0) / (y1 - y0) * 2 - 1
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    grid = torch.stack([columns, rows], dim=-1)[None]
    cut = F.grid_sample(mask.double().cpu()[None, None], grid, mode="bilinear", align_corners=False)
    out[top:bottom, left:right] = (cut[0, 0] >= 0.5).numpy()
    return out


def encoded(mask: np.ndarray) -> dict:
    """Encode a bool mask [H, W] as COCO's run lengths, as text that JSON can hold."""
    from pycocotools import mask as rle

    found = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in found["size"]], "counts": found["counts"].decode("ascii")}
