"""Features on disk: computed once for each (backbone, images, view, precision), continued after a kill, and
memory-mapped instead of read.
"""

import copy
import json
import resource

import numpy as np
import pytest
import torch
from torch import nn

from caco import errors
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.sources import Splits
from caco.errors import FileError
from caco.evals.evaluation import Evaluation
from caco.evals.extraction import network_digest
from caco.evals.feature_files import FeatureFiles, key_of
from caco.evals.knn import KNN
from caco.evals.probe import Probe


class Counting(nn.Module):
    """A backbone that counts its images."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.images = inner, 0

    def forward(self, images):
        self.images += len(images)
        return self.inner(images)


def test_features_on_disk_are_those_in_memory_and_made_once(tmp_path, store_of, colours):
    expected = store_of().features(colours, "train")
    store, backbone = store_of(folder=tmp_path), Counting(colours)
    for _ in range(2):
        store.forget()
        torch.testing.assert_close(store.features(backbone, "train"), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(store.features(backbone, "train", np.array([7, 3])), expected[[7, 3]], rtol=0, atol=1e-6)
    assert backbone.images == 60 + 2


@pytest.mark.parametrize("change", ["weights", "images", "precision", "view"])
def test_whatever_changes_a_number_makes_other_features(tmp_path, store_of, colours, change):
    store, backbone = store_of(folder=tmp_path), Counting(colours)
    store.features(backbone, "test")
    if change == "weights":
        with torch.no_grad():
            colours.norm.running_mean[0] += 1
        store.forget()
    elif change == "images":
        pixels = np.stack([np.asarray(store.splits.test.image(i)) for i in range(30)])
        pixels[4, 0, 0, 0] ^= 1
        test = ImagesInMemory(pixels, name="test", labels=store.splits.test.labels)
        store.splits = Splits(store.splits.pretrain, store.splits.train, test)
    elif change == "precision":
        store.precision = "bf16"
    else:
        store.views.plain_interpolation = "bicubic"
    store.features(backbone, "test")
    assert backbone.images == 60


def test_bf16_features_take_two_bytes_a_number_and_evaluators_read_them(tmp_path, store_of, colours):
    class Half(nn.Module):
        def forward(self, images):
            return colours(images).bfloat16()

    store = store_of(folder=tmp_path)
    assert store.features(Half(), "test").dtype == torch.bfloat16
    [file] = (tmp_path / "features").glob("*.bin")
    assert file.stat().st_size == 30 * 4 * 2
    evaluators = {"knn": KNN(k=3), "probe": Probe()}
    settings = {"batch": 8, "device": "cpu", "precision": "fp32", "seed": 0}
    results = [
        Evaluation(evaluators, store.splits, store.views, **settings, folder=folder).run(Half(), "end")
        for folder in (None, tmp_path)
    ]
    assert results[0] == results[1] == {"knn3_top1": 100.0, "probe_top1": 100.0}


class Cut(BaseException):
    pass


@pytest.mark.parametrize("kept_batches, torn_bytes", [(0, 5), (1, 0), (2, 7)])
def test_a_file_that_a_kill_cut_off_is_gone_on_with_at_a_whole_batch(tmp_path, kept_batches, torn_bytes):
    whole = torch.arange(35, dtype=torch.float32).view(7, 5)
    asked = []

    def make(first, take):
        asked.append(first)
        for rows in whole[first:].split(3):
            if len(asked) == 1 and rows[0, 0] >= 15 * kept_batches:
                raise Cut
            take(rows, torch.zeros(len(rows)))

    files = FeatureFiles(tmp_path)
    with pytest.raises(Cut):
        files.get({"a": 1}, 7, make, batch=3)
    [*partial] = tmp_path.glob("*.partial")
    with open(partial[0], "ab") as file:
        file.write(bytes(torn_bytes))
    (tmp_path / f".{key_of({'a': 1})}.json.4711").write_text("{")  # a header that a killed process was writing
    assert torch.equal(files.get({"a": 1}, 7, make, batch=3), whole)
    assert asked == [0, 3 * kept_batches] and {path.suffix for path in tmp_path.iterdir()} == {".bin", ".json", ".lock"}
    files.get({"a": 1}, 7, lambda first, take: pytest.fail("made a second time"), batch=3)
    about = json.loads((tmp_path / f"{key_of({'a': 1})}.json").read_text())
    assert about == {"width": 5, "dtype": "float32", "made_from": {"a": 1}}


@pytest.mark.parametrize("damage", ["short", "long", "header", "no header", "another header"])
def test_files_that_were_damaged_are_made_anew(tmp_path, damage):
    numbers = torch.arange(6.0).view(3, 2)
    asked = []

    def make(first, take):
        asked.append(first)
        take(numbers[first:], torch.zeros(3 - first))

    def get():
        return FeatureFiles(tmp_path).get({"x": 1}, 3, make, batch=1).clone()

    assert torch.equal(get(), numbers) and torch.equal(get(), numbers) and asked == [0]
    (file,), (header,) = tmp_path.glob("*.bin"), tmp_path.glob("*.json")
    if "header" in damage:
        header.write_text("{" if damage == "header" else '{"width": 7, "dtype": "none"}')
        if damage == "no header":
            header.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-4] if damage == "short" else file.read_bytes() * 2)
    assert torch.equal(get(), numbers) and asked == [0, 0]


def test_a_full_disk_is_said_with_the_files_name(tmp_path):
    numbers = torch.zeros(1000, 8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))  # an error, as a full disk is
    try:
        with pytest.raises(FileError) as error:
            FeatureFiles(tmp_path).get({}, 1000, lambda first, take: take(numbers, torch.zeros(1000)), batch=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ".partial: File too large" in errors.message(error.value)


def test_a_networks_digest_is_of_its_structure_and_every_number(colours):
    twin = copy.deepcopy(colours)
    assert network_digest(colours) == network_digest(twin)
    twin.norm.eps = 1e-3
    assert network_digest(colours) != network_digest(twin)
    twin = copy.deepcopy(colours)
    twin.norm.num_batches_tracked += 1
    assert network_digest(colours) != network_digest(twin)


def test_a_test_class_without_training_images_is_refused_by_name(store_of):
    store = store_of()
    few = store.splits.train.part(np.flatnonzero(store.splits.train.labels != 2), "few")
    store.splits = Splits(few, few, store.splits.test)
    with pytest.raises(ValueError, match="test: expected no class that few has no image of, got 1: blue"):
        store.labels("k-NN")
