"""Linear evaluation and fine-tuning follow the published recipes, report the last epoch's accuracy, and resume to the
same bits.
"""

import copy

import classifier_worker
import pytest
import torch
from processes import ranks
from torch import nn

from caco.config.composition import compose, instantiate
from caco.data.loaders.batches import Order
from caco.data.loaders.torch_loader import TorchLoader
from caco.errors import UserError
from caco.evals import classifier
from caco.evals.classifier import Recipe, new_head
from caco.evals.finetune import FineTune, listed
from caco.evals.linear import Linear
from caco.nn.layerwise import LARC

QUICK = {"epochs": 6, "batch": 20, "lr": 4.0, "larc": False}


def test_the_papers_recipe():
    linear = instantiate(compose(["eval=[linear]"], "evaluate").eval.linear)
    recipe = linear.recipe
    assert (recipe.epochs, recipe.batch, recipe.weight_decay, recipe.momentum) == (100, 4096, 0.0, 0.9)
    optimizer = recipe.optimizer([nn.Parameter(torch.ones(2))])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025 * 16)
    assert isinstance(optimizer, LARC) and optimizer.param_groups[0]["trust_coefficient"] == 1e-3
    factors = recipe.lr_factors(3)
    assert len(factors) == 300 and factors[0] == factors[2] == 1.0
    assert factors[150] == pytest.approx(0.5) and 0 < factors[-1] < 3e-4
    assert (recipe.scale, linear.when) == ([0.08, 1.0], "end")
    for world in (1, 8):  # ImageNet makes 312 whole batches and one of 3,215 images
        order = Order(1_281_167, batch=recipe.batch, seed=0, rank=world - 1, world=world, drop_last=recipe.drop_last)
        assert order.steps == 313 and order.images_of(311) == 4096 and order.images_of(312) == 3215


