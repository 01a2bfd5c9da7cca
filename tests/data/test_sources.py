"""Image sources: files and arrays give the same images, parts keep theirs, digests recognise them, and subsets are
drawn evenly.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caco.data.sets.choosing import choose
from caco.data.sets.image_files import ImageFiles
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.reading import read_image
from caco.data.sets.sources import Splits


@pytest.fixture
def files(tmp_path: Path, write_images) -> ImageFiles:
    write_images(tmp_path / "a", 3)
    write_images(tmp_path / "b", 2, size=10)
    names = [f"a/{i:04d}.png" for i in range(3)] + [f"b/{i:04d}.png" for i in range(2)]
    return ImageFiles(tmp_path, names, name="few", labels=np.array([0, 0, 0, 1, 1]), classes=["a", "b"])


def pixels(source) -> list[np.ndarray]:
    return [np.asarray(source.image(i)) for i in range(len(source))]


def assert_equal_images(ours, theirs) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(pixels(ours), pixels(theirs), strict=True))


def test_images_kept_in_memory_are_the_images_on_disk(files):
    kept = files.in_memory(1)
    before = pixels(files)
    assert kept.digest() == files.digest()
    for path in files.root.rglob("*.png"):
        path.unlink()
    assert all(np.array_equal(a, b) for a, b in zip(pixels(kept), before, strict=True))
    assert kept.labels.tolist() == files.labels.tolist() and kept.classes == files.classes and len(kept) == 5


def test_what_exceeds_the_memory_stays_on_disk(tmp_path, write_images):
    write_images(tmp_path, 30, size=200)  # 3.4 MB decoded
    source = ImageFiles(tmp_path, [f"{i:04d}.png" for i in range(30)], name="large")
    assert source.in_memory(0) is source
    assert source.in_memory(3) is source
    assert source.in_memory(4) is not source


def test_an_estimate_that_was_too_low_does_not_exceed_the_memory(tmp_path, write_images):
    """The estimate is too low because the images whose headers it reads are the small ones."""
    write_images(tmp_path, 40, size=8)
    looked_at = np.unique(np.linspace(0, 39, 16).astype(int))
    for i in set(range(40)) - set(looked_at.tolist()):
        Image.new("RGB", (300, 300)).save(tmp_path / f"{i:04d}.png")
    source = ImageFiles(tmp_path, [f"{i:04d}.png" for i in range(40)], name="uneven")
    assert source.in_memory(2) is source


@pytest.mark.parametrize("kept", [False, True])
def test_a_part_has_the_images_and_labels_of_its_positions(files, kept):
    source = files.in_memory(1) if kept else files
    part = source.part(np.array([1, 4]), "part")
    assert part.name == "part" and part.labels.tolist() == [0, 1] and part.classes == ["a", "b"]
    assert all(np.array_equal(a, pixels(files)[i]) for a, i in zip(pixels(part), [1, 4], strict=True))


def test_a_part_of_an_array_has_the_images_of_its_positions():
    source = ImagesInMemory(
        np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3), name="four", labels=np.array([3, 2, 1, 0])
    )
    part = source.part(np.array([2, 0]), "two")
    assert part.labels.tolist() == [1, 3]
    assert np.array_equal(pixels(part)[0], pixels(source)[2]) and np.array_equal(pixels(part)[1], pixels(source)[0])


def test_a_digest_is_stable_and_knows_contents_labels_and_order(files):
    assert files.digest() == ImageFiles(files.root, files._files, name="other", labels=files.labels).digest()
    assert files.part(np.arange(4), "x").digest() != files.digest()
    assert ImageFiles(files.root, files._files, name="few", labels=np.array([0, 0, 1, 1, 1])).digest() != files.digest()
    before = files.digest()
    (files.root / "a" / "0001.png").write_bytes(b"shorter")
    assert files.digest() != before

    images = np.zeros((3, 2, 2, 3), np.uint8)
    black = ImagesInMemory(images, name="black")
    changed = images.copy()
    changed[2, 1, 1, 1] = 1
    assert black.digest() == ImagesInMemory(images.copy(), name="same").digest()
    assert black.digest() != ImagesInMemory(changed, name="changed").digest()
    assert ImagesInMemory(changed, name="x").digest() != ImagesInMemory(changed[::-1], name="turned").digest()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_image_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new("RGB", (5, 4), (200, 100, 50)).convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (5, 4)


def test_an_unreadable_image_is_named(tmp_path, write_images):
    write_images(tmp_path, 3, suffix=".jpg")
    cut = tmp_path / "0001.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    (tmp_path / "0002.jpg").unlink()
    with pytest.raises(ValueError, match=r"0001\.jpg: expected an image that can be read, got OSError: "):
        read_image(cut)
    with pytest.raises(ValueError, match=r"0002\.jpg: .* FileNotFoundError"):
        read_image(tmp_path / "0002.jpg")
    held = ImageFiles(tmp_path, ["0000.jpg", "0001.jpg"], name="cut").in_memory(1)
    assert list(held.damaged) == [1] and held.image(0).size == (8, 8)
    with pytest.raises(ValueError, match=r"0001\.jpg"):
        held.image(1)
    assert list(held.part(np.array([1, 0]), "turned").damaged) == [0]


# Draws.


def test_a_balanced_draw_has_equally_many_of_each_class_as_far_as_they_go():
    labels = np.repeat([0, 1, 2], [50, 30, 4])
    chosen = choose(labels, 24, 84, seed=0, balanced=True)
    assert np.bincount(labels[chosen]).tolist() == [10, 10, 4]
    assert (np.diff(chosen) > 0).all()


def test_a_stratified_draw_has_the_classes_in_proportion():
    labels = np.repeat([0, 1, 2], [500, 300, 40])
    assert np.bincount(labels[choose(labels, 84, 840, seed=0, balanced=False)]).tolist() == [50, 30, 4]


@pytest.mark.parametrize("labels", [None, np.arange(60) % 4])
def test_a_draw_follows_its_seed_and_a_smaller_one_is_inside_a_larger(labels):
    def draw(count, seed):
        return set(choose(labels, count, 60, seed=seed, balanced=True).tolist())

    assert draw(20, 0) == draw(20, 0) != draw(20, 1)
    assert draw(10, 0) < draw(20, 0) < draw(40, 0)
    assert len(draw(60, 0)) == 60


def test_a_draw_does_not_favour_a_class_with_the_odd_image():
    labels = np.arange(40) % 4
    odd = [
        np.bincount(labels[choose(labels, 5, 40, seed=seed, balanced=True)], minlength=4).argmax() for seed in range(60)
    ]
    assert set(odd) == {0, 1, 2, 3}


@pytest.mark.parametrize("count", [0, 61])
def test_a_draw_of_more_than_there_is_is_refused(count):
    with pytest.raises(ValueError, match=rf"expected a number of images in 1\.\.60, got {count}"):
        choose(None, count, 60, seed=0, balanced=True)


def test_an_evaluation_without_labels_is_told_what_to_give(files):
    labelled = Splits(files, files, files.part(np.arange(2), "test"))
    assert labelled.labelled("k-NN") == (labelled.train, labelled.test)
    unlabelled = ImageFiles(files.root, files._files, name="photos")
    message = (
        r"k-NN needs labelled train and test images; .* no labelled {} split with photos\.\nGive data\.labelled_root"
    )
    with pytest.raises(ValueError, match=message.format("train")):
        Splits(unlabelled, None, None).labelled("k-NN")
    with pytest.raises(ValueError, match=message.format("test")):
        Splits(unlabelled, files, None).labelled("k-NN")
    with pytest.raises(ValueError, match=message.format("test")):
        Splits(unlabelled, files, unlabelled).labelled("k-NN")
