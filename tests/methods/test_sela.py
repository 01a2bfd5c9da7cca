"""SeLa's labels, the moments of labelling and the loss are as published; an interrupted labelling resumes to the same
bits.
"""

import math

import fifty
import numpy as np
import pytest
import torch
from fifty import B
from interrupted import Cut
from recorded import assert_same, final, record
from tiny import EVERY, FEW_PROTOTYPES, compose, now, train
from torch import nn
from torch.nn import functional as F

from caco.config import composition
from caco.config.composition import instantiate
from caco.data.loaders.batches import Batch
from caco.data.loaders.images import Images
from caco.engine.assembly import build_encoder, method_on
from caco.engine.optimizers import OptimizerSchedule
from caco.engine.optimizers import sgd as sgd_of
from caco.methods import assignments
from caco.methods.sela import SeLa
from caco.runs.identity import plain
from caco.schedules import RunShape

N, H, K = 30, 2, 3
LAYERS = {"layers": 1, "batch_norm": False, "bias": True, "dim": H * K}


class FewImages:
    """Thirty images in batches of eight; two images that came before fill up the last batch."""

    def __init__(self):
        self.streams = []

    def views_of(self, stream):
        generator = torch.Generator().manual_seed(700 + stream)
        order = torch.cat([torch.randperm(N, generator=generator), torch.tensor([0, 1])])
        return torch.randn(N + 2, 3, 2, 2, generator=generator, dtype=torch.float64), order

    def __call__(self, kind, *, stream=0):
        assert kind == "train"
        self.streams.append(stream)
        views, order = self.views_of(stream)
        for number, part in enumerate(torch.arange(N + 2).split(8)):
            index = order[part]
            yield Batch([views[part]], torch.where(part < N, index, -1), torch.full_like(index, -1))
        assert number == 3


def sela(**settings) -> SeLa:
    return SeLa(
        encoder=fifty.encoder(**LAYERS), num_images=N, **{"num_heads": H, "num_moments": 6, "seed": 1, **settings}
    ).double()


def labels_by_loops(p, power, tolerance):
    """The published function cpu_sk, computed with loops."""
    p = [[value**power for value in row] for row in p]
    images, labels = len(p), len(p[0])
    c, error, count = [1 / images] * images, math.inf, 0
    while error > tolerance:
        r = [1 / labels / sum(p[i][k] * c[i] for i in range(images)) for k in range(labels)]
        new = [1 / images / sum(p[i][k] * r[k] for k in range(labels)) for i in range(images)]
        if count % 10 == 0:
            error = sum(abs(c[i] / new[i] - 1) for i in range(images))
        c, count = new, count + 1
    return [max(range(labels), key=lambda k: r[k] * p[i][k] * c[i]) for i in range(images)], count