def test_mocos_and_lightlys_recipes():
    cfg = compose(["eval=[linear_moco,linear_lightly]"], "evaluate").eval
    moco, lightly = instantiate(cfg.linear_moco).recipe, instantiate(cfg.linear_lightly).recipe
    assert (moco.lr, moco.batch, moco.epochs, moco.larc) == (30.0, 256, 100, False)
    assert [round(moco.lr_factors(1)[e], 9) for e in (0, 59, 60, 79, 80, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert (lightly.lr, lightly.batch, lightly.epochs, lightly.unit) == (0.1, 256, 90, "step")
    assert lightly.lr_factors(2)[1] < 1.0
    assert (moco.drop_last, lightly.drop_last) == (False, True)


def test_larc_scales_each_gradient_by_the_ratio_of_norms_but_not_that_of_a_zero_parameter():
    torch.manual_seed(0)
    start = [torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    parameters = [nn.Parameter(p.clone()) for p in start]
    optimizer = Recipe(epochs=1, batch=256, lr=0.5, larc=True).optimizer(parameters)
    expected, velocity = [p.clone() for p in start], [torch.zeros_like(p) for p in start]
    for _ in range(4):
        gradients = [torch.randn_like(p) for p in start]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for p, v, g in zip(expected, velocity, gradients, strict=True):
            ratio = 1e-3 * p.norm() / g.norm() if p.norm() > 0 else 1.0
            v.mul_(0.9).add_(g * ratio)
            p.sub_(0.5 * v)
    for ours, by_hand in zip(parameters, expected, strict=True):
        # because LARC adds 1e-8 to the sum of norms
        torch.testing.assert_close(ours.detach(), by_hand, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_ends_with_the_images_that_are_left_or_with_its_last_whole_batch(colours, store_of, drop_last):
    """60 images in batches of 25 make steps of 25, 25 and 10 images, each with the mean of its images' gradients;
    compared with a loop by hand.
    """
    store, recipe = (
        store_of(),
        Recipe(epochs=2, batch=25, lr=2.0, momentum=0.0, reference_batch=None, drop_last=drop_last),
    )
    train = store.splits.train
    network = classifier.train_classifier(colours, train, recipe, store, num_classes=3, frozen=True, seed=3, name="it")
    head = new_head(4, 3, seed=3)
    weight, bias = (p.detach().double().requires_grad_() for p in head.parameters())
    loader = TorchLoader(num_workers=0).bind(train, recipe.views(store.views), batch=25, seed=3, drop_last=drop_last)
    colours.eval()
    for epoch, rate in ((0, 2.0), (1, 1.0)):
        sizes = []
        for batch in loader.epoch(epoch):
            sizes.append(len(batch.label))
            p = torch.softmax(colours(batch.views[0]).detach().double() @ weight.T + bias, 1)
            loss = -sum(p[i, label].log() for i, label in enumerate(batch.label.tolist())) / len(batch.label)
            gradients = torch.autograd.grad(loss, (weight, bias))
            with torch.no_grad():
                for parameter, gradient in zip((weight, bias), gradients, strict=True):
                    parameter -= rate * gradient
        assert sizes == ([25, 25] if drop_last else [25, 25, 10])
    assert torch.allclose(network[1].weight.double(), weight, atol=1e-5) and torch.allclose(
        network[1].bias.double(), bias, atol=1e-5
    )


@pytest.mark.long
def test_two_ranks_that_share_a_last_batch_unevenly_train_what_one_does(tmp_path, colours, store_of):
    """49 images are trained in batches of 20; of the last nine, one rank has four and the other five."""
    files = [tmp_path / "one.pt", tmp_path / "two.pt"]
    classifier_worker.write_head(files[0])
    codes, outputs = ranks(2, classifier_worker.write_head, str(files[1]))
    assert codes == [0, 0], outputs[0][1][-3000:]
    one, two = (torch.load(file) for file in files)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_linear_evaluation_learns_the_colours_and_leaves_the_backbone_as_it_was(colours, store_of):
    colours.train()
    before, modes = copy.deepcopy(colours.state_dict()), [m.training for m in colours.modules()]
    linear = Linear(**QUICK)
    linear.build(store_of(), seed=0)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert dict(linear.run(colours)) == {"linear_epochs-6_batch-20_lr-4_larc-no_top1": 100.0}
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in colours.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in colours.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in colours.parameters())


def test_the_features_of_a_batch_are_the_eval_mode_ones_in_pieces_of_the_stores_batch(colours, store_of):
    store, seen = store_of(batch=8), []
    torch.manual_seed(0)
    images = torch.randn(20, 3, 8, 8)
    colours.eval().register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with torch.no_grad():
        whole = colours(images)
    pieces = classifier._features(colours, images, store, frozen=True)
    torch.testing.assert_close(pieces, whole)
    assert seen == [20, 8, 8, 4] and not pieces.requires_grad


class Cut(BaseException):
    pass


@pytest.mark.parametrize("frozen", [True, False])
def test_a_cut_evaluation_goes_on_from_its_last_epoch_to_the_same_bits(
    tmp_path, monkeypatch, colours, store_of, frozen
):
    colours.dropout = nn.Dropout(0.5)
    forward = type(colours).forward
    monkeypatch.setattr(type(colours), "forward", lambda self, images: self.dropout(forward(self, images)))
    recipe = Recipe(epochs=4, batch=20, lr=0.5)
    settings = {"num_classes": 3, "frozen": frozen, "seed": 3, "name": "it"}

    def trained(folder):
        store = store_of(folder=folder)
        return classifier.train_classifier(colours, store.splits.train, recipe, store, **settings).state_dict()

    whole = trained(tmp_path / "whole")
    epochs = []
    original = classifier._epoch

    def cut(*args, **kwargs):
        epochs.append(args[4])
        if len(epochs) == 3:
            raise Cut
        return original(*args, **kwargs)

    monkeypatch.setattr(classifier, "_epoch", cut)
    with pytest.raises(Cut):
        trained(tmp_path / "cut")
    resumed = trained(tmp_path / "cut")
    assert epochs == [0, 1, 2, 2, 3]
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert epochs[-1] == 3 and trained(tmp_path / "cut") and len(epochs) == 5, (
        "a finished classifier must not be trained again"
    )


def test_another_backbone_does_not_go_on_from_the_first_ones_classifier(tmp_path, colours, store_of):
    linear = Linear(**QUICK)
    linear.build(store_of(folder=tmp_path), seed=0)
    list(linear.run(colours))
    linear._store.forget()
    with torch.no_grad():
        colours.layer.weight.mul_(-1)
    list(linear.run(colours))
    assert len(list((tmp_path / "classifiers").iterdir())) == 2


def test_a_batch_above_the_training_images_is_refused_before_anything_is_trained(store_of):
    with pytest.raises(ValueError, match="batch: expected at most the 60 training images, got 4096"):
        Linear().build(store_of(), seed=0)


def test_a_loss_that_is_not_finite_ends_it_with_what_to_do(colours, store_of):
    linear = Linear(**{**QUICK, "lr": 4e39})
    linear.build(store_of(), seed=0)
    with pytest.raises(UserError, match=r"linear_.*: the loss became (nan|inf) in epoch"):
        list(linear.run(colours))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs: expected int from 1, got 0"),
        ({"schedule": "linear"}, r"schedule: expected cosine \| steps, got 'linear'"),
        ({"milestones": [3]}, "milestones: expected none without schedule=steps"),
        ({"when": "now"}, r"when: expected epoch \| end, got 'now'"),
    ],
)
def test_refuses_settings_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Linear(**arguments)


def test_a_head_is_drawn_by_its_seed_alone():
    torch.manual_seed(1)
    first = new_head(500, 40, seed=3)
    torch.manual_seed(2)
    second = new_head(500, 40, seed=3)
    assert torch.equal(first.weight, second.weight) and not first.bias.any()
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.05)


