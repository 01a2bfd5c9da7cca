"""A round of evaluation computes each feature once, reports percent, and does not change what it evaluates."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from caco.config.composition import compose, instantiate
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.sources import Splits
from caco.data.views.augmentation import View, Views
from caco.errors import UserError
from caco.evals.evaluation import Evaluation
from caco.evals.extraction import extract
from caco.evals.features import FeatureStore
from caco.evals.knn import KNN
from caco.evals.probe import Probe


class CountingViews(Views):
    """Views that count how many plain views they make."""

    made = 0

    def plain_pixels(self, image):
        self.made += 1
        return super().plain_pixels(image)

    def plain_batch(self, images, out, **settings):
        self.made += len(images)
        return super().plain_batch(images, out, **settings)


def coloured(count, name, *, labelled=True, seed=0):
    """Images of noise whose class is their colour."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 120, (count, 8, 8, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 100
    return ImagesInMemory(images, name=name, labels=labels if labelled else None)


class Backbone(nn.Module):
    """A backbone with everything that an evaluation could disturb: BatchNorm's buffers, dropout, a part kept in
    evaluation mode. It counts its images.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm, self.frozen = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        self.images = 0
        self.train()
        self.frozen.eval()

    def forward(self, images):
        self.images += len(images)
        torch.rand(3)  # draws random numbers even in evaluation mode
        return self.dropout(self.frozen(self.norm(self.conv(images)))).relu().mean((2, 3))


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return Backbone()


@pytest.fixture
def views():
    return CountingViews(size=8, plain_crop=1.0, views={"one": View()}, mean=[0.5] * 3, std=[0.25] * 3)


@pytest.fixture
def splits():
    train, test = coloured(50, "train"), coloured(23, "test", seed=1)
    return Splits(train, train, test)


def evaluation(evaluators, splits, views, **kwargs):
    return Evaluation(
        evaluators, splits, views, **{"batch": 8, "device": "cpu", "precision": "fp32", "seed": 0, **kwargs}
    )


def test_features_are_the_eval_mode_outputs_in_order(backbone, views, splits):
    batches = [
        (torch.stack([views.plain(splits.test.image(i)) for i in chunk]), torch.tensor(chunk))
        for chunk in ([0, 1, 2], [3])
    ]
    features, labels = extract(backbone, batches, device="cpu", precision="fp32")
    reference = copy.deepcopy(backbone).eval()
    with torch.no_grad():
        expected = torch.cat([reference(images[i : i + 1]) for images, _ in batches for i in range(len(images))])
    torch.testing.assert_close(features, expected)
    assert labels.tolist() == [0, 1, 2, 3]


def test_bf16_features_are_float32_near_those_of_fp32(backbone):
    torch.manual_seed(1)
    batches = [(torch.randn(5, 3, 8, 8), torch.zeros(5))]
    bf16, _ = extract(backbone, batches, device="cpu", precision="bf16")
    fp32, _ = extract(backbone, batches, device="cpu", precision="fp32")
    assert bf16.dtype == torch.float32
    assert 0 < (bf16 - fp32).abs().max() < 0.02


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_a_round_leaves_modes_buffers_gradients_and_random_numbers_untouched(backbone, views, splits, cache_bytes):
    round_ = evaluation({"knn": KNN(k=3), "probe": Probe()}, splits, views)
    round_.store.cache_bytes = cache_bytes
    modes = {name: module.training for name, module in backbone.named_modules()}
    state = copy.deepcopy(backbone.state_dict())
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    round_.run(backbone, "end")
    assert torch.equal(torch.rand(4), expected)
    assert {name: module.training for name, module in backbone.named_modules()} == modes
    assert modes["norm"] and not modes["frozen"]
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in backbone.parameters())


class Refusing(Probe):
    def build(self, store, *, seed):
        raise UserError("no images of mine in PATH")


class OfOthers(Probe):
    departures = ("probe: not as anybody else has it.",)

    def require(self, backbone):
        raise UserError(f"needs another network than {type(backbone).__name__}")


def test_evaluators_that_cannot_work_are_refused_together_before_anything_is_trained(backbone, views, splits):
    with pytest.raises(UserError, match=r"^eval.a: no images of mine in PATH\neval.c: no images of mine in PATH$"):
        evaluation({"a": Refusing(), "b": Probe(), "c": Refusing()}, splits, views)
    made = evaluation({"a": OfOthers(), "b": Probe(), "c": OfOthers()}, splits, views)
    with pytest.raises(
        UserError, match=r"^eval.a: needs another network than Backbone\neval.c: needs another network than Backbone$"
    ):
        made.require(backbone)


def test_departures_are_said_with_the_results_at_the_end_of_training(backbone, views, splits):
    said = []
    made = evaluation({"probe": OfOthers()}, splits, views, say=lambda text, passing=False: said.append(text))
    made.run(backbone, "epoch")
    assert said == []
    made.run(backbone, "end")
    assert said == ["probe: not as anybody else has it."]


def test_modes_come_back_after_an_error(backbone):
    def broken():
        yield torch.zeros(2, 3, 8, 8), torch.zeros(2)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        extract(backbone, broken(), device="cpu", precision="fp32")
    assert backbone.training and not backbone.frozen.training


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Identity(), r"expected features \[2, D\], got \[2, 3, 8, 8\]"),
        (nn.Sequential(nn.Flatten(), nn.Threshold(9.0, float("nan"))), "finite"),
    ],
)
def test_refuses_outputs_that_are_no_features(module, message):
    with pytest.raises(ValueError, match=message):
        extract(module, [(torch.zeros(2, 3, 8, 8), torch.zeros(2))], device="cpu", precision="fp32")


def test_each_feature_is_computed_once_a_round_and_each_image_made_once(backbone, views, splits):
    round_ = evaluation({"knn": KNN(k=3, fraction=0.5), "probe": Probe()}, splits, views)
    round_.run(backbone, "end")
    assert backbone.images == 50 + 23
    made = views.made
    round_.run(backbone, "end")
    assert backbone.images == 2 * (50 + 23)
    assert views.made == made


def test_knn_alone_computes_only_its_share(backbone, views, splits):
    evaluation({"knn": KNN(k=3, fraction=0.5)}, splits, views).run(backbone, "epoch")
    assert backbone.images == 8 + 8 + 8 + 23  # half of the classes' 17, 17 and 16 images, rounded


def test_large_sets_are_made_again_and_give_the_same(backbone, views, splits):
    small = evaluation({"knn": KNN(k=3, fraction=0.5), "probe": Probe()}, splits, views)
    large = evaluation({"knn": KNN(k=3, fraction=0.5), "probe": Probe()}, splits, views)
    large.store.cache_bytes = 0
    expected = small.run(backbone, "end")
    for _ in range(2):
        views.made = 0
        assert large.run(backbone, "end") == expected
        assert views.made >= 50 + 23


def test_store_gives_the_rows_asked_for(backbone, views, splits):
    store = FeatureStore(splits, views, batch=8, device="cpu", precision="fp32")
    some = store.features(backbone, "train", np.array([40, 3, 11]))
    every = store.features(backbone, "train")
    assert torch.equal(some, every[[40, 3, 11]])
    other = FeatureStore(splits, views, batch=8, device="cpu", precision="fp32").features(backbone, "train")
    torch.testing.assert_close(every, other)


def test_a_round_sees_what_the_backbone_has_become(views, splits):
    colours = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    round_ = evaluation({"knn": KNN(k=3), "probe": Probe()}, splits, views)
    assert round_.run(colours, "end") == {"knn3_top1": 100.0, "probe_top1": 100.0}

    class Blind(nn.Module):
        """A backbone with the same four features for every image. Normalised, each is 1/2, so that all cosines are
        exactly 1 with any rounding.
        """

        def forward(self, images):
            return images.new_ones(len(images), 4)

    # All cosines are equal, so the bank's first rows vote, which have the classes 0, 1, 2, and class 0 wins. The probe
    # also predicts class 0, from the class frequencies.
    assert round_.run(Blind(), "end") == pytest.approx({"knn3_top1": 800 / 23, "probe_top1": 800 / 23})


def test_the_probe_waits_for_the_end(backbone, views, splits):
    round_ = evaluation({"knn": KNN(k=3), "probe": Probe()}, splits, views)
    assert list(round_.run(backbone, "epoch")) == ["knn3_top1"]
    assert list(round_.run(backbone, "end")) == ["knn3_top1", "probe_top1"]
    with pytest.raises(ValueError, match="expected epoch or end, got 'now'"):
        round_.run(backbone, "now")


@pytest.mark.parametrize(("name", "evaluator"), [("knn", KNN()), ("probe", Probe())])
@pytest.mark.parametrize("missing", ["train", "test", "labels"])
def test_without_labels_says_before_training_which_evaluator_and_what_to_do(name, evaluator, missing, views, splits):
    if missing == "labels":
        splits = Splits(splits.train, coloured(50, "bare", labelled=False), splits.test)
    else:
        splits = Splits(splits.train, **{"train": splits.train, "test": splits.test, missing: None})
    with pytest.raises(ValueError, match=rf"eval\.{name}: .*labelled[\s\S]*eval=\[\]"):
        evaluation({name: evaluator}, splits, views)


def test_no_evaluators_need_no_labels(backbone, views, splits):
    bare = Splits(coloured(5, "bare", labelled=False), None, None)
    assert evaluation({}, bare, views).run(backbone, "end") == {}
    assert backbone.images == 0


def test_more_neighbours_than_the_bank_holds_are_refused_before_training(views, splits):
    with pytest.raises(ValueError, match=r"eval\.knn: k: expected at most 9, .* got 20"):
        evaluation({"knn": KNN(k=20, fraction=0.2)}, splits, views)


def test_two_evaluators_of_one_name_are_refused(backbone, views, splits):
    with pytest.raises(ValueError, match=r"eval\.again: another evaluator already gave knn3_top1"):
        evaluation({"knn": KNN(k=3), "again": KNN(k=3, block=5)}, splits, views).run(backbone, "epoch")


def test_the_option_is_the_papers_monitor():
    knn = instantiate(compose(["eval=[knn]"]).eval.knn)
    assert (knn.k, knn.temperature, knn.fraction, knn.when) == (20, 0.2, 0.2, "epoch")


def test_options_combine_and_can_be_none():
    assert list(compose(["eval=[knn,probe]"]).eval) == ["knn", "probe"]
    assert not compose(["eval=[]"]).eval


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives(backbone, views, splits):
    expected = evaluation({"knn": KNN(k=3), "probe": Probe()}, splits, views).run(backbone, "end")
    backbone.to("cuda")
    torch.cuda.manual_seed(7)
    draws = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(7)
    assert (
        evaluation({"knn": KNN(k=3), "probe": Probe()}, splits, views, device="cuda").run(backbone, "end") == expected
    )
    assert torch.equal(torch.rand(4, device="cuda"), draws)
