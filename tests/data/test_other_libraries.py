"""Sets written by Hugging Face's `datasets` and by WebDataset with their own code: caco reads the same images, in the
same order, as from a folder.
"""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from caco import saying
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.folders import folder
from caco.data.sets.huggingface import huggingface
from caco.data.sets.reading import UnreadableImage
from caco.data.sets.webdataset import webdataset
from caco.data.views.augmentation import View, Views
from caco.errors import FileError, UserError

CLASSES = ["cats", "dogs"]
LONG = pytest.mark.long  # importing `datasets` takes seconds
VIEWS = Views(size=8, views={"two": View(count=2)}, mean=[0.5] * 3, std=[0.2] * 3)


def png(seed, array=None):
    array = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8) if array is None else array
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


IMAGES = {"train": [(png(i), i % 2) for i in range(10)], "test": [(png(100 + i), i % 2) for i in range(4)]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same images as files, in the same order."""
    root = tmp_path_factory.mktemp("plain")
    for split, images in IMAGES.items():
        for i, (content, label) in enumerate(images):
            (root / split / CLASSES[label]).mkdir(parents=True, exist_ok=True)
            (root / split / CLASSES[label] / f"{i:03}.png").write_bytes(content)
    return root


def saved(images, root, **columns):
    import datasets

    datasets.disable_progress_bars()

    def part(rows):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
        return datasets.Dataset.from_dict(
            {"image": [{"bytes": content, "path": None} for content, _ in rows], "label": [n for _, n in rows]},
            features,
        )

    datasets.DatasetDict({name: part(rows) for name, rows in images.items()}).save_to_disk(
        str(root), num_shards={name: 2 for name in images}
    )
    return root


def sharded(images, root, *, label=lambda n: {"cls": str(n)}, ending="png"):
    import webdataset

    for split, rows in images.items():
        (root / split).mkdir(parents=True)
        for shard in range(2):
            with webdataset.TarWriter(str(root / split / f"{shard:06}.tar")) as out:
                for i in range(shard, len(rows), 2):
                    out.write({"__key__": f"{i:03}", ending: rows[i][0], **label(rows[i][1])})
    return root


@pytest.fixture(scope="module")
def of_huggingface(tmp_path_factory):
    return saved(IMAGES, tmp_path_factory.mktemp("huggingface"))


@pytest.fixture(scope="module")
def of_webdataset(tmp_path_factory):
    return sharded(IMAGES, tmp_path_factory.mktemp("webdataset") / "shards")


def pixels(source):
    return {source.pixels(i).tobytes(): int(source.labels[i]) for i in range(len(source))}


@pytest.mark.parametrize("read", [huggingface, webdataset])
def test_images_and_labels_are_those_of_the_folder(read, plain, of_huggingface, of_webdataset):
    splits, expected = read(root=str(of_huggingface if read is huggingface else of_webdataset)), folder(root=str(plain))
    assert pixels(splits.train) == pixels(expected.train) and pixels(splits.test) == pixels(expected.test)
    assert splits.train.classes == (CLASSES if read is huggingface else None)
    (last,) = (splits.train.part(np.array([7, 2]), "some").part(np.array([1]), "one"),)
    assert np.array_equal(last.pixels(0), splits.train.pixels(2)) and last.labels.tolist() == [splits.train.labels[2]]


@pytest.mark.parametrize("read", [pytest.param(huggingface, marks=LONG), webdataset])
def test_views_depend_on_seed_epoch_image_and_view_alone(read, of_huggingface, of_webdataset):
    source = read(root=str(of_huggingface if read is huggingface else of_webdataset)).pretrain
    made = []
    for batch, workers in ((10, 0), (5, 2)):
        loader = TorchLoader(num_workers=workers).bind(source, VIEWS, batch=batch, seed=1)
        batches = [(one.index.clone(), one.views[1].clone()) for one in loader.epoch(2)]
        loader.close()
        made.append(torch.cat([views for _, views in batches])[torch.cat([index for index, _ in batches]).argsort()])
    assert torch.equal(*made)


@pytest.mark.parametrize(("read", "make"), [pytest.param(huggingface, saved, marks=LONG), (webdataset, sharded)])
def test_the_digest_is_that_of_the_images_and_not_of_where_they_lie(read, make, tmp_path):
    digest = read(root=str(make(IMAGES, tmp_path / "one"))).pretrain.digest()
    assert read(root=str(make(IMAGES, tmp_path / "two"))).pretrain.digest() == digest
    others = {**IMAGES, "train": [*IMAGES["train"][:-1], (png(999), 1)]}
    assert read(root=str(make(others, tmp_path / "three"))).pretrain.digest() != digest
    relabelled = {**IMAGES, "train": [*IMAGES["train"][:-1], (IMAGES["train"][-1][0], 0)]}
    assert read(root=str(make(relabelled, tmp_path / "four"))).pretrain.digest() != digest


@pytest.mark.parametrize(("read", "make"), [pytest.param(huggingface, saved, marks=LONG), (webdataset, sharded)])
def test_images_as_they_are_stored_come_from_there_too(read, make, tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (6, 6), dtype=np.uint16)
    root = make({"train": [(png(0, deep), 0), (png(0, deep.T.copy()), 1)]}, tmp_path / "deep")
    source = read(root=str(root), channels=1).pretrain
    assert np.array_equal(source.pixels(0)[:, :, 0], deep) and source.pixels(1).dtype == np.uint16
    with pytest.raises(UnreadableImage, match="data.channels=N"):
        read(root=str(root)).pretrain.pixels(0)


@pytest.mark.parametrize(("read", "make"), [pytest.param(huggingface, saved, marks=LONG), (webdataset, sharded)])
def test_a_damaged_image_is_called_by_where_it_stands(read, make, tmp_path):
    root = make({"train": [*IMAGES["train"][:3], (b"no image", 1)]}, tmp_path / "damaged")
    source = read(root=str(root)).pretrain
    wrong = [i for i in range(4) if source.labels[i] == 1 and source._called(i).endswith(("row 3", "003.png"))]
    with pytest.raises(UnreadableImage, match="huggingface/train row 3: |000001.tar/003.png: "):
        source.pixels(wrong[0])


@pytest.mark.parametrize(("read", "make"), [pytest.param(huggingface, saved, marks=LONG), (webdataset, sharded)])
def test_kept_in_memory_they_are_the_images_that_they_were(read, make, tmp_path):
    root = str(make({"train": [*IMAGES["train"], (b"no image", 1)]}, tmp_path / "set"))
    held, files = read(root=root).train, read(root=root, in_memory_mb=0).train
    assert files.arrays is None and len(held.arrays) == len(files) == 11 and held.digest() == files.digest()
    (wrong,) = held.damaged
    for i in set(range(11)) - {wrong}:
        assert np.array_equal(held.pixels(i), files.pixels(i)) and np.array_equal(held.arrays[i], files.pixels(i))
    with pytest.raises(UnreadableImage) as of_files:
        files.pixels(wrong)
    with pytest.raises(UnreadableImage) as of_memory:
        held.part(np.array([wrong, 0]), "some").pixels(0)
    assert str(of_files.value) == str(of_memory.value)


def test_shards_that_take_long_say_how_far_they_are(of_webdataset, monkeypatch, capsys):
    monkeypatch.setattr(saying, "_SECONDS", 0.0)
    webdataset(root=str(of_webdataset))
    told = capsys.readouterr().err
    assert "caco: shards of webdataset/train whose contents are listed: 1 of 2, " in told and " left" in told


@LONG
def test_a_run_learns_from_shards(of_webdataset, tmp_path):
    from tiny import train

    overrides = [
        "data=webdataset", f"data.root={of_webdataset}", "augmentation=cifar", "augmentation.size=16", "batch=10",
        "bank.size=20", "eval=[probe]",
        "max_steps=4",
    ]  # fmt: skip
    summary = train(tmp_path / "run", *overrides)
    assert summary["data"] == "webdataset/train" and "probe_top1" in summary


def test_shards_named_by_split_and_labels_in_json(tmp_path):
    import webdataset as library

    for name in ("train-0", "train-1", "val-0"):
        with library.TarWriter(str(tmp_path / f"{name}.tar")) as out:
            out.write({"__key__": name, "jpg": png(1), "json": b'{"class": 3}'})
    splits = webdataset(root=str(tmp_path), label="json:class")
    assert (len(splits.train), len(splits.test), splits.test.labels.tolist()) == (2, 1, [3])
    assert webdataset(root=str(tmp_path), label=None).train is None


def add(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return path.parent


def test_what_is_no_set_of_theirs_is_refused_by_what_is_wrong(tmp_path, plain, of_huggingface):
    for root, expected in (
        (plain, "data.root: expected a folder that datasets' save_to_disk wrote"),
        (
            of_huggingface,
            "data.image_column: expected the name of a column of Images, of which there are: image; got picture",
        ),
    ):
        with pytest.raises((FileError, UserError), match=expected):
            huggingface(root=str(root), image_column="picture")
    with pytest.raises(UserError, match="data.label_column: expected one of image, label, got class"):
        huggingface(root=str(of_huggingface), label_column="class")
    with pytest.raises(FileError, match=r"expected \*.tar, or train/\*.tar"):
        webdataset(root=str(plain))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(FileError, match="0.tar: expected an uncompressed tar file"):
        webdataset(root=str(tmp_path / "bad"))
    (tmp_path / "odd").mkdir()
    add(tmp_path / "odd" / "0.tar", ["a.png", "a.jpg", "a.cls"])
    with pytest.raises(UserError, match=r"0.tar/a: expected one image .* in each sample, got png, jpg"):
        webdataset(root=str(tmp_path / "odd"))
    (tmp_path / "none").mkdir()
    add(tmp_path / "none" / "0.tar", ["a.png"])
    with pytest.raises(UserError, match=r"0.tar/a: expected its label in 0.tar/a.cls, got none: data.label=ENDING"):
        webdataset(root=str(tmp_path / "none"))


@pytest.mark.parametrize(
    "label, expected",
    [
        ("1.5", "expected a whole number as its class"),
        ("true", "expected a whole number as its class"),
        ("Infinity", "expected a whole number as its class"),
        ("-1", "whole numbers from 0 to 999,999, got -1 for image 1"),
        ("20261129", "whole numbers from 0 to 999,999, got 20261129 for image 1"),
        ("1" * 30, r"expected labels that are one whole number for each image, got object"),
    ],
)
def test_a_label_that_is_no_classs_number_is_refused(tmp_path, label, expected):
    values = {0: "0", 1: label}
    sharded(
        {"train": [(png(i), i) for i in range(2)]},
        tmp_path,
        label=lambda n: {"json": b'{"class": %s}' % values[n].encode()},
    )
    with pytest.raises(UserError, match=expected):
        webdataset(root=str(tmp_path), label="json:class")


@LONG
def test_a_set_of_hugging_faces_that_is_damaged_or_has_several_labels_an_image_is_refused(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Sequence(datasets.Value("int64"))})
    rows = {"image": [{"bytes": png(0), "path": None}], "label": [[0, 1]]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "several"))
    with pytest.raises(UserError, match="expected a whole number or a text for each image in label"):
        huggingface(root=str(tmp_path / "several"))
    file = next((tmp_path / "several").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(FileError, match="several holds a data set that cannot be opened"):
        huggingface(root=str(tmp_path / "several"))
