"""Images are resized and flipped together with their objects; masks are drawn for a region and put back into the
image.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from caco.evals.dense.boxes_and_masks import decoded, encoded, example_of, mask_targets, pasted, resized
from caco.evals.dense.detection_sets import Objects


def objects(boxes, labels=None, polygons=None) -> Objects:
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    labels = np.arange(len(boxes)) if labels is None else np.array(labels)
    return Objects(boxes, labels, np.zeros(len(boxes), dtype=bool), polygons)


@pytest.mark.parametrize(
    ("size", "short", "wanted"),
    [
        ((500, 375), 800, (1067, 800)),
        ((375, 500), 480, (480, 640)),
        ((1000, 300), 800, (1333, 400)),
        ((640, 480), 480, (640, 480)),
    ],
)
def test_the_shorter_side_is_as_asked_unless_the_longer_gets_too_long(size, short, wanted):
    assert resized(*size, short=short, longest=1333) == wanted


def test_boxes_follow_the_image_when_it_is_resized_and_flipped():
    """A bright rectangle is still where its box says, for all four combinations."""
    image = Image.new("RGB", (120, 80))
    ImageDraw.Draw(image).rectangle((10, 20, 39, 59), fill=(255, 255, 255))
    ring = np.array([[10, 20], [40, 20], [40, 60], [10, 60]], dtype=np.float32)
    for flip in (False, True):
        for short in (80, 160):
            example = example_of(
                image,
                objects([[10, 20, 40, 60]], [4], [[ring]]),
                short=short,
                longest=999,
                flip=flip,
                masks=True,
                seed=7,
            )
            x0, y0, x1, y1 = example.boxes[0].tolist()
            inside = np.zeros(example.image.shape[1:], dtype=bool)
            inside[int(y0) : int(y1), int(x0) : int(x1)] = True
            assert np.array_equal(example.image[0].numpy() > 127, inside)
            assert (example.labels.tolist(), example.seed, example.image.dtype) == ([5], 7, torch.uint8)
            (points,) = example.polygons[0]
            assert (points.min(axis=0).tolist(), points.max(axis=0).tolist()) == ([x0, y0], [x1, y1])


def test_objects_without_area_in_the_image_are_left_out_and_others_are_cut():
    example = example_of(
        Image.new("RGB", (100, 50)),
        objects([[90, 40, 130, 70], [100, 0, 120, 20], [5, 5, 5, 9]]),
        short=50,
        longest=200,
        flip=False,
        masks=False,
    )
    assert example.boxes.tolist() == [[90, 40, 100, 50]] and example.labels.tolist() == [1] and example.polygons is None
    none = example_of(Image.new("RGB", (100, 50)), objects([]), short=50, longest=200, flip=True, masks=False)
    assert none.boxes.shape == (0, 4) and none.labels.dtype == torch.int64


def test_a_region_sees_its_part_of_an_objects_mask():
    """A square from 0 to 10, seen by a region from 5 to 15, fills the left half of the grid; an object with two
    outlines has both drawn.
    """
    square = np.array([[0, 0], [10, 0], [10, 10], [0, 10]], dtype=np.float32)
    other = np.array([[12.5, 0], [15, 0], [15, 10], [12.5, 10]], dtype=np.float32)
    boxes = np.array([[5.0, 0, 15, 10], [5.0, 0, 15, 10], [0, 0, 10, 10]])
    halves, both, whole = mask_targets([[square], [square, other], [square]], boxes, 8)
    assert np.array_equal(halves, np.arange(8)[None].repeat(8, 0) < 4)
    assert np.array_equal(both, halves | (np.arange(8)[None].repeat(8, 0) >= 6))
    assert whole.all() and mask_targets([], np.zeros((0, 4)), 8).shape == (0, 8, 8)


def test_a_masks_probabilities_come_back_to_the_pixels_that_they_are_of():
    """Each cell covers 3 by 2 pixels: a pixel belongs to the object if its cell does, and no pixel outside the box
    does.
    """
    cells = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    mask = pasted(cells, torch.tensor([10.0, 20.0, 22.0, 28.0]), 40, 30)
    wanted = np.zeros((30, 40), dtype=bool)
    wanted[20:24, 10:16] = True
    assert np.array_equal(mask, wanted)
    beyond = pasted(torch.ones(4, 4), torch.tensor([-5.0, -100.0, 5.0, 110.0]), 10, 10)
    assert np.array_equal(beyond, np.arange(10)[None].repeat(10, 0) < 5)
    assert not pasted(torch.ones(4, 4), torch.tensor([50.0, 0.0, 60.0, 5.0]), 10, 10).any()


def test_a_mask_drawn_and_put_back_is_the_shape_it_was():
    triangle = np.array([[30, 10], [60, 70], [5, 60]], dtype=np.float32)
    box = np.array([5.0, 10.0, 60.0, 70.0])
    (target,) = mask_targets([[triangle]], box[None], 28)
    back = pasted(torch.from_numpy(target).float(), torch.from_numpy(box), 80, 80)
    image = Image.new("1", (80, 80))
    ImageDraw.Draw(image).polygon([tuple(point) for point in triangle.tolist()], fill=1)
    drawn = np.array(image)
    assert (back & drawn).sum() / (back | drawn).sum() > 0.93


def test_run_lengths_are_those_that_pycocotools_reads():
    mask = np.random.default_rng(0).random((17, 23)) < 0.4
    found = encoded(mask)
    assert isinstance(found["counts"], str) and found["size"] == [17, 23]
    assert np.array_equal(decoded(found), mask)
