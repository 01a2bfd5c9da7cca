"""InstDisc's losses, bank, constant Z and draws are as published; the expected values are computed independently
here.
"""

import math

import fifty
import pytest
import torch
from fifty import B, D, cosine, sgd
from tiny import batch_of, now
from torch.nn import functional as F

from caco.banks import noise
from caco.banks.by_image import ImageBank
from caco.config import composition
from caco.config.composition import instantiate
from caco.data.loaders.batches import mixed_seed
from caco.engine.assembly import build_encoder, method_on
from caco.engine.optimizers import OptimizerSchedule
from caco.engine.optimizers import sgd as sgd_of
from caco.methods.instdisc import InstDisc
from caco.runs.identity import plain
from caco.schedules import RunShape

N, M, TAU = 21, 6, 0.3
LAYERS = {"layers": 1, "batch_norm": False, "bias": True}


def instdisc(**settings) -> InstDisc:
    bank = ImageBank(size=N, dim=D, seed=3, **({"norms": settings.pop("norms")} if "norms" in settings else {}))
    given = {"temperature": TAU, "num_noise": M, "seed": 5, **settings}
    return InstDisc(encoder=fifty.encoder(**LAYERS), bank=bank, num_images=N, **given).double()


def drawn_by_hand(stream: int, image: int, count: int, size: int) -> list[int]:
    """SplitMix64 in Python's integers, cut to 64 bits; the 53 highest bits of a number, as a fraction, times `size`."""
    cut, step = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(bits):
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & cut
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & cut
        return bits ^ (bits >> 31)

    start = mix((stream + step * (image + 1)) & cut)
    return [int((mix((start + step * j) & cut) >> 11) * 2.0**-53 * size) for j in range(1, count + 1)]


def test_the_draws_are_splitmix_s_of_stream_and_image_alone():
    stream, images = mixed_seed(0, 7), torch.tensor([0, 5, 1_281_166])
    rows = noise.noise_rows(stream, images, 50, 1_281_167)
    assert rows.tolist() == [drawn_by_hand(stream, image, 50, 1_281_167) for image in images.tolist()]
    assert torch.equal(noise.noise_rows(stream, images[1:2], 20, 1_281_167)[0], rows[1, :20]), (
        "the draws do not depend on the batch or on their number"
    )
    assert not torch.equal(noise.noise_rows(mixed_seed(0, 8), images, 50, 1_281_167), rows)


def test_the_draws_are_uniform_with_replacement_and_may_be_the_image_itself():
    rows = noise.noise_rows(mixed_seed(1, 1), torch.arange(400), 500, 10)
    counts = torch.bincount(rows.flatten(), minlength=10)
    assert len(counts) == 10 and (counts - 20_000).abs().max() < 6 * math.sqrt(20_000 * 0.9)
    itself = (rows == (torch.arange(400) % 10)[:, None]).double().mean()
    assert itself == pytest.approx(0.1, abs=0.005)


def nce_by_hand(v, V, images, draws, tau, Z, epsilon=1e-7):
    """The loss -1/B sum_i [log P_i / (P_i + M/N + eps) + sum_j log (M/N) / (P_j + M/N + eps)], one number at a time."""
    total, c = 0.0, len(draws[0]) / len(V)
    for i, image in enumerate(images):
        p = (v[i] @ V[image] / tau).exp() / Z
        total = total - (p / (p + c + epsilon)).log()
        for j in draws[i]:
            total = total - (c / ((v[i] @ V[j] / tau).exp() / Z + c + epsilon)).log()
    return total / len(images)


def normaliser_by_hand(v, V, images, draws, tau):
    scores = [(v[i] @ V[j] / tau).exp().item() for i, image in enumerate(images) for j in [image, *draws[i]]]
    return len(V) * sum(scores) / len(scores)


def softmax_by_hand(v, V, images, draws, tau):
    """Cross entropy over the drawn rows and the image's own row; over all rows if none are drawn."""
    losses = []
    for i, image in enumerate(images):
        others = draws[i] if draws is not None else [j for j in range(len(V)) if j != image]
        logits = torch.stack([v[i] @ V[j] / tau for j in [image, *others]])
        losses.append(torch.logsumexp(logits, 0) - logits[0])
    return torch.stack(losses).mean()


