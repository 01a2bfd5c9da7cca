"""PIC's loss, class weights and order of images are as published; the expected values are computed independently
here.
"""

import math

import fifty
import numpy as np
import pytest
import torch
from fifty import B, D
from tiny import batch_of, now
from torch.nn import functional as F

from caco.banks.class_weights import ClassWeights
from caco.config import composition
from caco.config.composition import instantiate
from caco.engine.assembly import build_encoder, method_on
from caco.engine.optimizers import OptimizerSchedule
from caco.engine.optimizers import sgd as sgd_of
from caco.methods.pic import PIC, images_in_windows
from caco.runs.identity import plain
from caco.schedules import RunShape

N, TAU = 21, 0.2
LAYERS = {"layers": 2, "batch_norm": False, "bias": True}


def pic(**settings) -> PIC:
    bank = ClassWeights(size=N, dim=D, seed=3, weight_decay=1e-3)
    return PIC(encoder=fifty.encoder(**LAYERS), bank=bank, num_images=N, batch=B, temperature=TAU, **settings).double()


def loss_by_hand(v, weights, images, tau=TAU):
    unit = weights / weights.norm(dim=1, keepdim=True)
    return F.cross_entropy(v @ unit.T / tau, torch.tensor(images))


def test_loss_and_gradients_of_encoder_and_class_weights_are_autograd_s():
    """One image is twice in the batch, as happens when it replaces an unreadable one, and most classes have no
    image.
    """
    method = pic()
    (view,), images = fifty.views_of(0, 1), [4, 4, 6, 0, 20, 1, 2, 3]
    batch = batch_of([view])
    batch.index.copy_(torch.tensor(images))
    before = method.bank.rows.weight.detach().clone()
    assert before.std().item() == pytest.approx(0.01, rel=0.2), "the rows start with a standard deviation of 0.01"
    loss = method(batch, now()).loss
    loss.backward()
    ours = {name: p.grad.clone() for name, p in method.encoder.named_parameters()}
    assert method.bank.rows.weight.grad is None and torch.equal(method.bank.rows.weight, before)
    method.zero_grad()

    weights = before.clone().requires_grad_()
    v = F.normalize(method.encoder.projector(method.encoder.backbone(view)), dim=1)
    by_hand = loss_by_hand(v, weights, images)
    by_hand.backward()
    assert torch.allclose(loss, by_hand, atol=1e-12)
    for name, p in method.encoder.named_parameters():
        assert torch.allclose(ours[name], p.grad, atol=1e-12), name
    method.bank.update(lr=0.01)
    assert torch.allclose(method.bank.rows.velocity, weights.grad + 1e-3 * before, atol=1e-11)
    assert torch.allclose(method.bank.rows.weight, before - 0.01 * method.bank.rows.velocity, atol=1e-12)
    moved = method.bank.rows.weight.detach().clone()
    method.bank.update(lr=0.01)
    assert torch.equal(method.bank.rows.weight, moved), "without a loss since the last update, the rows stay"


def test_small_views_leave_the_class_weights_alone_and_count_as_much():
    method = pic()
    large, *small = fifty.views_of(0, 4)
    batch = batch_of([large, *(F.pad(view, (0, 1, 0, 1)) for view in small)])
    method.encoder.backbone = _Cut(method.encoder.backbone)
    loss = method(batch, now()).loss
    before, weights = (
        method.bank.rows.weight.detach().clone(),
        method.bank.rows.weight.detach().clone().requires_grad_(),
    )
    loss.backward()
    method.bank.update(lr=1.0)
    each = []
    for number, view in enumerate(batch.views):
        rows = weights if number == 0 else weights.detach()
        each.append(loss_by_hand(method.encoder(view), rows, range(B)))
    by_hand = sum(each) / 4
    by_hand.backward()
    assert torch.allclose(loss, by_hand, atol=1e-12)
    assert torch.allclose(method.bank.rows.weight, before - (weights.grad + 1e-3 * before), atol=1e-10)


