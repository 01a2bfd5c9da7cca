"""Detections as rows of plain values: made from a detector's outputs, gathered from all ranks, converted for COCO."""

import json
from typing import Any

import numpy as np
import torch
from torch import nn

from caco import distributed
from caco.evals.dense.boxes_and_masks import encoded, pasted
from caco.evals.dense.detector import Detection


def rows_of(index: int, found: Detection, seen: tuple[int, int], size: tuple[int, int]) -> list[dict[str, Any]]:
    """A row of plain values for each detection of one image: image, label, score, box in the image's own pixels, and
    the mask as run lengths.

    Args:
        index: the image's number.
        seen: (width, height) of the resized image that the detector received.
        size: (width, height) of the image itself.
    """
    scale = torch.tensor([size[0] / seen[0], size[1] / seen[1]] * 2, dtype=torch.float64)
    boxes = (found.boxes.double().cpu() * scale).clamp(min=0).minimum(torch.tensor(size * 2, dtype=torch.float64))
    rows = []
    for i, box in enumerate(boxes):
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        row = {"image": index, "label": int(found.labels[i]), "score": float(found.scores[i]), "box": box.tolist()}
        if found.masks is not None:
            row["mask"] = encoded(pasted(found.masks[i], box, *size))
        rows.append(row)
    return rows


def coco_row(row: dict[str, Any], image_ids: np.ndarray, category_ids: np.ndarray) -> dict[str, Any]:
    """A row in the format of COCO's results."""
    x0, y0, x1, y1 = row["box"]
    of_mask = {"segmentation": row["mask"]} if "mask" in row else {}
    ids = {"image_id": int(image_ids[row["image"]]), "category_id": int(category_ids[row["label"]])}
    return {**ids, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": row["score"], **of_mask}


def on_main(rows: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """The rows of all ranks on rank 0, in the order of the ranks; the other ranks keep their own rows."""
    if distributed.world() == 1:
        return rows
    text = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8).to(device)
    lengths = distributed.gather(torch.tensor([len(text)], device=device)).tolist()
    padded = nn.functional.pad(text, (0, max(lengths) - len(text)))
    every = distributed.gather_on_main(padded)
    if not distributed.is_main():
        return rows
    parts = every.cpu().split(max(lengths))
    return [
        row for part, length in zip(parts, lengths, strict=True) for row in json.loads(part[:length].numpy().tobytes())
    ]
