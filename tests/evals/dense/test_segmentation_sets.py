"""VOC 2012 with SBD's labels is read from every layout in which copies exist, and agrees with torchvision's readers."""

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import SBDataset, VOCSegmentation

from caco.data.sets.sources import UnreadableImage
from caco.errors import UserError
from caco.evals.dense.segmentation_sets import CLASSES, read_labels, voc2012
from experiments.toy_sets import segmentation as toy_voc
from experiments.toy_sets.segmentation import FURTHER, TRAIN, VAL


def names(images) -> list[str]:
    return [images.files.path(i).stem for i in range(len(images))]


def test_twenty_classes_and_the_background_come_in_vocs_order():
    assert (CLASSES[0], CLASSES[1], CLASSES[8], CLASSES[20], len(CLASSES)) == (
        "background",
        "aeroplane",
        "cat",
        "tvmonitor",
        21,
    )


@pytest.mark.parametrize("image_set", ["train", "val"])
def test_torchvision_reads_the_same_images_and_labels(tmp_path, image_set):
    toy_voc.write_voc(tmp_path)
    found = voc2012(tmp_path, "train")
    ours, theirs = (
        found.train if image_set == "train" else found.test,
        VOCSegmentation(tmp_path, year="2012", image_set=image_set),
    )
    assert len(ours) == len(theirs) == (6 if image_set == "train" else 4)
    for i, (image, labels) in enumerate(theirs):
        own_image, own_labels = ours.read(i)
        assert np.array_equal(np.asarray(own_image), np.asarray(image)) and np.array_equal(
            own_labels, np.asarray(labels)
        )
        assert set(np.unique(own_labels)) <= {0, 8, 9, 20, 255} and 255 in own_labels


def test_torchvision_reads_the_same_labels_of_sbd(tmp_path):
    toy_voc.write_voc(tmp_path)
    toy_voc.write_sbd(tmp_path, train=FURTHER, val=[VAL[0]])
    found, theirs = (
        voc2012(tmp_path, "trainaug").train,
        SBDataset(str(tmp_path), image_set="train", mode="segmentation"),
    )
    assert names(found) == [*TRAIN, *FURTHER] and len(theirs) == 2
    for i, (image, labels) in enumerate(theirs):
        own_image, own_labels = found.read(len(TRAIN) + i)
        assert np.array_equal(np.asarray(own_image), np.asarray(image)) and np.array_equal(
            own_labels, np.asarray(labels)
        )


SBD_PLACES = ["benchmark_RELEASE/dataset", "VOCdevkit/VOCaug/dataset", "VOCaug/dataset", "dataset", "SBD", "."]


@pytest.mark.parametrize("place", SBD_PLACES)
def test_sbd_adds_its_images_without_vocs_val_and_vocs_own_labels_stay(tmp_path, place):
    """SBD's lists contain images of VOC's val set, so training on these lists would train on test images."""
    toy_voc.write_voc(tmp_path)
    toy_voc.write_sbd(tmp_path / place, train=[TRAIN[0], VAL[0], FURTHER[0]], val=[VAL[1], FURTHER[1]])
    found = voc2012(tmp_path, "trainaug")
    assert names(found.train) == [*TRAIN, *FURTHER] and names(found.test) == VAL
    assert (
        found.train.labels.path(0).name == f"{TRAIN[0]}.png" and found.train.labels.path(6).name == f"{FURTHER[0]}.mat"
    )
    assert names(voc2012(tmp_path, "train").train) == TRAIN


def test_photos_that_voc_has_need_not_lie_in_sbd_too(tmp_path):
    top = toy_voc.write_voc(tmp_path)
    toy_voc.write_sbd(tmp_path / "SBD", train=FURTHER, val=[VAL[0]], photos=False)
    with pytest.raises(UserError, match=rf"JPEGImages \(2 of 2 files, {FURTHER[0]}.jpg for example\)"):
        voc2012(tmp_path, "trainaug")
    for name in FURTHER:
        toy_voc.drawn(name)[0].save(top / "JPEGImages" / f"{name}.jpg")
    assert len(voc2012(tmp_path, "trainaug").train) == 8


