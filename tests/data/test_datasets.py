"""Data sets on disk: every layout gives its images and labels, and a mistake in one is reported by name."""

import importlib
import inspect
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.folders import cifar10_jpeg75, digits, folder, imagenet, imagenet100, photo_tiles, tiny_imagenet
from caco.data.sets.imagenet100 import IMAGENET100_CLASSES
from caco.errors import FileError, UserError
from caco.evals.features import FeatureStore

CONF = Path(__file__).resolve().parents[2] / "conf"


def names(source) -> set[str]:
    return {str(source.path(i).relative_to(source.root)) for i in range(len(source))}


@pytest.fixture
def pets(tmp_path: Path, write_images: Callable) -> str:
    """A folder with train/ of 12 cats and 8 dogs, and test/ of 3 cats and 2 dogs."""
    for split, cats, dogs in (("train", 12, 8), ("test", 3, 2)):
        write_images(tmp_path / "pets" / split / "cat", cats)
        write_images(tmp_path / "pets" / split / "dog", dogs)
    return str(tmp_path / "pets")


# Configuration.


@pytest.mark.parametrize(
    "path", sorted(CONF.glob("data/*.yaml")) + [CONF / "loader" / "torch.yaml"], ids=lambda path: path.stem
)
def test_a_yaml_has_exactly_the_arguments_of_its_target_and_says_how_to_use_it(path):
    settings = OmegaConf.to_container(OmegaConf.load(path))
    module, _, name = settings.pop("_target_").rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert list(settings) == list(parameters)
    for key, value in settings.items():
        default = parameters[key].default
        assert value == default or (default is inspect.Parameter.empty and value is None)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(header) >= 2 and any("python -m caco.train" in line for line in header)


# digits


def test_digits_are_split_by_class_and_need_no_disk():
    splits = digits()
    assert (len(splits.train), len(splits.test)) == (1400, 397)
    assert splits.pretrain is splits.train
    assert splits.train.image(0).size == (16, 16) and splits.train.image(0).mode == "RGB"
    share = np.bincount(splits.train.labels) / np.bincount(np.concatenate([splits.train.labels, splits.test.labels]))
    assert (abs(share - 1400 / 1797) < 0.01).all()
    assert digits().train.digest() == splits.train.digest() != digits(seed=1).train.digest()


def test_digits_are_scikit_learns_pixels_each_once():
    from sklearn.datasets import load_digits

    splits = digits(size=8)
    ours = [np.asarray(source.image(i))[:, :, 0] for source in (splits.train, splits.test) for i in range(len(source))]
    labels = np.concatenate([splits.train.labels, splits.test.labels])
    scans = load_digits()
    theirs = np.round(scans.images * 255 / 16).astype(np.uint8)

    def keys(images, numbers):
        return sorted((image.tobytes(), int(number)) for image, number in zip(images, numbers, strict=True))

    assert keys(ours, labels) == keys(theirs, scans.target)


def test_digits_below_their_own_size_are_refused():
    with pytest.raises(ValueError, match="data.size: expected at least the scans' own 8 pixels, got 4"):
        digits(size=4)


# tiles of photographs


def test_tiles_are_the_pixels_of_the_two_photographs_each_once():
    from sklearn.datasets import load_sample_images

    splits = photo_tiles(size=128)
    assert (len(splits.train), len(splits.test)) == (24, 6) and splits.pretrain is splits.train
    ours = {
        (np.asarray(source.image(i)).tobytes(), int(source.labels[i]))
        for source in (splits.train, splits.test)
        for i in range(len(source))
    }
    photos = load_sample_images().images
    assert ours == {
        (photo[y * 128 : y * 128 + 128, x * 128 : x * 128 + 128].tobytes(), number)
        for number, photo in enumerate(photos) for y in range(3) for x in range(5)
    }  # fmt: skip
    assert [len(photo_tiles().train), len(photo_tiles().test)] == [416, 104]


@pytest.mark.parametrize("size", [7, 129])
def test_tiles_of_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"data.size: expected a tile of 8 to 128 pixels a side, got {size}"):
        photo_tiles(size=size)


