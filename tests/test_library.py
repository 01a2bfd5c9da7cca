"""caco as a library in other programs: backbones with their preprocessing, views of images and batches, and evaluators
for any network and any images.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import train
from torch import nn

import caco
from caco import library
from caco.banks.learnable import LearnableBank
from caco.config.composition import compose as composed
from caco.config.composition import instantiate
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.anyones import as_source
from caco.data.sets.folders import digits
from caco.data.views.augmentation import View, Views
from caco.data.views.transform import Preprocessing, Transform
from caco.errors import UserError
from caco.evals.geometry import Geometry
from caco.evals.knn import KNN
from caco.evals.linear import Linear
from caco.nn.backbones import small_resnet


def images(number=6, side=20):
    return np.random.default_rng(0).integers(0, 256, (number, side, side + 4, 3), dtype=np.uint8)


SMALL = Views(size=16, views={"two": View(count=2, jitter_p=1.0)}, mean=[0.5] * 3, std=[0.25] * 3)


# Views.


def test_an_image_alone_a_batch_and_images_of_pillow_give_the_same_bits():
    batch = images()
    whole = Transform(SMALL)(batch, stream=7)
    assert [tuple(view.shape) for view in whole] == [(6, 3, 16, 16)] * 2
    for number, array in enumerate(batch):
        alone = Transform(SMALL)(Image.fromarray(array), stream=7, samples=[number])
        assert all(torch.equal(one, view[number]) for one, view in zip(alone, whole, strict=True))
        assert torch.equal(Preprocessing(SMALL)(array), SMALL.plain(Image.fromarray(array)))
    assert torch.equal(Preprocessing(SMALL)(batch)[2], Preprocessing(SMALL)(batch[2]))


def test_the_views_are_those_of_a_recipes_equations_and_follow_torchs_generator():
    batch, transform = images(), Transform(SMALL)
    torch.manual_seed(1)
    first, second = transform(batch), transform(batch)
    torch.manual_seed(1)
    again = transform(batch)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], first[1])
    pixels = SMALL.batch_pixels(list(batch), np.arange(6), 5)
    expected = [(torch.from_numpy(view).double() / 255 - 0.5).div(0.25).permute(0, 3, 1, 2) for view in pixels]
    for view, by_hand in zip(transform(batch, stream=5), expected, strict=True):
        assert torch.allclose(view.double(), by_hand, atol=1e-5)


def test_as_the_transform_of_a_dataset_in_a_dataloader():
    class Set(torch.utils.data.Dataset):
        transform = Transform(SMALL)

        def __len__(self):
            return 6

        def __getitem__(self, index):
            return self.transform(Image.fromarray(images()[index])), index

    x1, x2 = next(iter(torch.utils.data.DataLoader(Set(), batch_size=6)))[0]
    assert x1.shape == x2.shape == (6, 3, 16, 16)


def test_a_published_recipe_by_its_name_with_settings_of_ones_own():
    transform = library.views("simclr", size=32, mean=[0.0] * 3, std=[1.0] * 3)
    view, _ = transform(images()[0])
    assert view.shape == (3, 32, 32) and 0 <= view.min() and view.max() <= 1
    assert [tuple(view.shape) for view in library.views("caco_multicrop")(images(1))][:3] == [(1, 3, 224, 224)] * 2 + [
        (1, 3, 96, 96)
    ]
    with pytest.raises(UserError, match="augmentation: expected one of .*simclr.*, got 'simklr'"):
        library.views("simklr")


@pytest.mark.parametrize(
    "wrong, expected",
    [
        (
            images().astype(np.float32)[0],
            r"image: expected an image as uint8 \[H, W, 3\] or \[H, W\], got float32 \[20, 24, 3\]",
        ),
        (torch.zeros(2, 3, 8, 8), "image 0: expected an image of Pillow's or an array"),
        ([Image.new("I;16", (4, 4))], "image 0: expected an image of 8 bits, RGB or grey, got Pillow's mode I;16"),
    ],
)
def test_what_is_no_image_of_eight_bits_is_refused(wrong, expected):
    for of in (Transform(SMALL), Preprocessing(SMALL)):
        with pytest.raises(UserError, match=expected):
            of(wrong)


# Evaluators.


class Tuples:
    """A PyTorch dataset of (image, label) tuples."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return self.source.image(index), int(self.source.labels[index])


