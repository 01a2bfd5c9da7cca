"""The transfer sets, each tested with a tiny set in its published layout; caco agrees with torchvision where that reads
the same layout.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as theirs
from PIL import Image
from scipy.io import savemat
from test_downloaded import dump, rows

from caco.data.sets import transfer
from caco.data.sets.transfer import READERS, VOC_CLASSES, MissingSet, load
from caco.errors import UserError


def image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)).save(path)


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def files(source) -> list[tuple[str, int]]:
    return sorted((str(source.path(i)), int(source.labels[i])) for i in range(len(source)))


def joined(*sources) -> list[tuple[str, int]]:
    return sorted(pair for source in sources for pair in files(source))


def of_torchvision(dataset, names: str, labels: str = "_labels") -> list[tuple[str, int]]:
    return sorted(
        (str(path), int(label)) for path, label in zip(getattr(dataset, names), getattr(dataset, labels), strict=True)
    )


def test_food101(tmp_path):
    top, lists = tmp_path / "food-101", {"train": {}, "test": {}}
    for c, name in enumerate(("apple_pie", "waffles")):
        for split, count in (("train", 10), ("test", 3)):
            lists[split][name] = [f"{name}/{100 * c + 10 * (split == 'test') + i}" for i in range(count)]
            for i, file in enumerate(lists[split][name]):
                image(top / "images" / f"{file}.jpg", i)
    for split, listed in lists.items():
        text(top / "meta" / f"{split}.json", json.dumps(listed))
    found = load("food101", tmp_path, seed=0)
    assert (len(found.train), len(found.validation), len(found.test), found.metric) == (18, 2, 6, "top1")
    assert np.bincount(found.validation.labels).tolist() == [1, 1]
    assert joined(found.train, found.validation) == of_torchvision(theirs.Food101(tmp_path, "train"), "_image_files")
    assert files(found.test) == of_torchvision(theirs.Food101(tmp_path, "test"), "_image_files")


def test_sun397(tmp_path):
    top = tmp_path / "SUN397"
    text(top / "ClassName.txt", "/a/abbey", "/b/badlands/outdoor")
    lists = {"Training_01.txt": [], "Testing_01.txt": []}
    for name in ("a/abbey", "b/badlands/outdoor"):
        for i in range(8):
            image(top / name / f"sun_{i}.jpg", i)
            lists["Training_01.txt" if i < 5 else "Testing_01.txt"].append(f"/{name}/sun_{i}.jpg")
    with pytest.raises(MissingSet, match="Training_01.txt of Partitions.zip"):
        load("sun397", tmp_path, seed=0)
    for file, images in lists.items():
        text(top / "Partitions" / file, *images)
    found = load("sun397", tmp_path, seed=0)
    assert (len(found.train), len(found.validation), len(found.test), found.metric) == (8, 2, 6, "top1")
    assert found.test.classes == ["/a/abbey", "/b/badlands/outdoor"]
    assert joined(found.train, found.validation, found.test) == of_torchvision(theirs.SUN397(tmp_path), "_image_files")


def test_cars(tmp_path):
    top = tmp_path / "stanford_cars"
    (top / "devkit").mkdir(parents=True)
    savemat(
        top / "devkit" / "cars_meta.mat", {"class_names": np.array(["AM General Hummer", "Acura RL"], dtype=object)}
    )
    kind = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    for split, file, count in (("train", "cars_train_annos.mat", 10), ("test", "cars_test_annos_withlabels.mat", 4)):
        annotations = np.array([(1, i % 2 + 1, f"{i + 1:05d}.jpg") for i in range(count)], dtype=kind)
        savemat(top / "devkit" / file if split == "train" else top / file, {"annotations": annotations})
        for i in range(count):
            image(top / f"cars_{split}" / f"{i + 1:05d}.jpg", i)
    oracle = {split: theirs.StanfordCars(tmp_path, split) for split in ("train", "test")}
    found = load("cars", tmp_path, seed=0)
    assert (len(found.train), len(found.validation), len(found.test), found.metric) == (8, 2, 4, "top1")
    assert found.train.classes == ["AM General Hummer", "Acura RL"]
    assert joined(found.train, found.validation) == sorted((p, int(c)) for p, c in oracle["train"]._samples)
    assert files(found.test) == sorted((p, int(c)) for p, c in oracle["test"]._samples)
    # Copies on the web have the test labels in one of two places, or lack them.
    labels = top / "cars_test_annos_withlabels.mat"
    labels = labels.rename(top / "devkit" / labels.name)
    assert files(found.test) == files(load("cars", tmp_path, seed=0).test)
    labels.unlink()
    with pytest.raises(MissingSet, match="cars: expected .*cars_test_annos_withlabels.mat"):
        load("cars", tmp_path, seed=0)


def test_aircraft(tmp_path):
    top = tmp_path / "fgvc-aircraft-2013b" / "data"
    text(top / "variants.txt", "707-320", "A340 (mixed) 200")
    for s, split in enumerate(("train", "val", "test")):
        listed = [f"{1000 * s + i:07d} {('707-320', 'A340 (mixed) 200')[i % 2]}" for i in range(4)]
        text(top / f"images_variant_{split}.txt", *listed)
        for row in listed:
            image(top / "images" / f"{row.split()[0]}.jpg", s)
    found = load("aircraft", tmp_path, seed=0)
    assert found.metric == "mean_per_class"
    for split, ours in (("train", found.train), ("val", found.validation), ("test", found.test)):
        assert files(ours) == of_torchvision(theirs.FGVCAircraft(tmp_path, split), "_image_files")


def test_voc2007(tmp_path):
    top, marks = tmp_path / "VOCdevkit" / "VOC2007", {"-1": 0, " 1": 1, " 0": -1}
    expected = {}
    for s, split in enumerate(("train", "val", "test")):
        images = [f"{100 * s + i:06d}" for i in range(5)]
        drawn = np.random.default_rng(s).choice(list(marks), (5, 20))
        for c, name in enumerate(VOC_CLASSES):
            text(
                top / "ImageSets" / "Main" / f"{name}_{split}.txt",
                *(f"{i} {mark}" for i, mark in zip(images, drawn[:, c], strict=True)),
            )
        for i in images:
            image(top / "JPEGImages" / f"{i}.jpg", int(i))
        expected[split] = np.vectorize(marks.get)(drawn)
    found = load("voc2007", tmp_path, seed=0)
    assert found.metric == "map11" and found.test.classes == list(VOC_CLASSES)
    for split, ours in (("train", found.train), ("val", found.validation), ("test", found.test)):
        assert np.array_equal(ours.labels, expected[split])
        assert ours.path(3).name == f"{('train', 'val', 'test').index(split) * 100 + 3:06d}.jpg" and ours.image(
            3
        ).size == (7, 6)
    text(top / "ImageSets" / "Main" / "dog_test.txt", "000000 1")
    with pytest.raises(ValueError, match="voc2007: expected the same images in every list of test"):
        load("voc2007", tmp_path, seed=0)


def test_dtd(tmp_path):
    top = tmp_path / "dtd" / "dtd"
    for s, split in enumerate(("train", "val", "test")):
        listed = [f"{name}/{name}_{s}{i}.jpg" for name in ("banded", "woven") for i in range(2)]
        text(top / "labels" / f"{split}1.txt", *listed)
        for i, file in enumerate(listed):
            image(top / "images" / file, i)
    found = load("dtd", tmp_path, seed=0)
    assert found.metric == "top1" and found.train.classes == ["banded", "woven"]
    for split, ours in (("train", found.train), ("val", found.validation), ("test", found.test)):
        assert files(ours) == of_torchvision(theirs.DTD(tmp_path, split), "_image_files")


def test_pets(tmp_path):
    top = tmp_path / "oxford-iiit-pet"
    for file, count in (("trainval.txt", 10), ("test.txt", 4)):
        listed = [
            f"{name}_{100 * (count == 4) + i} {breed} 1 {breed}"
            for breed, name in ((1, "Abyssinian"), (2, "american_bulldog"))
            for i in range(count // 2)
        ]
        text(top / "annotations" / file, *listed)
        for i, row in enumerate(listed):
            image(top / "images" / f"{row.split()[0]}.jpg", i)
    (top / "annotations" / "trimaps").mkdir()
    found = load("pets", tmp_path, seed=0)
    assert (len(found.train), len(found.validation), len(found.test), found.metric) == (8, 2, 4, "mean_per_class")
    assert found.train.classes == ["Abyssinian", "american_bulldog"]
    assert joined(found.train, found.validation) == of_torchvision(
        theirs.OxfordIIITPet(tmp_path, "trainval"), "_images"
    )
    assert files(found.test) == of_torchvision(theirs.OxfordIIITPet(tmp_path, "test"), "_images")


def test_caltech101_trains_on_thirty_drawn_images_a_class(tmp_path):
    for name, count in (("BACKGROUND_Google", 33), ("accordion", 31)):
        for i in range(count):
            image(tmp_path / "caltech101" / "101_ObjectCategories" / name / f"image_{i + 1:04d}.jpg", i)
    found, again, other = (load("caltech101", tmp_path, seed=seed) for seed in (0, 0, 1))
    assert (len(found.train), len(found.validation), found.metric) == (48, 12, "mean_per_class")
    assert np.bincount(np.concatenate([found.train.labels, found.validation.labels])).tolist() == [30, 30]
    assert np.bincount(found.test.labels).tolist() == [3, 1]
    assert len({pair for source in (found.train, found.validation, found.test) for pair in files(source)}) == 64
    assert files(found.test) == files(again.test) != files(other.test)


def test_flowers(tmp_path, monkeypatch):
    monkeypatch.setattr(
        theirs.Flowers102, "_check_integrity", lambda self: True
    )  # torchvision checks the checksums of the published files
    top = tmp_path / "flowers-102"
    top.mkdir()
    labels = np.array([1, 1, 1, 2, 2, 2, 2, 1])
    savemat(top / "imagelabels.mat", {"labels": labels[None]})
    savemat(
        top / "setid.mat", {"trnid": np.array([[1, 4]]), "valid": np.array([[2, 5]]), "tstid": np.array([[8, 3, 6, 7]])}
    )
    for i in range(8):
        image(top / "jpg" / f"image_{i + 1:05d}.jpg", i)
    found = load("flowers", tmp_path, seed=0)
    assert found.metric == "mean_per_class"
    for split, ours in (("train", found.train), ("val", found.validation), ("test", found.test)):
        assert files(ours) == of_torchvision(theirs.Flowers102(tmp_path, split), "_image_files")


def test_cifar(tmp_path, monkeypatch):
    for module in (theirs.cifar, theirs.utils):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())
    for i in range(5):
        dump(tmp_path / "cifar-10-batches-py" / f"data_batch_{i + 1}", {"data": rows(8, i), "labels": [0, 1] * 4})
    dump(tmp_path / "cifar-10-batches-py" / "test_batch", {"data": rows(3, 9), "labels": [1, 0, 1]})
    dump(tmp_path / "cifar-10-batches-py" / "batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    dump(tmp_path / "cifar-100-python" / "train", {"data": rows(20, 0), "fine_labels": [0, 1] * 10})
    dump(tmp_path / "cifar-100-python" / "test", {"data": rows(2, 1), "fine_labels": [1, 0]})
    dump(tmp_path / "cifar-100-python" / "meta", {"fine_label_names": [f"fine{i}" for i in range(100)]})
    ten, hundred = load("cifar10", tmp_path, seed=0), load("cifar100", tmp_path, seed=0)
    assert (len(ten.train), len(ten.validation), ten.test.labels.tolist()) == (36, 4, [1, 0, 1])
    assert (len(hundred.train), len(hundred.validation), hundred.test.labels.tolist()) == (18, 2, [1, 0])
    assert ten.metric == hundred.metric == "top1"


def test_ones_own_folder(tmp_path, write_images):
    for split, count in (("train", 10), ("test", 2)):
        for name in ("cat", "dog"):
            write_images(tmp_path / "mine" / split / name, count)
    found = load("mine", tmp_path, seed=0)
    assert (len(found.train), len(found.validation), len(found.test), found.metric) == (18, 2, 4, "top1")


@pytest.mark.parametrize("name", READERS)
def test_a_missing_set_says_what_to_fetch_and_where_to_put_it(tmp_path, name):
    with pytest.raises(MissingSet) as caught:
        load(name, tmp_path, seed=0)
    told = str(caught.value)
    assert told.startswith(f"{name}: expected {tmp_path}/") and "got no such folder" in told
    assert ("torchvision fetches it" in told) == (name not in ("cars", "voc2007"))
    if "import" in told:
        assert (
            hasattr(theirs, told.partition("import ")[2].partition(" ")[0])
            and f"D('{tmp_path}', download=True)" in told
        )


def test_images_of_a_list_that_are_not_there_are_named(tmp_path):
    text(tmp_path / "dtd" / "labels" / "train1.txt", "banded/a.jpg")
    text(tmp_path / "dtd" / "labels" / "val1.txt", "banded/b.jpg")
    text(tmp_path / "dtd" / "labels" / "test1.txt", "banded/c.jpg")
    with pytest.raises(
        ValueError,
        match=r"dtd/train: expected the 1 images of the published list .* got 1 of them not there \(banded/a.jpg\)",
    ):
        load("dtd", tmp_path, seed=0)


@pytest.mark.parametrize(
    ("name", "file", "content", "expected"),
    [
        ("food101", "food-101/meta/test.json", '{"waffles": ["waffles/1"]}', "classes are others than those of train"),
        ("food101", "food-101/meta/train.json", '{"apple_pie": [', "JSONDecodeError"),
        ("sun397", "SUN397/Training_01.txt", "/c/cave/sun_1.jpg", "KeyError: '/c/cave'"),
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_val.txt", "1025794", "ValueError"),
        ("dtd", "dtd/labels/val1.txt", "spotted/spotted_1.jpg", "KeyError: 'spotted'"),
        ("pets", "oxford-iiit-pet/annotations/test.txt", "Abyssinian_1 0 1 1", "counted from 1, and one is 0"),
        ("voc2007", "VOCdevkit/VOC2007/ImageSets/Main/dog_val.txt", "000001 2", "KeyError: '2'"),
        ("flowers", "flowers-102/setid.mat", "no table", "flowers: .*setid.mat is not as published"),
        ("cars", "stanford_cars/devkit/cars_meta.mat", "no table", "cars: .*cars_meta.mat is not as published"),
    ],
)
def test_a_list_of_other_content_is_refused_by_its_name(tmp_path, name, file, content, expected):
    text(tmp_path / "food-101" / "meta" / "train.json", '{"apple_pie": ["apple_pie/1"], "waffles": ["waffles/1"]}')
    for label, number in (("apple_pie", 1), ("waffles", 1)):
        image(tmp_path / "food-101" / "images" / label / f"{number}.jpg", number)
    text(tmp_path / "SUN397" / "ClassName.txt", "/a/abbey")
    text(tmp_path / "fgvc-aircraft-2013b" / "data" / "variants.txt", "707-320")
    text(tmp_path / "fgvc-aircraft-2013b" / "data" / "images_variant_train.txt", "1 707-320")
    image(tmp_path / "fgvc-aircraft-2013b" / "data" / "images" / "1.jpg", 0)
    text(tmp_path / "dtd" / "labels" / "train1.txt", "banded/1.jpg")
    image(tmp_path / "dtd" / "images" / "banded" / "1.jpg", 0)
    text(tmp_path / "oxford-iiit-pet" / "annotations" / "trainval.txt", "Abyssinian_1 1 1 1")
    image(tmp_path / "oxford-iiit-pet" / "images" / "Abyssinian_1.jpg", 0)
    savemat(tmp_path / "labels.mat", {"labels": [1]})
    text(tmp_path / "flowers-102" / "x", "")
    (tmp_path / "labels.mat").rename(tmp_path / "flowers-102" / "imagelabels.mat")
    for split in ("train", "val"):
        for label in VOC_CLASSES:
            text(tmp_path / "VOCdevkit/VOC2007/ImageSets/Main" / f"{label}_{split}.txt", "000001 1")
    image(tmp_path / "VOCdevkit/VOC2007/JPEGImages/000001.jpg", 0)
    text(tmp_path / file, content)
    with pytest.raises(UserError, match=expected) as refused:
        load(name, tmp_path, seed=0)
    assert str(tmp_path / file) in str(refused.value) and "not as published" in str(refused.value)


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(MissingSet, match="pet: expected one of food101, cifar10, .* or a folder of your own"):
        load("pet", tmp_path, seed=0)
    assert transfer.CALTECH_TRAINING_IMAGES == 30 and len(READERS) == 11
