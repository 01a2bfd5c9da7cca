"""VOC's 11-point average precision at ten IoU thresholds, computed by hand, and COCO's, compared with pycocotools."""

import json

import numpy as np
import pytest

from caco.evals.dense.detection_metric import Boxes, coco_scores, eleven_points, pixel_iou, voc_scores

HERE = [0.0, 0.0, 10.0, 10.0]  # ten by ten pixels: 1 to 10 in the published format, which includes the last pixel
FAR = [50.0, 50.0, 60.0, 60.0]


def voc(found, truth, num_difficult=0):
    """The scores of detections (image, label, score, box) for true objects (image, label, box), of which the last
    `num_difficult` are difficult.
    """
    difficult = np.arange(len(truth)) >= len(truth) - num_difficult
    boxes = Boxes(
        *(np.array([row[i] for row in found]) for i in (0, 1)), np.array([row[3] for row in found]).reshape(-1, 4)
    )
    wanted = Boxes(*(np.array([row[i] for row in truth]) for i in (0, 1)), np.array([row[2] for row in truth]))
    return voc_scores(boxes, np.array([row[2] for row in found]), wanted, difficult)


def test_a_perfect_class_has_100_at_every_threshold():
    truth = [(0, 3, HERE), (1, 3, FAR), (1, 5, HERE)]
    found = [(image, label, 0.9 - 0.1 * i, box) for i, (image, label, box) in enumerate(truth)]
    assert voc(found, truth) == {"ap50": 100.0, "ap75": 100.0, "ap": 100.0}


def test_two_truths_of_which_the_second_detection_finds_one():
    """The first detection is wrong and the second right, so the precision is 0 at recall 0 and 1/2 at recall 1/2. The
    best precision at the six recalls 0 to 0.5 of eleven is 1/2: 3/11.
    """
    scores = voc([(0, 0, 0.9, FAR), (0, 0, 0.8, HERE)], [(0, 0, HERE), (1, 0, HERE)])
    assert scores["ap50"] == pytest.approx(100 * 3 / 11)


def test_eleven_points_of_ten_truths_count_a_recall_of_three_tenths_as_reached():
    assert eleven_points(np.array([True] * 3), 10) == pytest.approx(4 / 11)
    assert eleven_points(np.zeros(0, dtype=bool), 2) == 0


def test_a_second_detection_of_a_truth_is_wrong_and_the_surer_one_counts():
    truth = [(0, 0, HERE), (1, 0, HERE)]
    found = [(0, 0, 0.5, HERE), (0, 0, 0.9, HERE), (1, 0, 0.4, HERE)]
    # The detections are right, wrong, right: precision 1 up to recall 1/2, then 2/3, so (6 + 5 * 2 / 3) / 11.
    assert voc(found, truth)["ap50"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)


def test_detections_of_a_difficult_truth_count_as_nothing_however_many():
    truth = [(0, 0, HERE), (0, 0, FAR)]
    found = [(0, 0, 0.9, FAR), (0, 0, 0.8, FAR), (0, 0, 0.7, HERE)]
    assert voc(found, truth, num_difficult=1)["ap50"] == 100
    assert voc(found, truth)["ap50"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11), (
        "if the object is not marked difficult, its second detection is wrong"
    )


def test_a_class_whose_truths_are_all_difficult_does_not_count_and_none_at_all_is_refused():
    truth = [(0, 0, HERE), (0, 1, FAR)]
    assert voc([(0, 0, 0.9, HERE)], truth, num_difficult=1)["ap50"] == 100
    with pytest.raises(ValueError, match="at least one truth that is not difficult"):
        voc([(0, 0, 0.9, HERE)], [(0, 0, HERE)], num_difficult=1)


def test_of_equal_scores_the_first_given_stands_first_and_scores_are_compared_to_three_decimals():
    truth = [(0, 0, HERE)]
    assert voc([(0, 0, 0.70004, FAR), (0, 0, 0.70031, HERE)], truth)["ap50"] == pytest.approx(50)
    assert voc([(0, 0, 0.7, HERE), (0, 0, 0.7, FAR)], truth)["ap50"] == 100


def test_boxes_count_pixels_and_an_overlap_must_be_more_than_the_threshold():
    """The edges 0 to 10 and 0 to 5 are the pixels 1 to 10 and 1 to 5. The overlap is 5 of 10 columns, exactly one half,
    which is not more than the threshold 0.5.
    """
    truth = [(0, 0, HERE)]
    assert pixel_iou(np.array([[1.0, 1, 5, 10]]), np.array([[1.0, 1, 10, 10]])).tolist() == [[0.5]]
    assert voc([(0, 0, 0.9, [0.0, 0.0, 5.0, 10.0])], truth)["ap50"] == 0
    assert voc([(0, 0, 0.9, [0.0, 0.0, 6.0, 10.0])], truth) == {
        "ap50": 100.0,
        "ap75": 0.0,
        "ap": pytest.approx(100 * 2 / 10),
    }