@pytest.mark.parametrize("listed", [None, "Segmentation/trainaug.txt", "SegmentationAug/train_aug.txt"])
@pytest.mark.parametrize("paths", [False, True])
def test_the_common_folder_of_converted_labels_with_its_list_of_names_or_paths_or_without(tmp_path, listed, paths):
    top = toy_voc.write_voc(tmp_path)
    for name in (*TRAIN, *VAL, *FURTHER):  # the common archive also has the labels of val
        toy_voc.write_image(top, name, folder="SegmentationClassAug")
    if listed is not None:
        lines = [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" if paths else n for n in (*FURTHER, *TRAIN)]
        toy_voc.write_list(top / "ImageSets" / listed, lines)
    found = voc2012(tmp_path, "trainaug")
    assert (
        names(found.train) == ([*TRAIN, *FURTHER] if listed is None else [*FURTHER, *TRAIN])
        and names(found.test) == VAL
    )
    folders = {
        found.train.labels.path(names(found.train).index(TRAIN[0])).parent.name,
        found.test.labels.path(0).parent.name,
    }
    assert folders == ({"SegmentationClass"} if listed is None else {"SegmentationClassAug", "SegmentationClass"})


def test_a_list_to_train_on_that_has_test_images_is_refused(tmp_path):
    top = toy_voc.write_voc(tmp_path)
    for name in (*TRAIN, *VAL):
        toy_voc.write_image(top, name, folder="SegmentationClassAug")
    toy_voc.write_list(top / "ImageSets" / "Segmentation" / "trainaug.txt", [*TRAIN, VAL[2]])
    with pytest.raises(UserError, match=rf"without images of val.txt: 1 are in both, {VAL[2]} for example"):
        voc2012(tmp_path, "trainaug")


@pytest.mark.parametrize("above", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_the_root_may_be_above_the_devkit_or_the_devkit_or_the_year(tmp_path, above):
    toy_voc.write_voc(tmp_path)
    assert len(voc2012(tmp_path / above, "train").train) == 6


def test_all_that_is_missing_is_said_at_once_with_the_layout(tmp_path):
    with pytest.raises(UserError) as nothing:
        voc2012(tmp_path, "trainaug")
    for part in (
        "Segmentation/train.txt",
        "Segmentation/val.txt",
        "SegmentationClassAug, or SBD (train=train needs",
        "benchmark.tgz",
    ):
        assert part in str(nothing.value)
    top = toy_voc.write_voc(tmp_path)
    (top / "JPEGImages" / f"{VAL[1]}.jpg").unlink()
    (top / "SegmentationClass" / f"{TRAIN[3]}.png").unlink()
    (top / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(TRAIN))
    with pytest.raises(UserError) as some:
        voc2012(tmp_path, "train")
    assert f"SegmentationClass (1 of 6 files, {TRAIN[3]}.png for example)" in str(some.value)
    assert f"JPEGImages (1 of 4 files, {VAL[1]}.jpg for example)" in str(some.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: Image.open(path).convert("RGB").save(path), r"colours \(RGB\) and not numbers of classes"),
        (
            lambda path: toy_voc.write_labels(path, np.full((96, 128), 21)),
            r"expected classes 0 to 20, and 255 .*, got \[21\]",
        ),
        (
            lambda path: toy_voc.write_labels(path, np.zeros((96, 127))),
            "expected labels of 128 x 96 pixels, as .*2007_000000.jpg has",
        ),
        (lambda path: path.write_bytes(b"no picture"), "expected the class of every pixel"),
    ],
)
def test_labels_that_are_none_are_refused_by_name(tmp_path, spoil, message):
    spoil(toy_voc.write_voc(tmp_path) / "SegmentationClass" / f"{TRAIN[0]}.png")
    with pytest.raises(UnreadableImage, match=f"{TRAIN[0]}.png: .*{message}|{TRAIN[0]}.png: {message}"):
        voc2012(tmp_path, "train").train.read(0)


def test_labels_that_would_unpack_to_more_than_is_meant_are_refused_by_name(tmp_path, monkeypatch):
    path = toy_voc.write_voc(tmp_path) / "SegmentationClass" / f"{TRAIN[0]}.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match=f"{TRAIN[0]}.png: expected .*, got DecompressionBombError"):
        read_labels(path)


def test_lists_are_read_in_whatever_encoding_an_editor_writes(tmp_path):
    top = toy_voc.write_voc(tmp_path)
    for file in (top / "ImageSets" / "Segmentation").iterdir():
        file.write_text(file.read_text(), encoding="utf-16")
    assert len(voc2012(tmp_path, "train").train) == len(TRAIN)


def test_a_mat_file_of_something_else_is_refused_by_name(tmp_path):
    from scipy.io import savemat

    savemat(tmp_path / "boundaries.mat", {"GTinst": np.zeros((3, 3))})
    with pytest.raises(UnreadableImage, match="boundaries.mat: expected the class of every pixel, got KeyError"):
        read_labels(tmp_path / "boundaries.mat")


def test_the_digest_tells_other_labels_and_another_order(tmp_path):
    top = toy_voc.write_voc(tmp_path)
    before = voc2012(tmp_path, "train").train.digest()
    assert voc2012(tmp_path, "train").train.digest() == before
    toy_voc.write_list(top / "ImageSets" / "Segmentation" / "train.txt", TRAIN[::-1])
    reordered = voc2012(tmp_path, "train").train.digest()
    toy_voc.write_list(top / "ImageSets" / "Segmentation" / "train.txt", TRAIN)
    toy_voc.write_labels(top / "SegmentationClass" / f"{TRAIN[0]}.png", np.eye(96, 128))
    assert len({before, reordered, voc2012(tmp_path, "train").train.digest()}) == 3


def test_exchanged_labels_of_equal_size_are_others_and_labels_that_were_written_anew_have_another_cache_key(tmp_path):
    """Cached results are not used for labels that were written anew; a checkpoint is, because their content is the
    same.
    """
    top = toy_voc.write_voc(tmp_path)
    one, other = (top / "SegmentationClass" / f"{name}.png" for name in TRAIN[:2])
    size = max(path.stat().st_size for path in (one, other))
    for path in (one, other):
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    before = voc2012(tmp_path, "train").train
    keys = before.digest(), before.cache_key()
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    assert voc2012(tmp_path, "train").train.digest() != keys[0]
    one.write_bytes(contents[0])
    other.write_bytes(contents[1])
    again = voc2012(tmp_path, "train").train
    assert again.digest() == keys[0] and again.cache_key() != keys[1]