def draws_of(step, images, seed=5):
    return [drawn_by_hand(mixed_seed(seed, step), image, M, N) for image in images]


@pytest.mark.parametrize(
    "settings",
    [{}, {"proximal_weight": 0.7}, {"loss": "softmax"}, {"loss": "softmax", "num_noise": None}, {"norms": "normal"}],
)
def test_loss_and_gradients_are_the_formula_s(settings):
    method = instdisc(**settings)
    (view,), images = fifty.views_of(0, 1), list(range(4, 4 + B))
    V = method.bank.rows.weight.detach()
    assert (V.norm(dim=1) - 1).abs().max() > 0.05, (
        "the rows count as they are stored, and are not unit before they are written"
    )
    outputs = method(batch_of([view], first=4), now(step=9))
    outputs.loss.backward()
    ours = {name: p.grad.clone() for name, p in method.encoder.named_parameters()}
    assert method.bank.rows.weight.grad is None
    method.zero_grad()

    v = F.normalize(method.encoder.projector(method.encoder.backbone(view)), dim=1)
    draws = draws_of(9, images)
    if settings.get("loss") == "softmax":
        loss = softmax_by_hand(v, V, images, None if "num_noise" in settings else draws, TAU)
    else:
        loss = nce_by_hand(v, V, images, draws, TAU, normaliser_by_hand(v, V, images, draws, TAU))
    loss = loss + settings.get("proximal_weight", 0.0) * (v - V[images]).square().sum(1).mean()
    loss.backward()
    assert torch.allclose(outputs.loss, loss, atol=1e-12)
    for name, p in method.encoder.named_parameters():
        assert torch.allclose(ours[name], p.grad, atol=1e-12), name


def test_z_is_that_of_the_first_step_for_ever_and_in_the_state():
    method = instdisc()
    assert method.state_dict()["bank.normaliser"] == 0
    for step in range(3):
        (view,) = fifty.views_of(step, 1)
        V = method.bank.rows.weight.detach().clone()
        images = list(range(step, step + B))
        draws = draws_of(step, images)
        with torch.no_grad():
            v = method.encoder(view)
            Z = normaliser_by_hand(v, V, images, draws, TAU) if step == 0 else Z  # noqa: F821 - Z stays that of step 0
            expected = nce_by_hand(v, V, images, draws, TAU, Z)
            assert torch.allclose(method(batch_of([view], first=step), now(step=step)).loss, expected, atol=1e-12)
        assert (method.bank.normaliser == 0) == (step == 0), "Z is stored only after the step"
        method.after_step(now(step=step))
        assert method.state_dict()["bank.normaliser"].item() == pytest.approx(Z, abs=1e-12)
    assert method.statistics()["bank/normaliser"] == pytest.approx(Z)


def test_a_row_moves_halfway_to_its_image_s_embedding_and_the_last_of_two_counts():
    bank = ImageBank(size=4, dim=2, seed=0)
    with torch.no_grad():
        bank.rows.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.5, 0.0]]))
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    bank.update(lr=0.0, keys_GD=keys, index_G=torch.tensor([3, 0, 3]))
    half, last = math.sqrt(0.5), torch.tensor([0.25, -0.5])
    expected = torch.stack(
        [torch.tensor([half, half]), torch.tensor([0.0, 1.0]), torch.tensor([0.6, 0.8]), last / last.norm()]
    )
    assert torch.allclose(bank.rows.weight, expected)
    with pytest.raises(ValueError, match="a bank by image is updated by the images' indices"):
        bank.update(lr=0.0, keys_GD=keys)


def test_the_rows_begin_uniform_with_norms_about_1():
    rows = ImageBank(size=5000, dim=128, seed=0).rows.weight.detach()
    assert rows.abs().max() <= math.sqrt(3 / 128) and rows.abs().max() > 0.999 * math.sqrt(3 / 128)
    assert rows.var().item() == pytest.approx(1 / 128, rel=0.01) and rows.mean().abs() < 1e-3