# folder


@pytest.mark.parametrize("in_memory_mb", [0, 16])
def test_class_folders_are_labels(pets, in_memory_mb):
    splits = folder(root=pets, in_memory_mb=in_memory_mb)
    assert splits.pretrain is splits.train
    for source, cats, dogs in ((splits.train, 12, 8), (splits.test, 3, 2)):
        assert source.classes == ["cat", "dog"]
        assert source.labels.tolist() == [0] * cats + [1] * dogs
        for i in range(len(source)):
            assert source.path(i).parent.name == source.classes[source.labels[i]]
            assert np.array_equal(np.asarray(source.image(i)), np.asarray(Image.open(source.path(i))))
    assert splits.train.name == "folder/train" and splits.test.name == "folder/test"


def test_validation_images_serve_where_there_is_no_test(pets):
    Path(pets, "test").rename(Path(pets, "val"))
    assert len(folder(root=pets).test) == 5


def test_class_folders_alone_have_no_test(pets):
    splits = folder(root=f"{pets}/train")
    assert len(splits.train) == 20 and splits.test is None
    assert len(folder(root=f"{pets}/train", validation_fraction=0.25).test) == 5


def test_images_alone_are_unlabelled(tmp_path, write_images):
    write_images(tmp_path, 6)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    splits = folder(root=str(tmp_path))
    assert len(splits.pretrain) == 6 and splits.pretrain.labels is None and splits.train is None and splits.test is None
    assert len(folder(root=str(tmp_path), limit=4).pretrain) == 4


def test_unlabelled_images_are_evaluated_on_a_labelled_folder(tmp_path, write_images, pets):
    write_images(tmp_path / "photos" / "2019" / "summer", 5)
    write_images(tmp_path / "photos", 4)
    splits = folder(root=str(tmp_path / "photos"), labelled_root=pets, limit=7)
    assert len(splits.pretrain) == 7 and splits.pretrain.labels is None
    assert (len(splits.train), len(splits.test)) == (20, 5)
    assert splits.train.labels is not None
    with pytest.raises(
        ValueError, match="data.labelled_root: expected class folders below .*photos/2019/summer, got images without"
    ):
        folder(root=pets, labelled_root=str(tmp_path / "photos" / "2019" / "summer"))


def test_a_class_list_chooses_and_orders_classes(pets, tmp_path, write_images):
    write_images(Path(pets, "train", "bird"), 2)
    write_images(Path(pets, "test", "bird"), 1)
    listed = tmp_path / "classes.txt"
    listed.write_text("dog\nbird\n")
    splits = folder(root=pets, class_list=str(listed))
    assert splits.train.classes == ["dog", "bird"] == splits.test.classes
    assert np.bincount(splits.train.labels).tolist() == [8, 2] and np.bincount(splits.test.labels).tolist() == [2, 1]


def test_an_unknown_class_in_a_list_is_named_with_its_near_match(pets, tmp_path):
    listed = tmp_path / "classes.txt"
    listed.write_text("cat\ndogg\n")
    with pytest.raises(ValueError, match=r"all of 2 classes among the 2 there, got 1 unknown: 'dogg' \(near: 'dog'\)"):
        folder(root=pets, class_list=str(listed))
    listed.write_text("cat\ncat\n")
    with pytest.raises(ValueError, match="data.class_list: expected distinct names"):
        folder(root=pets, class_list=str(listed))
    with pytest.raises(FileError, match="data.class_list: expected a text file .* got nowhere.txt"):
        folder(root=pets, class_list="nowhere.txt")
    with pytest.raises(ValueError, match="data.class_list: expected class folders in .*cat, got images without labels"):
        listed.write_text("cat\n")
        folder(root=f"{pets}/train/cat", class_list=str(listed))