def test_the_ten_thresholds_are_those_from_50_to_95():
    """A detection with IoU 0.9 is right at the thresholds 50, 55, ..., 85, and wrong at 90 and 95."""
    assert voc([(0, 0, 0.9, [0.0, 0.0, 9.0, 10.0])], [(0, 0, HERE)])["ap"] == pytest.approx(100 * 8 / 10)


def test_a_truth_of_another_image_or_class_is_not_found():
    assert voc([(1, 0, 0.9, HERE), (0, 1, 0.8, HERE)], [(0, 0, HERE)])["ap50"] == 0


def coco_truth(path, truth, crowd=()):
    """Write an annotation file for objects (image, category, x, y, w, h)."""
    rows = [
        {"id": i + 1, "image_id": row[0], "category_id": row[1], "bbox": list(row[2:]), "area": row[4] * row[5],
         "iscrowd": int(row in crowd),
         "segmentation": [[row[2], row[3], row[2] + row[4], row[3], row[2] + row[4], row[3] + row[5], row[2],
         row[3] + row[5]]]}
        for i, row in enumerate(truth)
    ]  # fmt: skip
    images = [{"id": i, "width": 200, "height": 200} for i in range(1, 6)]
    path.write_text(
        json.dumps(
            {"images": images, "annotations": rows, "categories": [{"id": c, "name": str(c)} for c in (1, 3, 90)]}
        )
    )
    return path


def coco(path, found):
    return coco_scores(
        path,
        [dict(zip(("image_id", "category_id", "score", "bbox"), row, strict=True)) for row in found],
        masks=False,
        say=str,
    )


def test_coco_perfect_swapped_and_none(tmp_path):
    truth = [(1, 1, 5.0, 5.0, 40.0, 40.0), (2, 90, 10.0, 20.0, 100.0, 100.0)]
    file = coco_truth(tmp_path / "truth.json", truth)
    perfect = coco(file, [(i, c, 0.9, list(box)) for i, c, *box in truth])
    assert perfect == pytest.approx(
        {"box_ap": 100, "box_ap50": 100, "box_ap75": 100, "box_ap_medium": 100, "box_ap_large": 100}
    )
    assert coco(file, [(i, 91 - c, 0.9, list(box)) for i, c, *box in truth])["box_ap"] == 0
    assert coco(file, []) == {"box_ap": 0, "box_ap50": 0, "box_ap75": 0}


def test_coco_does_not_punish_a_detection_on_a_crowd(tmp_path):
    crowd = (1, 1, 100.0, 100.0, 90.0, 90.0)
    truth = [(1, 1, 5.0, 5.0, 40.0, 40.0), crowd]
    found = [(1, 1, 0.9, [120.0, 120.0, 30.0, 30.0]), (1, 1, 0.8, [5.0, 5.0, 40.0, 40.0])]
    assert coco(coco_truth(tmp_path / "crowd.json", truth, crowd=[crowd]), found)["box_ap"] == pytest.approx(100)
    assert coco(coco_truth(tmp_path / "plain.json", truth), found)["box_ap"] < 51


def random_set(seed, path):
    draw = np.random.default_rng(seed)
    truth = [
        (int(draw.integers(1, 6)), int(draw.choice([1, 3, 90])), *map(float, draw.integers(5, 90, 4)))
        for _ in range(30)
    ]
    moved = [(i, c, float(draw.random()), [float(v + draw.normal(0, 3)) for v in box]) for i, c, *box in truth]
    return coco_truth(path, truth), truth, moved


@pytest.mark.parametrize("seed", [0, 1])
def test_coco_equals_pycocotools_own_on_random_boxes(tmp_path, seed, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    file, _, found = random_set(seed, tmp_path / "truth.json")
    said = []
    rows = [dict(zip(("image_id", "category_id", "score", "bbox"), row, strict=True)) for row in found]
    ours = coco_scores(file, rows, masks=False, say=said.append)
    assert capsys.readouterr().out == "" and any("Average Precision" in line for line in said)
    (tmp_path / "results.json").write_text(json.dumps(rows))
    known = COCO(str(file))
    evaluation = COCOeval(known, known.loadRes(str(tmp_path / "results.json")), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    names = ("box_ap", "box_ap50", "box_ap75", "box_ap_small", "box_ap_medium", "box_ap_large")
    assert ours == {name: 100 * value for name, value in zip(names, evaluation.stats[:6], strict=True) if value > -1}
    assert 1 < ours["box_ap"] < 99


def test_ours_is_near_cocos_at_one_half_without_difficult_objects(tmp_path):
    file, truth, found = random_set(2, tmp_path / "truth.json")
    corners = [(i, c, s, [b[0], b[1], b[0] + b[2], b[1] + b[3]]) for i, c, s, b in found]
    ours = voc(corners, [(i, c, [x, y, x + w, y + h]) for i, c, x, y, w, h in truth])
    assert ours["ap50"] == pytest.approx(coco(file, found)["box_ap50"], abs=5)
