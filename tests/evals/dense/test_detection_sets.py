"""The readers of PASCAL VOC and COCO 2017, compared with torchvision's readers on toy sets in the real layouts."""

import json
import shutil

import numpy as np
import pytest
from torchvision.datasets import CocoDetection, VOCDetection

from caco.data.sets.transfer import VOC_CLASSES
from caco.errors import UserError
from caco.evals.dense.detection_sets import coco, voc
from experiments.toy_sets.detection import CATEGORIES, HEIGHT, WIDTH, write_coco, write_voc


def of_torchvision(root, year, split):
    """(class, published box, difficult) of each object of each image, and the images' sizes."""
    found, sizes = [], []
    for image, target in VOCDetection(root, year=year, image_set=split):
        sizes.append(image.size)
        objects = target["annotation"]["object"]
        edges = ("xmin", "ymin", "xmax", "ymax")
        found.append(
            [(o["name"], [float(o["bndbox"][edge]) for edge in edges], o["difficult"] == "1") for o in objects]
        )
    return found, sizes


def test_voc_reads_what_torchvision_reads(tmp_path):
    write_voc(tmp_path)
    found = voc(tmp_path)
    assert (len(found.train), len(found.test), found.classes) == (8, 4, list(VOC_CLASSES))
    train07, train12, test = (
        of_torchvision(tmp_path, *part) for part in (("2007", "trainval"), ("2012", "trainval"), ("2007", "test"))
    )
    for images, (theirs, sizes) in ((found.train, tuple(map(list.__add__, train07, train12))), (found.test, test)):
        ours = [images.objects(i) for i in range(len(images))]
        assert [[VOC_CLASSES[label] for label in o.labels] for o in ours] == [
            [name for name, *_ in image] for image in theirs
        ]
        assert [(o.boxes + [1, 1, 0, 0]).tolist() for o in ours] == [[box for _, box, _ in image] for image in theirs]
        assert [o.difficult.tolist() for o in ours] == [[difficult for *_, difficult in image] for image in theirs]
        assert (
            [images.files.image(i).size for i in range(len(images))]
            == sizes
            == [tuple(size) for size in images.sizes.tolist()]
        )
    assert found.train.difficult.sum() == 2 and found.test.difficult.sum() == 1, (
        "difficult objects are kept, also for training"
    )
    assert found.train.boxes.max() == WIDTH and found.train.objects(0).boxes.shape == (1, 4)


@pytest.mark.parametrize("inside", ["", "mirror"])
def test_voc_is_found_where_mirrors_have_it(tmp_path, inside):
    write_voc(tmp_path / "published")
    if inside:  # each archive is unpacked in its own folder
        root = tmp_path / inside
        write_voc(root, train12=0, test=0, inside="VOCtrainval_06-Nov-2007/VOCdevkit")
        write_voc(root, train07=0, test=0, inside="VOCtrainval_11-May-2012/VOCdevkit")
        write_voc(root, train07=0, train12=0, inside="VOCtest_06-Nov-2007/VOCdevkit")
        for folder, year, lists in (
            ("VOCtrainval_06-Nov-2007", 2007, ("test",)),
            ("VOCtrainval_11-May-2012", 2007, ("trainval", "test")),
            ("VOCtest_06-Nov-2007", 2007, ("trainval",)),
        ):
            for name in lists:
                (root / folder / "VOCdevkit" / f"VOC{year}" / "ImageSets" / "Main" / f"{name}.txt").unlink()
        shutil.rmtree(root / "VOCtrainval_06-Nov-2007" / "VOCdevkit" / "VOC2012")
        shutil.rmtree(root / "VOCtest_06-Nov-2007" / "VOCdevkit" / "VOC2012")
    else:
        root = tmp_path / "published" / "VOCdevkit"  # root itself contains VOC2007 and VOC2012
    found = voc(root)
    assert (len(found.train), len(found.test)) == (8, 4)
    assert [found.train.boxes.tolist(), found.test.names.tolist()] == [
        voc(tmp_path / "published").train.boxes.tolist(), voc(tmp_path / "published").test.names.tolist(),
    ]  # fmt: skip


def test_voc_refuses_once_with_all_that_is_missing_and_the_layout(tmp_path):
    with pytest.raises(UserError) as nothing:
        voc(tmp_path)
    assert all(
        part in str(nothing.value)
        for part in ("VOC 2007 trainval", "VOC 2012 trainval", "VOC 2007 test", "VOCtest_06-Nov-2007.tar")
    )
    write_voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2007/JPEGImages/000002.jpg").unlink()
    (tmp_path / "VOCdevkit/VOC2012/Annotations/2008_000001.xml").unlink()
    shutil.move(tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/test.txt", tmp_path / "elsewhere.txt")
    with pytest.raises(UserError) as some:
        voc(tmp_path)
    message = str(some.value)
    assert "1 of the 5 files of VOC 2007 trainval" in message and "000002.jpg for example" in message
    assert "1 of the 3 files of VOC 2012 trainval" in message and "2008_000001.xml for example" in message
    assert "ImageSets/Main/test.txt (VOC 2007 test)" in message and "Expected below root:" in message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<name>aeroplane</name>", "<name>dragon</name>"),
        ("<xmin>", "<xmin>left"),
        ("</annotation>", ""),
        ("<width>128</width>", ""),
    ],
)
def test_voc_names_an_annotation_that_is_not_as_published(tmp_path, old, new):
    write_voc(tmp_path, train12=1)
    for path in (tmp_path / "VOCdevkit/VOC2007/Annotations").iterdir():
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"VOC2007/Annotations/\d+.xml is not an annotation as published"):
        voc(tmp_path)