class Flat(nn.Module):
    """A network that is not from timm and has no num_features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def sets():
    splits = digits(size=16, limit=200)
    return splits.train, splits.test.part(np.arange(100), "test")


def test_knn_linear_and_geometry_of_any_network_are_the_same_on_arrays_lists_and_datasets(sets):
    network = Flat()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    views = Views(size=16, views={"two": View(count=2)}, mean=[0.5] * 3, std=[0.5] * 3, plain_crop=1.0)
    results = []
    arrays = [(np.asarray(source.arrays), source.labels) for source in sets]
    pillow = [([source.image(i) for i in range(len(source))], source.labels) for source in sets]
    for train_set, test_set in (sets, arrays, pillow, [Tuples(source) for source in sets]):
        evaluators = {"knn": KNN(fraction=1.0), "linear": Linear(epochs=2, batch=50), "geometry": Geometry(images=64)}
        results.append(library.evaluate(network, evaluators, train=train_set, test=test_set, views=views, device="cpu"))
    assert results[0] == results[1] == results[2] == results[3]
    assert (
        results[0]["knn20_top1"] > 50
        and {"geometry_images-64/uniformity", "geometry_images-64/alignment"} <= results[0].keys()
    )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()) and network.training


def test_the_k_nn_is_that_of_the_command_and_evaluators_have_their_published_names(sets):
    network = Flat()
    views = Views(size=16, views={"two": View()}, mean=[0.5] * 3, std=[0.5] * 3, plain_crop=1.0)
    by_name = library.evaluate(
        network, ["knn_all"], train=sets[0], test=sets[1], views=Preprocessing(views), device="cpu"
    )
    by_hand = library.evaluate(
        network, {"any": KNN(fraction=1.0)}, train=sets[0], test=sets[1], views=views, device="cpu"
    )
    assert by_name.popitem()[1] == by_hand["knn20_top1"]
    with pytest.raises(UserError, match="eval: expected one of .*knn.*, got 'kn'"):
        library.evaluate(network, ["kn"], train=sets[0])
    with pytest.raises(UserError, match="eval.knn: .*needs labelled train and test images"):
        library.evaluate(network, ["knn"], train=np.asarray(sets[0].arrays), device="cpu")


def test_images_that_are_none_and_labels_that_are_too_few_are_refused():
    for wrong, expected in [
        ([], "expected images, got none"), ((images(), [1, 2]), r"expected a label for each of 6 images, got \[2\]"),
        ((images(), [0, 1, 0, 1, 0.5, 1]), "got 0.5 for image 4"), ((images(), [0, -1] * 3), "got -1 for image 1"),
        ((images(), np.eye(6)), r"one whole number for each image, got float64 \[6, 6\]"),
        (5, "expected arrays, Pillow images or a dataset"), ([torch.zeros(3, 4, 4)], "remove the transform"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=expected):
            as_source(wrong)


def test_a_dataset_of_anyones_is_a_set_to_train_on(sets):
    of_tuples = as_source(Tuples(sets[0]))
    assert of_tuples.labels.tolist() == sets[0].labels.tolist()
    views = Views(size=16, views={"two": View(count=2)}, mean=[0.5] * 3, std=[0.5] * 3)
    batches = [
        next(iter(TorchLoader(num_workers=0).bind(source, views, batch=8, seed=1).epoch(0)))
        for source in (of_tuples, sets[0])
    ]
    assert all(torch.equal(a, b) for a, b in zip(batches[0].views, batches[1].views, strict=True))
    part = of_tuples.part(np.array([3, 5]), "part")
    assert part.digest() != of_tuples.digest() and part.image(1).tobytes() == sets[0].image(5).tobytes()


# Backbones.


def test_load_gives_a_runs_backbone_and_what_its_images_go_through(tmp_path):
    train(tmp_path / "run's", "max_steps=2", "eval=[]")
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    backbone, preprocess = caco.load(tmp_path / "run's")
    assert torch.equal(torch.random.get_rng_state(), state) and not backbone.training
    saved = torch.load(next((tmp_path / "run's" / "checkpoints").glob("step_*.pt")), weights_only=True)["method"]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, saved[f"encoder.backbone.{name}"])
    image = digits().test.image(0)
    expected = instantiate(composed(["preset=demo"]).augmentation).plain(image)
    assert torch.equal(preprocess(image), expected) and backbone(preprocess([image, image])).shape == (2, 64)


def test_load_gives_weights_from_elsewhere(tmp_path):
    source = small_resnet(width=8)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    settings = {"backbone": "small_resnet", "backbone.width": 8, "augmentation": "digits"}
    backbone, preprocess = caco.load(weights=tmp_path / "w.pth", **settings)
    assert (
        torch.equal(backbone.state_dict()["conv1.weight"], source.state_dict()["conv1.weight"])
        and preprocess.views.size == 16
    )
    with pytest.raises(
        UserError, match="expected a run's directory, a checkpoint file or an MLflow run id, got nowhere"
    ):
        caco.load("nowhere")


# The pages of the documentation.


def blocks(page, language):
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    return [block.partition("```")[0] for block in text.split(f"```{language}\n")[1:]]


def test_the_pages_loops_run_as_they_stand(monkeypatch):
    loop, evaluated, loaded = blocks("docs/library.md", "python")
    exec(loop, {})
    of_readme = next(block for block in blocks("README.md", "python") if "bank.loss" in block)
    network = nn.Linear(8, 128)
    names = {"LearnableBank": LearnableBank, "q": network(torch.randn(4, 8)), "k": torch.randn(4, 128), "caco": caco}
    monkeypatch.setattr("caco.library.load", lambda run: library.Loaded(Flat().eval(), Preprocessing(SMALL)))
    exec(of_readme, names | {"optimizer": torch.optim.SGD(network.parameters(), lr=0.1)})
    exec(loaded, names | {"image": images()[0]})
    views = library.views("digits")
    monkeypatch.setattr(
        library, "_made", lambda group, *rest: views.views if group == "augmentation" else Geometry(images=4)
    )
    exec(
        evaluated.replace('"knn_all", ', ""),
        names | {"backbone": Flat(), "images": images(8, 16), "labels": [0, 1] * 4},
    )