class _Cut(torch.nn.Module):
    """A backbone for views of 2 and of 3 pixels."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, view):
        return self.backbone(view[:, :, :2, :2])


def test_fifty_steps_are_those_of_a_plain_loop():
    """One SGD for all parameters: the classifier has the same rate, weight decay and momentum as the encoder."""
    method, peak, final = pic(), 0.05, 1e-6
    w = fifty.weights_of(method.encoder)
    w = {f"encoder.{name}": value for name, value in w.items()}
    w["classes"] = method.bank.rows.weight.detach().clone().requires_grad_()
    velocity, first = {}, lambda step: 3 * step % (N - B)
    optimizer = sgd_of(method.parameter_groups(), batch=B, lr=peak, reference_batch=None, weight_decay=1e-3)
    losses = fifty.train(
        method, optimizer, count=1, first=first, warmup_epochs=2, warmup_start=0.01, warmup_end="next",
        final_fraction=None,
        final_lr=final,
    )  # fmt: skip
    by_hand = []
    for step in range(fifty.STEPS):
        (view,), images = fifty.views_of(step, 1), range(first(step), first(step) + B)
        x = fifty.backbone(w, view) @ w["encoder.projector.0.weight"].T + w["encoder.projector.0.bias"]
        x = x.clamp_min(0) @ w["encoder.projector.2.weight"].T + w["encoder.projector.2.bias"]
        loss = loss_by_hand(x / x.norm(dim=1, keepdim=True), w["classes"], images)
        by_hand.append(loss)
        rate = peak * (0.01 + 0.99 * step / 10)
        if step >= 10:
            rate = final + (peak - final) * (1 + math.cos(math.pi * (step - 10) / 40)) / 2
        fifty.sgd(w, fifty.gradients_of(loss, w), velocity, {"": rate}, 1e-3)
    assert torch.allclose(torch.tensor(losses, dtype=torch.float64), torch.stack(by_hand).detach(), atol=1e-9)
    assert torch.allclose(method.bank.rows.weight, w["classes"], atol=1e-9)
    for name, value in fifty.weights_of(method.encoder).items():
        assert torch.allclose(value, w[f"encoder.{name}"], atol=1e-9), name
    assert losses[-1] < losses[0] - 0.05


WINDOWS = {"num_images": 100, "size": 32, "stride": 4, "batch": 8, "seed": 0}


def windows_of(kind, count, **changed):
    taken = images_in_windows(0, 32 * count, kind=kind, **{**WINDOWS, **changed})
    return [set(part.tolist()) for part in taken.reshape(count, 32)]


def test_a_window_moves_on_by_its_stride_and_an_image_is_in_eight_of_them_one_after_the_other():
    windows = windows_of("window", 50)
    assert all(len(window) == 32 for window in windows), "a visit has each of its images once"
    assert all(len(a & b) == 28 for a, b in zip(windows, windows[1:], strict=False))
    assert windows[25] == windows[0], "100 images with a stride of 4: the window returns after 25 visits"
    seen = [[number for number, window in enumerate(windows[:25]) if image in window] for image in range(100)]
    assert all(len(visits) == 8 for visits in seen)
    assert sum(visits[-1] - visits[0] == 7 for visits in seen) >= 100 - 32, (
        "all images except those in a window at the start or end of the count"
    )
    assert windows_of("window", 8, seed=1) != windows[:8]


def test_the_released_window_stays_and_with_its_shuffling_is_drawn_anew_but_for_each_eighth():
    stays = windows_of("released", 20)
    assert all(window == stays[0] for window in stays)
    shuffled = windows_of("released_shuffled", 26)
    equal = [number for number in range(1, 26) if shuffled[number] == shuffled[number - 1]]
    assert equal == [8, 16, 24]
    assert len(set().union(*shuffled)) == 100


@pytest.mark.parametrize("kind", ["window", "released", "released_shuffled"])
def test_any_part_of_the_sequence_is_the_whole_one_s_and_no_batch_holds_an_image_twice(kind):
    whole = images_in_windows(0, 960, kind=kind, **WINDOWS)
    assert np.array_equal(images_in_windows(104, 400, kind=kind, **WINDOWS), whole[104:400])
    assert all(len(set(batch)) == 8 for batch in whole.reshape(-1, 8).tolist())
    five = images_in_windows(0, 300, kind=kind, **{**WINDOWS, "batch": 5})  # 30 of the 32 images of a visit
    assert all(len(set(batch)) == 5 for batch in five.reshape(-1, 5).tolist())


def test_the_method_s_epochs_cut_the_sequence_and_a_window_of_all_images_is_the_loader_s_order():
    method = pic(window_size=12, window_stride=4)
    epochs = [method.order(epoch) for epoch in range(3)]
    assert [len(epoch) for epoch in epochs] == [16] * 3, "21 images make two whole batches of 8"
    whole = images_in_windows(0, 48, num_images=N, size=12, stride=4, batch=B, seed=0, kind="window")
    assert np.array_equal(np.concatenate(epochs), whole)
    assert pic().order(0) is None and pic(window_size=12, order="epoch").order(0) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "slide"}, r"order: expected window \| released \| released_shuffled \| epoch, got 'slide'"),
        ({"window_size": 7}, "window_size of at least the batch, 8"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        pic(**settings)


def test_banks_without_a_meaning_are_refused():
    for settings, message in (
        ({"size": None}, "need size, the number of images"),
        ({"spread": 0.0}, r"spread: expected float above 0, got 0\.0"),
        ({"momentum": 1.0}, "momentum: expected float from 0 below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassWeights(**{"size": N, "dim": D, "seed": 0, **settings})
    with pytest.raises(ValueError, match="a row for each of the 30 training images; got 21 rows"):
        PIC(encoder=fifty.encoder(**LAYERS), bank=ClassWeights(size=N, dim=D, seed=0), num_images=30, batch=B)


def test_its_configuration_is_the_published_one():
    cfg = composition.job_config(composition.compose(["method=pic", "batch=512"]))
    tree = plain(cfg)
    expected = {"temperature": 0.2, "order": "window", "window_size": 131_072, "window_stride": 16_384, "batch": 512}
    assert {key: tree["method"][key] for key in expected} == expected
    assert (tree["bank"]["spread"], tree["bank"]["momentum"], tree["bank"]["weight_decay"]) == (0.01, 0.9, 1e-4)
    assert tree["backbone"]["zero_init_last"] is True
    encoder = build_encoder(cfg)
    linear = [layer for layer in encoder.projector if isinstance(layer, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(2048, 2048), (2048, 128)]
    assert all(layer.bias is not None for layer in linear)
    method = method_on(encoder, cfg, 1000)[0]
    optimizer = instantiate(cfg.optimizer, groups=method.parameter_groups())
    learning = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(
        (group["lr"], group["weight_decay"], group["momentum"]) == (0.06, 1e-4, 0.9) for group in optimizer.param_groups
    )
    assert id(method.bank.rows.weight) not in learning, "the class weights are moved by the bank's own SGD"
    schedule = {name: value for name, value in cfg.schedule.items() if name != "unit"}
    rates = OptimizerSchedule(**schedule).learning_rate(RunShape(200, 4, 512), 0.06)
    assert (rates[0], rates[10], rates[20]) == pytest.approx((0.01, 0.505, 1.0)) and rates[-1] * 0.06 == pytest.approx(
        1e-6, rel=2
    )
    assert instantiate(cfg.augmentation).sizes == [224]
    crops = composition.job_config(composition.compose(["method=pic", "augmentation=pic_multicrop"]))
    assert instantiate(crops.augmentation).sizes == [160, 96, 96, 96]
