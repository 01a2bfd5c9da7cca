"""Sets that torchvision can download, tested with tiny files in their published layouts."""

import gzip
import io
import pickle
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import STL10, cifar, utils

from caco.data.sets.downloaded import cifar10, cifar100, fashion_mnist, stl10
from caco.errors import FileError


class Old(pickle.Pickler):
    """Pickles a dtype as in 2009, with numbers for booleans. The published files do so, and numpy 2.4 warns of it."""

    def reducer_override(self, value):
        if isinstance(value, np.dtype):
            return np.dtype, (value.str[1:], 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def dump(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Old(file, protocol=2).dump(content)
    path.write_bytes(file.getvalue().replace(b"numpy._core.", b"numpy.core."))


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


@pytest.fixture
def any_checksum(monkeypatch) -> None:
    """Accept any checksum, because the tiny files do not have the published checksums."""
    for module in (cifar, utils):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda path, md5=None: Path(path).is_file())


def write_cifar10(root: Path) -> None:
    for i in range(5):
        dump(root / "cifar-10-batches-py" / f"data_batch_{i + 1}", {"data": rows(4, i), "labels": [0, 1, 2, 9]})
    dump(root / "cifar-10-batches-py" / "test_batch", {"data": rows(3, 9), "labels": [9, 8, 7]})
    dump(root / "cifar-10-batches-py" / "batches.meta", {"label_names": [f"class{i}" for i in range(10)]})


def test_cifar10_is_read_in_its_published_layout(tmp_path, any_checksum):
    write_cifar10(tmp_path)
    splits = cifar10(root=str(tmp_path))
    assert (len(splits.train), len(splits.test)) == (20, 3) and splits.pretrain is splits.train
    assert splits.train.labels.tolist() == [0, 1, 2, 9] * 5 and splits.test.labels.tolist() == [9, 8, 7]
    assert splits.train.classes[9] == "class9" and splits.train.name == "cifar10/train"
    # a row has the red plane, then the green, then the blue
    expected = rows(4, 1)[2].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(splits.train.image(6)), expected)


def test_cifar10_can_be_limited_and_hold_images_out(tmp_path, any_checksum):
    write_cifar10(tmp_path)
    splits = cifar10(root=str(tmp_path), limit=8, validation_fraction=0.2)
    assert np.bincount(splits.train.labels)[[0, 1, 2, 9]].tolist() == [2] * 4
    assert len(splits.test) == 4 and splits.test.name == "cifar10/validation"