def test_coco_reads_what_torchvision_reads_but_crowds_and_empty_boxes(tmp_path, capsys):
    write_coco(tmp_path)
    found = coco(tmp_path)
    assert found.classes == ["aeroplane", "car", "bird", "kite"] and found.category_ids.tolist() == [1, 3, 18, 90]
    for images, split, left_out in ((found.train, "train2017", [27]), (found.test, "val2017", [])):
        theirs = CocoDetection(tmp_path / split, str(tmp_path / f"annotations/instances_{split}.json"))
        assert images.names.tolist() == [i for i in theirs.ids if i not in left_out]
        for index, name in enumerate(images.names.tolist()):
            image, annotations = theirs[theirs.ids.index(name)]
            usable = [a for a in annotations if not a["iscrowd"] and a["bbox"][2] > 0]
            ours = images.objects(index)
            assert [found.category_ids[label] for label in ours.labels] == [a["category_id"] for a in usable]
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in usable)]
            assert ours.boxes.tolist() == boxes
            assert all(
                np.allclose(np.concatenate([r.ravel() for r in rings]), a["segmentation"][0])
                for rings, a in zip(ours.polygons, usable, strict=True)
            )
            assert np.array_equal(images.files.image(index), image) and images.files.image(index).mode == "RGB"
    assert len(found.train) == 5 and len(found.test) == 4, (
        "the training image with only a crowd is left out; val keeps all images"
    )
    assert len(found.test.objects(2).labels) == 0
    assert found.truth == tmp_path / "annotations/instances_val2017.json"


@pytest.mark.parametrize(("inside", "images"), [("coco", ""), ("coco2017", "images"), ("", "images")])
def test_coco_is_found_where_mirrors_have_it(tmp_path, inside, images):
    write_coco(tmp_path / inside, images=images)
    found = coco(tmp_path)
    assert len(found.train) == 5 and found.train.files.image(0).size == (WIDTH, HEIGHT)


def test_coco_refuses_once_with_all_that_is_missing_and_the_layout(tmp_path):
    with pytest.raises(
        UserError,
        match=(
            r"instances_train2017.json\n.*train2017\n.*instances_val2017.json\n.*val2017\nExpected below"
            r" root:\n.*train2017"
        ),
    ):
        coco(tmp_path)
    write_coco(tmp_path)
    (tmp_path / f"val2017/{9 * 50 + 9:012d}.jpg").unlink()
    (tmp_path / "annotations/instances_train2017.json").unlink()
    with pytest.raises(UserError) as some:
        coco(tmp_path)
    assert "instances_train2017.json" in str(some.value) and "1 of the 4 images in" in str(some.value)
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps({"images": []}))
    with pytest.raises(UserError, match="instances_train2017.json is not as published"):
        coco(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda about: about["annotations"][0].pop("bbox"),
        lambda about: about["annotations"][0].update(category_id=5_000),
        lambda about: about["images"][0].pop("id"),
        lambda about: about["images"][0].pop("file_name"),
        lambda about: about.update(annotations=7),
    ],
)
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_coco_names_annotations_that_are_not_as_published(tmp_path, split, spoil):
    write_coco(tmp_path)
    file = tmp_path / f"annotations/instances_{split}.json"
    about = json.loads(file.read_text())
    spoil(about)
    file.write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"instances_{split}.json is not as published"):
        coco(tmp_path)


def test_what_a_set_is_called_changes_with_its_objects(tmp_path):
    write_coco(tmp_path)
    before = coco(tmp_path).inputs()
    assert coco(tmp_path).inputs() == before
    file = tmp_path / "annotations/instances_train2017.json"
    about = json.loads(file.read_text())
    about["annotations"][0]["segmentation"][0][0] += 1
    file.write_text(json.dumps(about))
    after = coco(tmp_path).inputs()
    assert after[1] != before[1] and after[2:] == before[2:]
    crowd = tmp_path / "annotations/instances_val2017.json"
    crowd.write_text(crowd.read_text().replace('"iscrowd": 1', '"iscrowd": 0'))
    assert coco(tmp_path).inputs()[3] != before[3], (
        "the cache key must depend on the whole file, because all of it is scored"
    )


def test_the_toy_sets_hold_what_they_are_to_show(tmp_path):
    """The tests above need a crowd, an image without objects, a grey image, ids with gaps, and an image with one
    object.
    """
    write_coco(tmp_path)
    about = json.loads((tmp_path / "annotations/instances_train2017.json").read_text())
    assert {a["iscrowd"] for a in about["annotations"]} == {0, 1} and any(
        a["bbox"][2] == 0 for a in about["annotations"]
    )
    assert sorted(CATEGORIES) == [1, 3, 18, 90]