def test_names_that_look_the_same_in_composed_and_decomposed_unicode_are_told_apart(pets, tmp_path, write_images):
    """macOS and some archives store an accent as a character of its own; a refusal shows why equal names differ."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_images(Path(pets, "train", composed), 2)
    write_images(Path(pets, "test", decomposed), 1)
    with pytest.raises(ValueError, match="look the same but have .*composed and decomposed Unicode.*rename one"):
        folder(root=pets)
    listed = tmp_path / "classes.txt"
    listed.write_text(f"cat\n{decomposed}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'cafe.u0301', 'caf.xe9'"):
        folder(root=pets, class_list=str(listed))


def test_a_test_class_that_training_lacks_is_named(pets, write_images):
    write_images(Path(pets, "test", "bird"), 1)
    with pytest.raises(ValueError, match="got 1 unknown: 'bird'"):
        folder(root=pets)


@pytest.mark.parametrize("in_memory_mb", [0, 16])
def test_a_limit_takes_equally_from_the_classes_and_leaves_the_test_alone(pets, in_memory_mb):
    splits = folder(root=pets, limit=10, in_memory_mb=in_memory_mb)
    assert np.bincount(splits.train.labels).tolist() == [5, 5]
    assert splits.pretrain is splits.train and len(splits.test) == 5
    assert names(folder(root=pets, limit=10).train) == names(splits.train)
    assert names(folder(root=pets, limit=10, seed=1).train) != names(splits.train)


def test_held_out_images_are_never_trained_on_and_replace_the_test_images(pets):
    splits = folder(root=pets, validation_fraction=0.25)
    assert np.bincount(splits.test.labels).tolist() == [3, 2]
    assert names(splits.train) | names(splits.test) == names(folder(root=pets).train)
    assert not names(splits.train) & names(splits.test)
    assert splits.pretrain is splits.train
    assert splits.test.root.name == "train" and splits.test.name == "folder/validation"
    limited = folder(root=pets, validation_fraction=0.25, limit=6)
    assert names(limited.test) == names(splits.test) and names(limited.train) < names(splits.train)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.001])
def test_a_share_that_holds_nothing_or_everything_out_is_refused(pets, fraction):
    with pytest.raises(
        ValueError, match=r"data.validation_fraction: expected a share in \(0, 1\) of the 20 images, got"
    ):
        folder(root=pets, validation_fraction=fraction)


def test_a_limit_beyond_the_data_is_refused(pets):
    with pytest.raises(ValueError, match=r"data.limit: expected a number of images in 1\.\.20, got 21"):
        folder(root=pets, limit=21)


@pytest.mark.parametrize("load", [folder, cifar10_jpeg75, imagenet, imagenet100, tiny_imagenet])
def test_a_missing_root_takes_two_lines_to_put_right(load):
    for root, got in ((None, "got none"), ("/no/such/place", "got /no/such/place, which is not a folder")):
        with pytest.raises(FileError) as caught:
            load(root=root)
        first, second = str(caught.value).splitlines()
        assert "data.root=PATH" in first and got in first and "preset=demo" in second


def test_an_empty_folder_is_refused(tmp_path, write_images):
    with pytest.raises(ValueError, match=r"expected images \(\.jpg, .* got none"):
        folder(root=str(tmp_path))
    write_images(tmp_path / "train" / "cat", 2)
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match="train/dog: expected images .* got none in this class folder"):
        folder(root=str(tmp_path))


def test_an_unreadable_image_of_a_small_set_is_named_before_training(pets, two_views):
    for number in ("0003", "0005"):
        Path(pets, "train", "dog", f"{number}.png").write_bytes(b"broken")
    splits = folder(root=pets)
    with pytest.raises(
        UserError, match=r"train/dog/0003\.png: expected an image .* 1 more of folder/train cannot be read either"
    ):
        TorchLoader().bind(splits.train, two_views, batch=4, seed=0)
    with pytest.raises(UserError, match=r"train/dog/0003\.png"):
        FeatureStore(splits, two_views, batch=4, device="cpu", precision="fp32")


# Sets with a name.


def test_the_jpeg_copy_of_cifar10_is_never_called_cifar10(pets):
    splits = cifar10_jpeg75(root=pets, limit=4)
    assert [source.name for source in (splits.pretrain, splits.test)] == ["cifar10-jpeg75/train", "cifar10-jpeg75/test"]


def test_imagenet_has_train_and_val_of_wnids(tmp_path, write_images):
    for split, count in (("train", 3), ("val", 2)):
        for wnid in ("n01440764", "n02869837"):
            write_images(tmp_path / split / wnid, count, suffix=".JPEG")
    splits = imagenet(root=str(tmp_path))
    assert (len(splits.train), len(splits.test)) == (6, 4) and splits.train.classes == ["n01440764", "n02869837"]
    with pytest.raises(ValueError, match="got 99 unknown"):
        imagenet100(root=str(tmp_path))
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="expected a folder .*val, but it does not exist"):
        imagenet(root=str(tmp_path))
    write_images(tmp_path / "val", 2, suffix=".JPEG")
    with pytest.raises(ValueError, match="val: expected class folders, got images without labels: sort them"):
        imagenet(root=str(tmp_path))


def test_imagenet100_takes_its_published_classes_from_imagenet(tmp_path, write_images):
    assert len(set(IMAGENET100_CLASSES)) == 100
    for split in ("train", "val"):
        for wnid in (*IMAGENET100_CLASSES, "n01440764"):
            write_images(tmp_path / split / wnid, 1, size=2)
    splits = imagenet100(root=str(tmp_path))
    assert (len(splits.train), len(splits.test)) == (100, 100) and "n01440764" not in splits.train.classes
    assert splits.train.name == "imagenet100/train"


def test_tiny_imagenet_reads_its_validation_labels(tmp_path, write_images):
    for wnid in ("n01", "n02"):
        write_images(tmp_path / "train" / wnid / "images", 3, suffix=".JPEG")
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t62\t62\n")
    write_images(tmp_path / "val" / "images", 4, suffix=".JPEG")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text(
        "".join(f"{i:04d}.JPEG\t{wnid}\t0\t0\t9\t9\n" for i, wnid in enumerate(["n02", "n01", "n01", "n02"]))
    )
    splits = tiny_imagenet(root=str(tmp_path))
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and splits.test.labels.tolist() == [1, 0, 0, 1]
    assert splits.test.classes == splits.train.classes == ["n01", "n02"]
    assert splits.test.path(2).name == "0002.JPEG"
    annotations.write_text("0000.JPEG\tn03\t0\t0\t9\t9\n")
    with pytest.raises(ValueError, match="val_annotations.txt: .* got 1 unknown: 'n03'"):
        tiny_imagenet(root=str(tmp_path))
    annotations.unlink()
    with pytest.raises(FileError, match="expected the validation labels in .*val_annotations.txt"):
        tiny_imagenet(root=str(tmp_path))


# Real images.


def unzip(shared_data: Path, name: str, target: Path, wanted: Callable[[str], bool]) -> None:
    archive = shared_data / name
    if not archive.is_file():
        pytest.skip(f"needs {archive}, which is not there")
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(target, [entry for entry in zipped.namelist() if wanted(entry)])


def test_real_cifar_jpegs_are_read(shared_data, tmp_path):
    unzip(shared_data, "cifar10.zip", tmp_path, lambda name: name[-8:-4] in ("0000", "0001", "0002"))
    splits = cifar10_jpeg75(root=str(tmp_path), limit=20)
    assert np.bincount(splits.train.labels).tolist() == [2] * 10 and len(splits.test) == 30
    assert splits.train.classes[0] == "airplane" and splits.train.image(0).size == (32, 32)
    assert splits.train.digest() == cifar10_jpeg75(root=str(tmp_path), limit=20).train.digest()


def test_real_photographs_are_read_as_an_unlabelled_folder(shared_data, tmp_path):
    unzip(shared_data, "imagenet-samples.zip", tmp_path, lambda name: "n01" in name)
    source = folder(root=str(tmp_path / "samples")).pretrain
    assert source.labels is None and len(source) >= 10
    assert min(source.image(0).size) > 100