def test_cifar100_has_its_fine_labels(tmp_path, any_checksum):
    top = tmp_path / "cifar-100-python"
    dump(top / "train", {"data": rows(4, 0), "fine_labels": [99, 5, 5, 0], "coarse_labels": [1, 1, 1, 1]})
    dump(top / "test", {"data": rows(2, 1), "fine_labels": [7, 8], "coarse_labels": [0, 0]})
    dump(top / "meta", {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": []})
    splits = cifar100(root=str(tmp_path))
    assert splits.train.labels.tolist() == [99, 5, 5, 0] and splits.test.classes[7] == "fine7"


@pytest.fixture
def stl_root(tmp_path, any_checksum) -> str:
    top = tmp_path / STL10.base_folder
    top.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 3), ("unlabeled", 5)):
        generator.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(top / f"{split}_X.bin")
    np.array([1, 10, 3, 3], np.uint8).tofile(top / "train_y.bin")
    np.array([2, 1, 1], np.uint8).tofile(top / "test_y.bin")
    (top / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    return str(tmp_path)


def test_stl10_pretrains_on_its_unlabelled_images(stl_root):
    splits = stl10(root=stl_root)
    assert (len(splits.pretrain), len(splits.train), len(splits.test)) == (5, 4, 3)
    assert splits.pretrain.labels is None and splits.train.labels.tolist() == [0, 9, 2, 2]
    theirs = STL10(stl_root, split="unlabeled")
    for i in range(5):
        assert np.array_equal(np.asarray(splits.pretrain.image(i)), np.asarray(theirs[i][0]))
    assert np.array_equal(np.asarray(splits.train.image(1)), np.asarray(STL10(stl_root, split="train")[1][0]))
    assert len(stl10(root=stl_root, limit=2).pretrain) == 2
    labelled = stl10(root=stl_root, pretrain="train", limit=3)
    assert labelled.pretrain is labelled.train and len(labelled.train) == 3
    with pytest.raises(ValueError, match="data.pretrain: expected unlabeled or train, got 'everything'"):
        stl10(root=stl_root, pretrain="everything")


@pytest.mark.parametrize("load", [cifar10, cifar100, fashion_mnist, stl10])
def test_a_missing_set_takes_two_lines_to_put_right(load, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for options, got in (
        ({"root": None}, "got none"),
        ({"root": str(tmp_path / "new")}, "Network is unreachable"),
        ({"root": str(tmp_path), "download": False}, "got RuntimeError"),
    ):
        with pytest.raises(FileError) as caught:
            load(**options)
        first, second = str(caught.value).splitlines()
        assert (
            f"data={load.__name__}" in first
            and "data.root=" in first
            and re.search(got, first)
            and "preset=demo" in second
        )
    assert socket.getdefaulttimeout() is None


def test_download_happens_once_and_only_where_files_are_missing(tmp_path, monkeypatch, any_checksum):
    fetched = []

    def fetch(url, root, **options):
        fetched.append(url)
        write_cifar10(Path(root))

    monkeypatch.setattr(cifar, "download_and_extract_archive", fetch)
    assert len(cifar10(root=str(tmp_path / "new")).train) == 20
    assert len(cifar10(root=str(tmp_path / "new")).train) == 20
    assert len(fetched) == 1


def write_fashion(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the four files in their published layout, with six and four images that contain all greys and all
    labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    grey, labels = generator.integers(0, 256, (10, 28, 28), dtype=np.uint8), np.arange(10, dtype=np.uint8)
    for prefix, part in (("train", slice(6)), ("t10k", slice(6, None))):
        for kind, values in (("images", grey[part]), ("labels", labels[part])):
            sizes = np.array(values.shape, ">i4").tobytes()
            content = bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()
            (folder / f"{prefix}-{kind}-idx{values.ndim}-ubyte.gz").write_bytes(gzip.compress(content))
    return grey, labels


def test_fashion_mnist_is_read_as_debian_has_it_and_as_torchvision_does(tmp_path, any_checksum, monkeypatch):
    grey, labels = write_fashion(tmp_path / "debian")
    splits = fashion_mnist(root=str(tmp_path / "debian"))
    assert splits.train.labels.tolist() == labels[:6].tolist() and splits.test.labels.tolist() == labels[6:].tolist()
    assert splits.train.name == "fashion_mnist/train" and splits.train.classes[9] == "Ankle boot"
    for i in range(6):
        assert np.array_equal(np.asarray(splits.train.image(i)), np.stack([grey[i]] * 3, 2))

    raw = tmp_path / "theirs" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (tmp_path / "debian").iterdir():
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    monkeypatch.setattr("torchvision.datasets.mnist.check_integrity", lambda path: Path(path).is_file())
    theirs = fashion_mnist(root=str(tmp_path / "theirs"), download=False)
    assert (
        np.array_equal(np.asarray(theirs.test.image(3)), np.asarray(splits.test.image(3)))
        and theirs.train.digest() == splits.train.digest()
    )


@pytest.mark.parametrize(
    "damage",
    [b"", b"no gzip", gzip.compress(bytes([0, 0, 8, 3] + 40 * [0]), mtime=0), gzip.compress(b"\0" * 3, mtime=0)],
    ids=["empty", "no gzip", "too short", "no header"],
)
def test_a_damaged_file_of_fashion_mnist_is_named(tmp_path, damage):
    write_fashion(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(damage)
    with pytest.raises(FileError, match="t10k-images-idx3-ubyte.gz is not the published file of Fashion-MNIST"):
        fashion_mnist(root=str(tmp_path))


def test_labels_that_are_not_those_of_the_images_are_refused(tmp_path):
    write_fashion(tmp_path)
    of_test = tmp_path / "t10k-labels-idx1-ubyte.gz"
    of_train = (tmp_path / "train-labels-idx1-ubyte.gz").read_bytes()
    for labels in (of_train, gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 4, 0, 1, 2, 10]))):
        of_test.write_bytes(labels)
        with pytest.raises(FileError, match="expected a label from 0 to 9 for each image of test"):
            fashion_mnist(root=str(tmp_path))
    of_test.write_bytes(gzip.compress(bytes(2**28 + 1), 1))
    with pytest.raises(FileError, match="it unpacks to more than 268,435,456 bytes"):
        fashion_mnist(root=str(tmp_path))


def test_without_debian_s_files_it_is_said_how_they_come(monkeypatch, tmp_path):
    monkeypatch.setattr("caco.data.sets.downloaded.FASHION_OF_DEBIAN", str(tmp_path))
    with pytest.raises(FileError, match=r"apt install dataset-fashion-mnist\), or data.root=PATH"):
        fashion_mnist(root=str(tmp_path))