# Fine-tuning.


def test_simclrs_recipe_for_one_and_ten_per_cent():
    semi = instantiate(compose(["eval=[semi]"], "evaluate").eval.semi)
    assert semi.fractions == [0.01, 0.1] and [r.epochs for r in semi.recipes] == [60, 30]
    assert all((r.lr, r.nesterov, r.weight_decay, r.larc) == (0.05, True, 0.0, False) for r in semi.recipes)


def test_shares_are_stratified_and_the_whole_network_learns_on_a_copy(colours, store_of):
    store = store_of(train=90)
    semi = FineTune(name="semi", fractions=[0.1, 0.5], epochs=[12, 6], batch=9, lr=8.0)
    semi.build(store, seed=0)
    labels = store.splits.train.labels
    assert [torch.tensor(labels[share]).bincount().tolist() for share in semi._shares] == [[3, 3, 3], [15, 15, 15]]
    before = copy.deepcopy(colours.state_dict())
    results = dict(semi.run(colours))
    assert (
        list(results) == ["semi_10_batch-9_lr-8_epochs-12_top1", "semi_50_batch-9_lr-8_epochs-6_top1"]
        and min(results.values()) > 90
    )
    assert all(torch.equal(value, before[name]) for name, value in colours.state_dict().items())
    store.forget()
    network = classifier.train_classifier(
        colours, store.splits.train, semi.recipes[0], store, num_classes=3, frozen=False, seed=0, name="it"
    )
    assert not torch.equal(network[0].layer.weight, colours.layer.weight)
    assert not torch.equal(network[0].norm.running_mean, colours.norm.running_mean)


def test_a_published_list_chooses_the_images_and_a_wrong_name_is_told(tmp_path):
    from PIL import Image

    from caco.data.sets.class_folders import class_folders

    for name in ("n01", "n02"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (4, 4)).save(tmp_path / "images" / name / f"{name}_{i}.png")
    source = class_folders(tmp_path / "images", "tiny")
    (tmp_path / "one.txt").write_text("n02_1.png\nn01_3.png\n")
    assert [source.path(i).name for i in listed(source, str(tmp_path / "one.txt"))] == ["n01_3.png", "n02_1.png"]
    (tmp_path / "two.txt").write_text("n02_1.png\nn09_3.png\n")
    with pytest.raises(ValueError, match=r"got 2 names, 0 repeated, 1 not there \(n09_3.png\)"):
        listed(source, str(tmp_path / "two.txt"))
    with pytest.raises(ValueError, match="lists: expected a text file .* which is not there"):
        listed(source, str(tmp_path / "three.txt"))


def test_a_list_needs_images_with_names(store_of, tmp_path):
    (tmp_path / "one.txt").write_text("a.png\n")
    with pytest.raises(ValueError, match="expected images in files, got train"):
        FineTune(fractions=[0.1], epochs=[1], lists=[str(tmp_path / "one.txt")]).build(store_of(), seed=0)


def test_a_share_without_its_epochs_is_refused():
    with pytest.raises(ValueError, match="an entry of epochs .* for each of the 2 fractions"):
        FineTune(fractions=[0.1, 0.2], epochs=[1])
