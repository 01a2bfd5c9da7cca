"""eval=transfer: the metrics by hand; the regularisation strength is chosen on validation images alone, and the test
images are scored once.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import nn

from caco.config.composition import compose, instantiate
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.transfer import VOC_CLASSES, TransferSet
from caco.evals import transfer
from caco.evals.transfer import Transfer, average_precision_11, score


def test_eleven_point_average_precision_by_hand():
    # The ranking is present, absent, present, (left out), absent, present. At the hits, the precisions are 1/1, 2/3,
    # 3/5 and the recalls 1/3, 2/3, 1. So the precision is 1 for recalls 0 to 0.3, 2/3 for 0.4 to 0.6, and 3/5 for 0.7
    # to 1.
    scores = np.array([0.9, 0.8, 0.7, 0.65, 0.6, 0.5])
    marks = np.array([1, 0, 1, -1, 0, 1])
    assert average_precision_11(scores, marks) == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11)
    order = np.array([3, 5, 0, 2, 4, 1])
    assert average_precision_11(scores[order], marks[order]) == pytest.approx((4 + 2 + 12 / 5) / 11)


def test_a_later_better_precision_counts_for_smaller_recalls_too():
    # The ranking absent, present, present has precision 1/2 at recall 1/2 and 2/3 at recall 1, so 2/3 counts
    # everywhere.
    assert average_precision_11(np.array([3.0, 2.0, 1.0]), np.array([0, 1, 1])) == pytest.approx(2 / 3)


def test_recalls_of_tenths_are_exact():
    # Ten present images with an absent one after the third: the precision at recall 0.3 is still 1.
    marks = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    best_later = 10 / 11
    assert average_precision_11(-np.arange(11.0), marks) == pytest.approx((4 * 1 + 7 * best_later) / 11)
    with pytest.raises(ValueError, match="at least one image in which the class is present"):
        average_precision_11(np.array([1.0]), np.array([0]))


def test_map_is_the_mean_over_classes_and_the_per_image_variant_is_scikit_learns_over_images():
    labels = np.array([[1, 0], [0, 1], [1, -1], [-1, 0]])
    logits = torch.tensor([[2.0, 0.0], [3.0, 1.0], [1.0, 5.0], [0.0, -1.0]])
    results = dict(score(logits, labels, "map11"))
    # Class 0 has the ranking absent, present, present: 2/3. Class 1 has (left out), present, absent, absent: 1.
    assert results["map11"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    # The class of image 0 is ranked first; those of images 1 and 2 are second of two (1/2); image 3 has none and is
    # left out.
    assert results["ap_per_image"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 2) / 3)
    expected = average_precision_score(labels[:3] == 1, logits[:3].numpy(), average="samples")
    assert results["ap_per_image"] == pytest.approx(100 * expected)


def test_mean_per_class_weighs_classes_alike():
    logits = torch.eye(2)[torch.tensor([0, 0, 0, 1, 0])]
    labels = np.array([0, 0, 0, 0, 1])
    assert dict(score(logits, labels, "top1")) == {"top1": pytest.approx(60.0)}
    assert dict(score(logits, labels, "mean_per_class")) == {"mean_per_class": pytest.approx(100 * (3 / 4 + 0) / 2)}


def images(count, seed, *, noise=120, labels=None):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3 if labels is None else labels
    pixels = rng.integers(0, 256 - noise, (count, 8, 8, 3), dtype=np.uint8)
    present = labels if labels.ndim == 2 else np.eye(3, dtype=int)[labels]
    pixels[..., :3] += (noise * (present[:, None, None, :3] == 1)).astype(np.uint8)
    return ImagesInMemory(pixels, name=f"images{seed}", labels=labels, classes=["r", "g", "b"])


class ChannelMeans(nn.Module):
    num_features = 3

    def forward(self, images):
        return images.mean((2, 3))


@pytest.fixture
def sets(monkeypatch):
    """Replace the sets on disk by sets in memory, by name."""
    known = {}

    def load(name, root, *, seed):
        if name not in known:
            raise transfer.MissingSet(f"{name}: expected {root}/{name}, got no such folder")
        return known[name]

    monkeypatch.setattr(transfer, "load", load)
    return known


def built(store, tmp_path, *names, **settings):
    evaluator = Transfer(**{"root": str(tmp_path), "sets": list(names), "size": 8, "num_strengths": 5, **settings})
    evaluator.build(store, seed=0)
    return evaluator


def test_sets_that_are_there_are_scored_and_missing_ones_named(store_of, tmp_path, sets):
    told = []
    sets["colours"] = TransferSet("colours", images(30, 1), images(9, 2), images(12, 3), "mean_per_class")
    evaluator = built(store_of(say=lambda text, passing=False: told.append(text)), tmp_path, "dtd", "colours")
    results = dict(evaluator.run(ChannelMeans()))
    assert list(results) == [
        "transfer_size-8_num_strengths-5/colours_mean_per_class",
        f"{evaluator.protocol}/colours_strength",
        f"{evaluator.protocol}/colours_gradient",
    ]
    assert (
        results["transfer_size-8_num_strengths-5/colours_mean_per_class"] == 100.0
        and results["transfer_size-8_num_strengths-5/colours_gradient"] < 2e-5
    )
    assert told[0] == f"transfer skips a set that is not there: dtd: expected {tmp_path}/dtd, got no such folder"
    with pytest.raises(ValueError, match="none of the sets is there:\ndtd: expected"):
        built(store_of(), tmp_path, "dtd")
    with pytest.raises(
        ValueError, match="root: expected the folder that holds the sets, as eval.transfer.root=PATH, got None"
    ):
        built(store_of(), tmp_path, "dtd", root=None)


def test_the_strength_comes_from_the_validation_images_and_the_test_images_are_scored_once(
    store_of, tmp_path, sets, monkeypatch
):
    # The training labels are mostly wrong, and the validation labels swap two classes, so that the test images would
    # choose another strength than the validation images.
    rng = np.random.default_rng(0)
    one = TransferSet("x", images(60, 1, noise=6), images(30, 2, noise=6), images(30, 3, noise=6), "top1")
    one.train.labels[rng.choice(60, 25, replace=False)] = 0
    sets["x"] = one
    scored = []
    original = transfer.score
    monkeypatch.setattr(
        transfer,
        "score",
        lambda logits, labels, metric: (scored.append(id(labels)), original(logits, labels, metric))[1],
    )
    results = dict(built(store_of(), tmp_path, "x").run(ChannelMeans()))
    assert scored == [id(one.validation.labels)] * 5 + [id(one.test.labels)]

    # The same with scikit-learn, from raw features and without warm starts.
    from sklearn.linear_model import LogisticRegression

    def features(source):
        scale = torch.stack([evaluator_views(store_of(), tmp_path).plain(source.image(i)) for i in range(len(source))])
        return scale.mean((2, 3)).double().numpy()

    def evaluator_views(store, root):
        return built(store, root, "x")._views

    x, xv, xt = (features(source) for source in (one.train, one.validation, one.test))
    best, chosen = -1.0, None
    for strength in np.logspace(5, -6, 5):
        fitted = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=5000).fit(x, one.train.labels)
        if fitted.score(xv, one.validation.labels) > best:
            best, chosen = fitted.score(xv, one.validation.labels), strength
    refit = LogisticRegression(C=1 / chosen, tol=1e-8, max_iter=5000)
    refit.fit(np.concatenate([x, xv]), np.concatenate([one.train.labels, one.validation.labels]))
    assert results["transfer_size-8_num_strengths-5/x_strength"] == pytest.approx(chosen)
    assert results["transfer_size-8_num_strengths-5/x_top1"] == pytest.approx(100 * refit.score(xt, one.test.labels))


def test_several_labels_an_image_are_told_apart_one_by_one(store_of, tmp_path, sets):
    def several(count, seed):
        return images(count, seed, labels=np.random.default_rng(seed).integers(0, 2, (count, 3)))

    sets["voc2007"] = TransferSet("voc2007", several(40, 1), several(20, 2), several(30, 3), "map11")
    results = dict(built(store_of(), tmp_path, "voc2007", strongest=1e-3).run(ChannelMeans()))
    assert [name.rpartition("/")[2] for name, value in results.items() if value > 95] == [
        "voc2007_map11",
        "voc2007_ap_per_image",
    ]


def test_test_images_that_are_trained_on_are_refused_unless_told(store_of, tmp_path, sets):
    test = images(12, 3)
    pixels = [np.asarray(source.image(i)) for source, count in ((images(30, 1), 30), (test, 2)) for i in range(count)]
    train = ImagesInMemory(pixels, name="train", labels=np.arange(32) % 3)
    sets["x"] = TransferSet("x", train, images(9, 2), test, "top1")
    with pytest.raises(ValueError, match=r"2 of the 12 images of images3 are images of train too .*overlap=allow"):
        built(store_of(), tmp_path, "x")
    built(store_of(overlap="allow"), tmp_path, "x")


def test_a_class_that_training_has_no_image_of_is_refused(store_of, tmp_path, sets):
    sets["x"] = TransferSet("x", images(2, 1), images(9, 2), images(12, 3), "top1")
    with pytest.raises(ValueError, match="images2: expected no class that images1 has no image of, got 1: b"):
        built(store_of(), tmp_path, "x")


def test_the_view_is_the_protocols_short_side_bicubic_centre_crop(store_of, tmp_path, sets):
    sets["x"] = TransferSet("x", images(30, 1), images(9, 2), images(12, 3), "top1")
    views = built(store_of(), tmp_path, "x", size=16)._views
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    expected = image.resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    assert np.array_equal(views.plain_pixels(image), np.asarray(expected))


def test_the_option_is_the_papers_eleven_sets():
    made = instantiate(compose(["eval=[transfer]"], "evaluate").eval.transfer)
    assert made.sets == list(transfer.PUBLISHED) and len(made.sets) == 11 and len(made.strengths) == 45
    assert made.size == 224 and len(VOC_CLASSES) == 20