def test_over_all_rows_unit_ones_and_those_as_they_are_stored_score_alike_and_in_float32_too():
    """The fused kernel normalises rows itself, so it is used only where every row already has length 1."""
    bank = ImageBank(size=300, dim=16, seed=0, norms="unit")
    q = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    assert bank.rows.are_unit()
    fused = bank.score(q, torch.arange(8), temperature=0.07).loss_B
    expected = F.cross_entropy(
        q.double() @ bank.rows.weight.detach().double().T / 0.07, torch.arange(8), reduction="none"
    )
    assert torch.allclose(
        fused.double(), expected, atol=2e-2
    )  # AMX tiles compute with pairs of bfloat16: cosines are exact to 2^-14, and are divided by 0.07
    with torch.no_grad():
        bank.rows.weight[17] *= 1.5
    assert not bank.rows.are_unit()
    stored = bank.score(q, torch.arange(8), temperature=0.07).loss_B
    expected = F.cross_entropy(
        q.double() @ bank.rows.weight.detach().double().T / 0.07, torch.arange(8), reduction="none"
    )
    assert torch.allclose(stored.double(), expected, atol=1e-4)
    with torch.no_grad():
        bank.rows.weight[17] *= 40  # e^(60 / 0.07) overflows float32
    expected = F.cross_entropy(
        q.double() @ bank.rows.weight.detach().double().T / 0.07, torch.arange(8), reduction="none"
    )
    assert torch.allclose(
        bank.score(q, torch.arange(8), temperature=0.07).loss_B.double(), expected, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    "settings", [{}, {"loss": "softmax"}, {"loss": "softmax", "num_noise": None}, {"proximal_weight": 0.5}]
)
def test_fifty_steps_are_those_of_a_plain_loop(settings):
    """SGD with weight decay on all parameters; its rate is a tenth from epoch 6 of 10 on and a hundredth from epoch 8
    on.
    """
    method = instdisc(**settings)
    w, velocity = fifty.weights_of(method), {}
    V, Z, peak = method.bank.rows.weight.detach().clone(), None, 0.2
    first = lambda step: 3 * step % (N - B)  # noqa: E731

    optimizer = sgd_of(method.parameter_groups(), batch=B, lr=peak, reference_batch=None, weight_decay=1e-3)
    losses = fifty.train(
        method, optimizer, count=1, first=first, warmup_epochs=0, final_fraction=None, drops=[0.6, 0.8], drop_factor=0.1
    )
    by_hand = []
    for step in range(fifty.STEPS):
        (view,), images = fifty.views_of(step, 1), list(range(first(step), first(step) + B))
        x = fifty.backbone(w, view) @ w["encoder.projector.0.weight"].T + w["encoder.projector.0.bias"]
        v = x / x.norm(dim=1, keepdim=True)
        draws = draws_of(step, images)
        if settings.get("loss") == "softmax":
            loss = softmax_by_hand(v, V, images, None if "num_noise" in settings else draws, TAU)
        else:
            Z = normaliser_by_hand(v.detach(), V, images, draws, TAU) if Z is None else Z
            loss = nce_by_hand(v, V, images, draws, TAU, Z)
        loss = loss + settings.get("proximal_weight", 0.0) * (v - V[images]).square().sum(1).mean()
        by_hand.append(loss)
        rate = peak * (0.1 if step >= 30 else 1.0) * (0.1 if step >= 40 else 1.0)
        sgd(w, fifty.gradients_of(loss, w), velocity, {"": rate}, 1e-3)
        moved = 0.5 * V[images] + 0.5 * v.detach()
        V[images] = moved / moved.norm(dim=1, keepdim=True)
    fifty.assert_same_training(losses, method, by_hand, w)
    assert torch.allclose(method.bank.rows.weight, V, atol=1e-9)
    assert cosine(V[:5], V[5:10]).abs().max() < 0.999


