"""Evaluations read images with the loader's workers, in bounded memory, and report their progress."""

import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from caco import saying
from caco.data.loaders import plain
from caco.data.loaders.ffcv_loader import AutoLoader, FFCVLoader
from caco.data.loaders.images import Images
from caco.data.loaders.plain import plain_batches
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.loaders.workers import in_order
from caco.data.sets.folders import folder
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.sources import Splits
from caco.data.views.augmentation import View, Views
from caco.evals.evaluation import Evaluation
from caco.evals.finetune import FineTune
from caco.evals.geometry import Geometry
from caco.evals.knn import KNN
from caco.evals.linear import Linear
from caco.evals.probe import Probe
from caco.saying import counting


class Where(ImagesInMemory):
    """A source whose images are read one by one, and which remembers the processes that read them."""

    def __init__(self, count):
        images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        super().__init__(images, name="where", labels=np.arange(count) % 3, classes=["a", "b", "c"])
        self.hidden, self.arrays = self.arrays, None
        self.here = multiprocessing.get_context("fork").Value("i", 0)

    def __len__(self):
        return len(self.hidden)

    def image(self, index):
        if multiprocessing.parent_process() is None:
            self.here.value += 1
        return Image.fromarray(self.hidden[index])

    def part(self, indices, name):
        made = object.__new__(Where)
        made.__dict__.update(self.__dict__)
        made.hidden, made.labels, made.name = self.hidden[indices], self.labels[indices], name
        return made

    def digest(self):
        return "where"


VIEWS = Views(size=8, plain_crop=1.0, views={"two": View(count=2)}, mean=[0.5] * 3, std=[0.25] * 3)


class Flat(nn.Module):
    num_features = 12

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.mark.parametrize(
    "evaluator",
    [
        KNN(k=3),
        Probe(),
        Geometry(images=20),
        Linear(epochs=1, batch=10, larc=False),
        FineTune(name="x", batch=10, epochs=[1], unit="step"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_no_evaluator_reads_an_image_in_the_process_that_waits_for_it(evaluator):
    train, test = Where(30), Where(12)
    settings = {"batch": 8, "device": "cpu", "precision": "fp32", "seed": 0, "loader": TorchLoader(num_workers=1)}
    evaluation = Evaluation({"it": evaluator}, Splits(train, train, test), VIEWS, **settings)
    evaluation.store.cache_bytes = 0
    assert evaluation.run(
        (
            Flat().requires_grad_(False)
            if not isinstance(evaluator, FineTune)
            else nn.Sequential(Flat(), nn.Linear(12, 12))
        ),
        "end",
    )
    assert train.here.value == test.here.value == 0


def test_every_loader_says_how_many_workers_a_pass_has():
    assert [made(num_workers=3).num_workers for made in (TorchLoader, FFCVLoader, AutoLoader)] == [3, 3, 3]


def test_a_plain_pass_of_a_method_has_the_workers_too():
    source = Where(11)
    images = Images(
        source, VIEWS, lambda: pytest.fail("no training batches"), batch=4, device=torch.device("cpu"), num_workers=1
    )
    assert [len(batch.index) for batch in images("plain")] == [4, 4, 3] and source.here.value == 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["array", "list", "mapped", "files", "not compiled"])
def test_batches_are_the_same_however_they_are_read_and_in_whatever_pieces(tmp_path, monkeypatch, kind, workers):
    for i, size in enumerate((20, 9, 33)):
        (tmp_path / "train" / f"c{i}").mkdir(parents=True)
        for j in range(5):
            pixels = np.random.default_rng([i, j]).integers(0, 256, (size, size + j, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / f"c{i}" / f"{j}.png")
    source = files = folder(root=str(tmp_path), in_memory_mb=0).train
    pixels = [np.asarray(files.image(i)) for i in range(15)]
    if kind in ("array", "mapped"):
        pixels = [np.ascontiguousarray(one[:9, :9]) for one in pixels]
        stacked = np.stack(pixels)
        if kind == "mapped":  # in an unsorted order, as STL-10 has
            stacked = np.ascontiguousarray(stacked.transpose(0, 3, 2, 1)).transpose(0, 3, 2, 1)
        source = ImagesInMemory(stacked, name="memory", labels=files.labels)
    elif kind == "list":
        source = files.in_memory(1)
    elif kind == "not compiled":
        monkeypatch.setattr(plain.native, "library", lambda: None)
        monkeypatch.setattr("caco.data.views.native.library", lambda: None)
    views = Views(size=7, plain_crop=0.875, views={"one": View()}, mean=[0.5] * 3, std=[0.25] * 3)
    expected = torch.stack([views.plain(source.image(i)) for i in range(15)])
    monkeypatch.setattr(plain, "_PIECE_BYTES", 3 * 7 * 7 * 2)  # two images at a time
    made = list(plain_batches(source, views, batch=5, num_workers=workers))
    assert [len(labels) for _, labels in made] == [5, 5, 5]
    assert torch.equal(torch.cat([images for images, _ in made]), expected)
    assert torch.cat([labels for _, labels in made]).tolist() == files.labels.tolist()


def test_a_bicubic_plain_view_is_bicubic_of_images_in_memory_too():
    source = ImagesInMemory(np.random.default_rng(0).integers(0, 256, (3, 30, 20, 3), dtype=np.uint8), name="memory")
    for kind in ("bilinear", "bicubic"):
        views = Views(size=8, plain_interpolation=kind, views={"one": View()}, mean=[0.5] * 3, std=[0.25] * 3)
        ((images, _),) = plain_batches(source, views, batch=3)
        assert torch.equal(images, torch.stack([views.plain(source.image(i)) for i in range(3)]))


def test_the_pieces_that_workers_make_are_of_eight_megabytes_whatever_the_batch(monkeypatch):
    pieces = []
    monkeypatch.setattr(
        plain, "in_order", lambda maker, keys, workers, **options: (pieces.extend(keys), in_order(maker, keys, 0))[1]
    )
    views = Views(size=224, views={"one": View()}, mean=[0.5] * 3, std=[0.25] * 3)
    list(plain_batches(Where(1000), views, batch=512, num_workers=4))
    assert [len(piece) for piece in pieces] == ([55] * 9 + [17]) + ([55] * 8 + [48]) and 55 * 3 * 224**2 <= 2**23


def test_what_takes_its_time_says_how_far_it_is_how_fast_and_what_is_left(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(saying.time, "monotonic", lambda: now[0])
    count = counting(lambda text, passing=False: said.append((text, passing)), "features of train", 5000, done=1000)
    for _ in range(4):
        now[0] += 2.0
        count(500)
    assert said == [("features of train: 2,500 of 5,000, 250 a second, 0:00:10 left", True)]


def test_features_of_a_round_are_one_tensor_which_the_probe_leaves_as_it_is(store_of, colours):
    store = store_of(train=60)
    first = store.features(colours, "train")
    assert store.features(colours, "train") is first and first.shape == (60, 4)
    probe = Probe()
    probe.build(store, seed=0)
    before = first.clone()
    list(probe.run(colours))
    assert store.features(colours, "train") is first and torch.equal(first, before)
