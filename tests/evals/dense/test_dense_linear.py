"""eval=dense_linear, a linear head on frozen features of places: what it fits and tests, for ResNets and ViTs, and how
it resumes.
"""

import numpy as np
import pixelwise
import pytest
import timm
import torch
from segment_worker import backbone, of
from sklearn.linear_model import LogisticRegression
from torch import nn

from caco.data.loaders.batches import mixed_seed
from caco.errors import UserError
from caco.evals.dense import pixel_metric
from caco.evals.dense.dense_linear import DenseLinear, drawn_places
from caco.evals.dense.maps import Maps
from caco.evals.dense.segment import resized
from caco.evals.dense.segmentation_sets import voc2012
from caco.evals.pixels import RawPixels
from experiments.toy_sets import segmentation as toy_voc


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc")
    toy_voc.write_voc(root)
    return root


def store_of(*args, **settings):
    made = pixelwise.store_of(*args, **settings)
    made.overlap = "allow"
    return made


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, patch_size=8, img_size=64, dynamic_img_size=True, depth=2
    ).eval()


def test_an_untrained_network_of_colours_suffices_for_the_toy_images(voc):
    found = of(DenseLinear(root=str(voc), train="train", size=128, places=100), store_of())
    assert found["miou"] > 75 and found["pixel_accuracy"] > 92


def test_places_are_drawn_among_those_with_a_label_and_read_at_their_pixels(voc):
    _, labels = voc2012(voc, "train").train.read(2)
    at = Maps(backbone(), purpose="it").places(128)
    assert at.tolist() == [0, 16, 32, 48, 64, 80, 96, 112, 128], "the last place is on the padding"
    cells, classes = drawn_places(labels, at, 128, 100, seed=1)
    expected = {}
    for row in range(8):
        for column in range(8):  # the square has 128 x 128 pixels, the image 128 columns and 96 rows
            label = int(labels[int((16 * row + 0.5) * 96 / 128), 16 * column])
            if label != 255:
                expected[row * 9 + column] = label
    found = {int(cell): int(label) for cell, label in zip(cells, classes, strict=True) if label >= 0}
    assert found == expected and int((classes < 0).sum()) == 100 - len(expected)
    few, of_few = drawn_places(labels, at, 128, 7, seed=1)
    assert few.tolist() == cells[:7].tolist() and (of_few >= 0).all()
    assert drawn_places(labels, at, 128, 7, seed=2)[0].tolist() != few.tolist()


def test_it_is_scikit_learns_logistic_regression_of_the_same_places(voc):
    """The expected result is computed in another way, from whole feature maps, standardised in float64, with
    scikit-learn's solver.
    """
    linear = DenseLinear(root=str(voc), train="train", size=64, places=30)
    found = of(linear, store_of())
    network = backbone().eval()
    maps, sets, store = Maps(network, purpose="it"), voc2012(voc, "train"), store_of()

    @torch.no_grad()
    def features(image):
        pixels = torch.from_numpy(np.array(resized(image, 64, 64)))[None]
        return maps(store.views.normalise(pixels))[0].permute(1, 2, 0).double()  # [h, w, D]

    rows, wanted = [], []
    for index in range(len(sets.train)):
        image, labels = sets.train.read(index)
        cells, classes = drawn_places(labels, maps.places(64), 64, 30, seed=mixed_seed(0, index))
        rows.append(features(image).flatten(0, 1)[cells[classes >= 0]])
        wanted.append(classes[classes >= 0])
    x, y = torch.cat(rows), torch.cat(wanted).long().numpy()
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-12)
    solver = LogisticRegression(C=1 / (1e-3 * len(x)), max_iter=5000, tol=1e-8).fit(((x - mean) / std).numpy(), y)
    matrix = torch.zeros(21, 21, dtype=torch.int64)
    for index in range(len(sets.test)):
        image, labels = sets.test.read(index)
        z = (features(image) - mean) / std
        scores = torch.from_numpy(solver.decision_function(z.flatten(0, 1).numpy())).view(*z.shape[:2], -1)
        square = maps.to_pixels(scores.permute(2, 0, 1)[None], 64, 64)
        whole = nn.functional.interpolate(square, labels.shape, mode="bilinear")[0]
        predicted = torch.from_numpy(solver.classes_)[whole.argmax(0)]
        matrix += pixel_metric.confusion(torch.from_numpy(labels), predicted, 21)
    # For classes without training pixels, scikit-learn has no score, and caco a small one.
    assert found == pytest.approx(pixel_metric.scores(matrix), abs=0.5)


def test_a_vit_has_a_place_in_the_middle_of_every_patch(voc):
    maps = Maps(vit(), purpose="it")
    assert maps.places(64).tolist() == [4, 12, 20, 28, 36, 44, 52, 60] and maps.width == 192
    tokens = maps.backbone.forward_features(torch.zeros(1, 3, 64, 64))[:, 1:]
    made = maps(torch.zeros(1, 3, 64, 64))
    assert made.shape == (1, 192, 8, 8) and torch.equal(made[0, :, 2, 5], tokens[0, 2 * 8 + 5])
    linear = DenseLinear(root=str(voc), train="train", size=64, places=30)
    linear.build(store_of(), seed=0)
    found = dict(linear.run(vit()))
    assert list(found) == [f"{linear.protocol}/voc2012_{m}" for m in ("miou", "mean_accuracy", "pixel_accuracy")]
    assert found[f"{linear.protocol}/voc2012_pixel_accuracy"] > 85


def test_killed_while_reading_it_goes_on_from_the_last_whole_batch(voc, tmp_path, monkeypatch):
    from caco.evals.dense import dense_linear as module

    monkeypatch.setattr(module, "BATCH", 2)
    settings = {"root": str(voc), "train": "train", "size": 64, "places": 10}
    whole = of(DenseLinear(**settings), store_of())
    read, drawn = [], module.drawn_places

    def counted(*args, seed):
        if len(read) == 5:
            raise KeyboardInterrupt
        read.append(seed)
        return drawn(*args, seed=seed)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "drawn_places", counted)
        of(DenseLinear(**settings), store_of(tmp_path))
    read.clear()
    monkeypatch.setattr(module, "drawn_places", counted)
    assert of(DenseLinear(**settings), store_of(tmp_path)) == whole and len(read) == 2
    read.clear()
    assert of(DenseLinear(**settings), store_of(tmp_path)) == whole and not read, "stored features must be used"


def test_raw_pixels_and_other_networks(voc):
    linear = DenseLinear(root=str(voc), train="train", size=64)
    linear.build(store_of(), seed=0)
    assert list(linear.run(RawPixels(32))) == []
    with pytest.raises(UserError, match="dense_linear needs a ResNet of timm's, .* got Flatten"):
        list(linear.run(nn.Flatten()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"places": 0}, "places: expected int from 1, got 0"),
        ({"l2": 0.0}, r"l2: expected float above 0, got 0\.0"),
        ({"when": "now"}, r"when: expected epoch \| end, got 'now'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DenseLinear(**settings)