def test_a_batch_in_parts_gives_the_whole_one_s_loss_and_rows_once_z_is_known():
    found = []
    for parts in (1, 4):
        method = instdisc(proximal_weight=0.3)
        method.bank.normaliser.fill_(40.0)
        method.encoder.eval()  # in training mode BatchNorm would depend on the parts
        (view,) = fifty.views_of(0, 1)
        losses = [method(part, now(step=2)).loss for part in batch_of([view], first=2).parts(parts)]
        torch.stack(losses).mean().backward()
        method.after_step(now(step=2))
        found.append(
            [
                torch.stack(losses).mean(),
                method.bank.rows.weight.detach(),
                *(p.grad for p in method.encoder.parameters()),
            ]
        )
    for whole, parts in zip(*found, strict=True):
        assert torch.allclose(whole, parts, atol=1e-12)


def test_of_several_views_the_losses_are_averaged_and_the_first_is_written():
    method = instdisc(loss="softmax")
    views = fifty.views_of(0, 2)
    alone = []
    for view in views:
        alone.append(instdisc(loss="softmax")(batch_of([view]), now(step=1)).loss)
    assert torch.allclose(method(batch_of(views), now(step=1)).loss, torch.stack(alone).mean(), atol=1e-12)
    V = method.bank.rows.weight.detach().clone()
    method.after_step(now(step=1))
    other = instdisc(loss="softmax")
    other(batch_of(views[:1]), now(step=1))
    other.after_step(now(step=1))
    assert torch.equal(method.bank.rows.weight, other.bank.rows.weight) and not torch.equal(method.bank.rows.weight, V)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature: expected float above 0, got 0\.0"),
        ({"proximal_weight": -1.0}, r"proximal_weight: expected float from 0, got -1\.0"),
        ({"loss": "l2"}, r"loss: expected nce \| softmax, got 'l2'"),
        ({"num_noise": None}, "method.loss=nce needs a number"),
        ({"num_noise": 0}, "num_noise: expected int from 1 or None"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        instdisc(**settings)


def test_a_bank_of_another_size_than_the_images_and_one_of_no_size_are_refused():
    with pytest.raises(ValueError, match="a row for each of the 30 training images; got 21 rows"):
        InstDisc(encoder=fifty.encoder(**LAYERS), bank=ImageBank(size=N, dim=D, seed=0), num_images=30)
    with pytest.raises(ValueError, match="needs size, the number of images"):
        ImageBank(size=None, dim=D, seed=0)
    with pytest.raises(ValueError, match="momentum: expected float from 0 below 1, got 1.0"):
        ImageBank(size=N, dim=D, seed=0, momentum=1.0)
    with pytest.raises(ValueError, match=r"norms: expected unit \| normal \| uniform, got 'even'"):
        ImageBank(size=N, dim=D, seed=0, norms="even")


def test_its_configuration_is_the_published_one():
    cfg = composition.job_config(composition.compose(["method=instdisc", "batch=256"]))
    tree = plain(cfg)
    assert {key: tree["method"][key] for key in ("temperature", "loss", "num_noise", "epsilon", "proximal_weight")} == {
        "temperature": 0.07, "loss": "nce", "num_noise": 4096, "epsilon": 1e-7, "proximal_weight": 0.0
    }  # fmt: skip
    assert tree["bank"]["size"] is None and (tree["bank"]["momentum"], tree["bank"]["norms"]) == (0.5, "uniform")
    encoder = build_encoder(cfg)
    assert [(layer.in_features, layer.out_features, layer.bias is not None) for layer in encoder.projector] == [
        (2048, 128, True)
    ]
    method = method_on(encoder, cfg, 1000)[0]
    assert method.bank.rows.weight.shape == (1000, 128)
    optimizer = instantiate(cfg.optimizer, groups=method.parameter_groups())
    assert all(
        (group["lr"], group["weight_decay"], group["momentum"]) == (0.03, 1e-4, 0.9) for group in optimizer.param_groups
    )
    schedule = {name: value for name, value in cfg.schedule.items() if name != "unit"}
    rates = OptimizerSchedule(**schedule).learning_rate(RunShape(200, 2, 256))
    assert [rates[2 * epoch] for epoch in (0, 119, 120, 159, 160, 199)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert instantiate(cfg.augmentation).sizes == [224]