@pytest.mark.parametrize(("power", "tolerance"), [(25, 0.1), (10, 1e-6)])
def test_labels_are_those_of_the_published_loop_and_balanced(power, tolerance):
    drawn = torch.randn(120, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = 0.3 * drawn + torch.tensor([1.0, 0.0, 0.0, -1.0])
    expected, count = labels_by_loops(F.softmax(logits, 1).tolist(), power, tolerance)
    ours = assignments.balanced_labels(F.log_softmax(logits, 1), power=power, tolerance=tolerance)
    assert ours.tolist() == expected and count > 10
    counts = torch.bincount(ours, minlength=4)
    assert counts.min() >= 20, "each label must have about thirty images"
    assert torch.bincount(logits.argmax(1), minlength=4)[0] > 60, (
        "without balancing, most images would take the first label"
    )


def test_a_label_that_no_image_has_any_probability_of_is_said():
    """In the published loop the numbers become NaN in this case."""
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.tensor(
        [0.0, 0.0, -2000.0]
    )
    with pytest.raises(ValueError, match="1 of 3 labels have a probability of 0 for every image"):
        assignments.balanced_labels(F.log_softmax(logits, 1), power=25, tolerance=0.1)


def test_the_first_labels_are_balanced_and_in_another_order_for_each_head():
    method = sela()
    for head in method.labels:
        assert torch.bincount(head).tolist() == [10, 10, 10]
    assert not torch.equal(*method.labels)
    assert torch.equal(method.labels, sela().labels) and not torch.equal(method.labels, sela(seed=2).labels)


def test_the_moments_are_dense_at_first():
    """The moments are t_j = (E + 1.01)(j/5)^2 epochs. For E = 4 and 30 images per epoch that is after 0, 6.0, 24.0,
    54.1, 96.1 and 150.2 images, rounded to whole steps.
    """
    run = RunShape(epochs=4, steps_per_epoch=3, batch=8)
    table = sela().schedules(run)["labels_made"]
    # the fifth and sixth moment are after the end
    assert [step for step, made in enumerate(table) if made] == [0, 1, 4, 7]
    assert sum(sela(num_moments=0).schedules(run)["labels_made"]) == 0
    linear = sela(spacing="linear").schedules(run)["labels_made"]
    assert [step for step, made in enumerate(linear) if made] == [0, 4, 8], "one moment every 30.06 images"
    crowded = sela(num_moments=100).schedules(run)["labels_made"]
    assert crowded[:10] == [1.0] * 10, "at most one labelling per step; the others wait"


def published_moments(epochs, batches, batch, num_images, moments):
    """The moments in the released code: a list of times in images, whose last entry is compared with the number of
    images so far, and removed.
    """
    times = ((epochs + 1.01) * num_images * (np.linspace(0, 1, moments) ** 2)[::-1]).tolist()
    made = []
    for step in range(epochs * batches):
        if times and step * batch >= times[-1]:
            times.pop()
            made.append(step)
    return made


def test_the_moments_of_the_published_run():
    cfg_run = RunShape(epochs=400, steps_per_epoch=5004, batch=256)
    method = sela()
    method.num_moments, method.num_images = 100, 1_281_167
    table = method.schedules(cfg_run)["labels_made"]
    made = [step for step, value in enumerate(table) if value]
    assert made == published_moments(400, 5004, 256, 1_281_167, 100) and made[:2] == [0, 205] and len(made) == 99


def forward_by_hand(w, view):
    x = fifty.backbone(w, view)
    return x @ w["encoder.projector.0.weight"].T + w["encoder.projector.0.bias"]


def loss_by_hand(logits, labels, images):
    """The loss: -log softmax at the label, averaged over heads and images."""
    total = 0.0
    for h in range(H):
        log_p = torch.log_softmax(logits[:, h * K : (h + 1) * K], 1)
        total = total - log_p[torch.arange(len(images)), labels[h, images]].mean() / H
    return total


def test_labels_are_made_by_a_pass_as_in_training():
    """The pass uses augmented views and training mode: BatchNorm uses the statistics of each batch, also of the
    filled-up one, and its running statistics change.
    """
    method, images = sela().train(), FewImages()
    w = fifty.weights_of(method)
    running = method.encoder.backbone[2].running_mean.clone()
    method.before_step(now(step=7, labels_made=1.0), images)
    assert images.streams == [7]
    views, order = images.views_of(7)
    logits = torch.cat([forward_by_hand(w, part) for part in views.split(8)])[:N].detach()
    for h in range(H):
        expected, _ = labels_by_loops(F.softmax(logits[:, h * K : (h + 1) * K], 1).tolist(), 25, 0.1)
        assert method.labels[h, order[:N]].tolist() == expected
    assert not torch.equal(method.encoder.backbone[2].running_mean, running)
    assert all(p.grad is None for p in method.parameters())
    before = method.labels.clone()
    method.before_step(now(step=8, labels_made=0.0), None)
    assert torch.equal(method.labels, before)


def test_one_head_at_a_time():
    method, images = sela(one_head_at_a_time=True), FewImages()
    before, at = method.labels.clone(), now(labels_made=1.0)
    method.before_step(type(at)(9, "training", 9, False, 3, 0, at.values), images)
    assert torch.equal(method.labels[0], before[0]) and not torch.equal(method.labels[1], before[1]), (
        "in epoch 3 only head 3 modulo 2 = 1 is labelled"
    )


def test_heads_behind_a_hidden_layer_are_labelled_as_they_are_trained():
    method, images = (
        SeLa(encoder=fifty.encoder(layers=2, dim=H * K), num_images=N, num_heads=H).double().train(),
        FewImages(),
    )
    method.make_labels(images, 3, [0, 1])
    views, order = images.views_of(3)
    with torch.no_grad():
        logits = torch.cat([method.encoder(part, unit=False) for part in views.split(8)])[:N]
    expected, _ = labels_by_loops(F.softmax(logits[:, K:], 1).tolist(), 25, 0.1)
    assert method.labels[1, order[:N]].tolist() == expected


def test_fifty_steps_are_those_of_a_plain_loop():
    method, peak, images = sela(num_moments=20), 0.1, FewImages()
    w, velocity, labels = fifty.weights_of(method), {}, method.labels.clone().long()
    first = lambda step: 3 * step % (N - B)  # noqa: E731
    optimizer = sgd_of(method.parameter_groups(), batch=B, lr=peak, reference_batch=None, weight_decay=1e-5)
    losses = fifty.train(
        method,
        optimizer,
        count=1,
        first=first,
        images=images,
        warmup_epochs=0,
        final_fraction=None,
        drops=[0.375, 0.75, 0.875],
    )
    moments = published_moments(10, 5, B, N, 20)
    assert images.streams == moments and len(moments) > 10
    by_hand = []
    for step in range(fifty.STEPS):
        (view,), seen = fifty.views_of(step, 1), list(range(first(step), first(step) + B))
        if step in moments:
            views, order = images.views_of(step)
            logits = torch.cat([forward_by_hand(w, part) for part in views.split(8)])[:N].detach()
            for h in range(H):
                labels[h, order[:N]] = torch.tensor(
                    labels_by_loops(F.softmax(logits[:, h * K : (h + 1) * K], 1).tolist(), 25, 0.1)[0]
                )
        loss = loss_by_hand(forward_by_hand(w, view), labels, seen)
        by_hand.append(loss)
        rate = (
            peak * (0.1 if step >= 20 else 1) * (0.1 if step >= 40 else 1) * (0.1 if step >= 45 else 1)
        )  # in epochs 4, 8 and 9 of ten
        fifty.sgd(w, fifty.gradients_of(loss, w), velocity, {"": rate}, 1e-5)
    fifty.assert_same_training(losses, method, by_hand, w)
    assert torch.equal(method.labels.long(), labels)


def test_a_pass_over_the_training_s_views_has_every_image_once_and_whole_batches():
    """1,400 images make 21 batches of 64, and one of 56 images that is filled up with 8 others."""
    cfg = compose("pn=none", bank=False)
    source, views = instantiate(cfg.data).pretrain, instantiate(cfg.augmentation)

    def images(rank=0, world=1):
        def bind():
            return instantiate(cfg.loader).bind(source, views, batch=64, seed=0, rank=rank, world=world, device="cpu")

        return Images(source, views, bind, batch=64, device=torch.device("cpu"), rank=rank, world=world)

    whole = list(images()("train", stream=5))
    index = torch.cat([batch.index for batch in whole])
    assert [len(batch.index) for batch in whole] == [64] * 22
    assert sorted(index.tolist()) == [-1] * 8 + list(range(1400)) and (whole[-1].index[:56] >= 0).all()
    halves = [list(images(rank, 2)("train", stream=5)) for rank in range(2)]
    assert torch.equal(torch.cat([torch.cat([a.index, b.index]) for a, b in zip(*halves, strict=True)]), index)
    again, other = images(), images()
    assert all(torch.equal(a.views[0], b.views[0]) for a, b in zip(again("train", stream=5), whole, strict=True))
    assert not torch.equal(next(other("train", stream=6)).index, whole[0].index)


TINY_SELA = ["method=sela", "augmentation=digits", "projector=small", "projector.hidden_dim=16", "projector.dim=8",
"optimizer=sgd",
             *FEW_PROTOTYPES["sela"], "data.limit=250", "epochs=3", "max_steps=9", "eval=[]"]  # fmt: skip


def test_a_run_cut_in_the_middle_of_a_labelling_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """Three steps per epoch. The run is interrupted between the two heads of the fourth labelling, when BatchNorm's
    statistics have changed and one head has its new labels."""
    train(tmp_path / "whole", *TINY_SELA, *EVERY, bank=False)
    original, calls = assignments.balanced_labels, []

    def cut(*arguments, **options):
        calls.append(1)
        if len(calls) == 8:
            raise Cut
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(assignments, "balanced_labels", cut)
        with pytest.raises(Cut):
            train(tmp_path / "cut", *TINY_SELA, *EVERY, bank=False)
    assert final(tmp_path / "cut")["step"] == 3
    train(tmp_path / "cut", *TINY_SELA, *EVERY, bank=False)
    assert_same(final(tmp_path / "whole"), final(tmp_path / "cut"))
    assert record(tmp_path / "whole") == record(tmp_path / "cut")
    assert sum(row["labels_made"] for row in record(tmp_path / "whole") if row["kind"] == "train") >= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 4}, "method.num_heads: expected a divisor of projector.dim, 6, .*; got 4"),
        ({"num_heads": 6}, "2 labels or more to a head; got 6"),
        ({"power": 0.0}, r"power: expected float above 0, got 0\.0"),
        ({"spacing": "cubic"}, r"spacing: expected quadratic \| linear"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sela(**settings)


def test_a_head_that_ends_in_batchnorm_is_refused():
    with pytest.raises(ValueError, match="projector.last_batch_norm=true"):
        SeLa(encoder=fifty.encoder(**LAYERS, last_batch_norm=True), num_images=N, num_heads=H)


def test_its_configuration_is_the_published_one():
    cfg = composition.job_config(composition.compose(["method=sela", "batch=256"]))
    tree = plain(cfg)
    expected = {"num_heads": 10, "num_moments": 100, "spacing": "quadratic", "power": 25.0, "tolerance": 0.1}
    assert not tree["method"]["one_head_at_a_time"]
    assert {key: tree["method"][key] for key in expected} == expected and tree["bank"] is None
    encoder = build_encoder(cfg)
    method = method_on(encoder, cfg, 100)[0]
    assert (method.num_labels, encoder.projector[0].in_features) == (3000, 2048)
    optimizer = instantiate(cfg.optimizer, groups=method.parameter_groups())
    assert all(
        (group["lr"], group["weight_decay"], group["momentum"]) == (0.08, 1e-5, 0.9) for group in optimizer.param_groups
    )
    schedule = {name: value for name, value in cfg.schedule.items() if name != "unit"}
    rates = OptimizerSchedule(**schedule).learning_rate(RunShape(400, 1, 256))
    assert [rates[epoch] for epoch in (149, 150, 299, 300, 349, 350, 399)] == pytest.approx(
        [1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )
    backbone = encoder.backbone
    kinds = [type(module).__name__ for module in backbone.stem]
    assert not any("Norm" in kind for kind in kinds) and isinstance(backbone.norm, nn.Identity)
    x = torch.randn(2, 3, 64, 64)
    last = backbone.stages(backbone.stem(x))
    assert torch.equal(backbone.eval()(x), backbone(x)) and (backbone.eval()(x) < 0).any(), (
        "there must be no ReLU before the pooling"
    )
    assert last.shape[1] == 2048
    assert all(block.norm3.weight.abs().min() > 0 for stage in backbone.stages for block in stage.blocks)
    assert all(p.requires_grad for p in backbone.parameters())
