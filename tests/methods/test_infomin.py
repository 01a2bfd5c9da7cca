"""InfoMin: two queries for one key, one of them made of shuffled patches. Loss and fifty steps are compared with code
written independently from the publication.
"""

import copy
import math

import pytest
import torch
from driven import drive, tiny_encoder
from tiny import OF_PATCHES, batch_of, compose, layers_of, now

from caco.banks.fifo import FifoBank
from caco.config import composition, validation
from caco.config.composition import instantiate
from caco.engine.assembly import build_encoder
from caco.engine.optimizers import OptimizerSchedule, sgd
from caco.engine.training import run_training
from caco.errors import UserError
from caco.methods import sources
from caco.methods.infomin import InfoMin
from caco.nn.heads import JigsawHead
from caco.runs.identity import plain
from caco.schedules import RunShape

B, D, K, TAU, PATCHES = 6, 5, 18, 0.15, 9


def infomin(**settings):
    bank = FifoBank(size=K, dim=D, seed=0)
    method = InfoMin(
        encoder=tiny_encoder(), bank=bank, positives=sources.OtherView(), negatives=sources.BankRows(),
        jigsaw_hidden_dim=7,
        **{"temperature": TAU, "momentum": 0.9, "final_momentum": 0.9, **settings},
    )  # fmt: skip
    return method.double().train()


def batch_at(step: int):
    generator = torch.Generator().manual_seed(500 + step)
    images = torch.randn(B, 3, 6, 6, generator=generator, dtype=torch.float64)
    views = [images + 0.3 * torch.randn(images.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    patches = torch.stack([images[:, :, r : r + 4, c : c + 4] for r in range(3) for c in range(3)], 1)
    return batch_of(views, patches=patches + 0.1 * torch.randn(patches.shape, generator=generator, dtype=torch.float64))


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def embedded(net, images):
    """The embedding n(MLP(f(x))), where n normalises to length 1."""
    return unit(net.encoder.projector(net.encoder.backbone(images)))


def puzzled(net, patches):
    """The embedding of patches: each goes through the backbone and an MLP, and all nine together through a linear
    layer.
    """
    features = net.encoder.backbone(patches.reshape(-1, *patches.shape[2:]))
    first, second = net.jigsaw.each[0], net.jigsaw.each[2]
    each = (features @ first.weight.T + first.bias).clamp_min(0) @ second.weight.T + second.bias
    rows = torch.stack([torch.cat([each[i * PATCHES + p] for p in range(PATCHES)]) for i in range(len(patches))])
    return unit(rows @ net.jigsaw.together.weight.T + net.jigsaw.together.bias)


def loss_by_hand(q, q_jigsaw, k, queue):
    """The loss 0.5 CE(q) + 0.5 CE(q_jig) with the positive in the first column, one image at a time."""
    total = 0.0
    for query in (q, q_jigsaw):
        for i in range(len(q)):
            logits = torch.cat([(query[i] * k[i]).sum()[None], queue @ query[i]]) / TAU
            total = total + 0.5 * (torch.logsumexp(logits, 0) - logits[0]) / len(q)
    return total


def test_loss_and_gradients_are_those_of_the_publication():
    method, batch = infomin(), batch_at(0)
    net, queue = copy.deepcopy(method), unit(method.bank.rows.weight.detach())
    outputs = method(batch, now())
    outputs.loss.backward()
    q, q_jigsaw = embedded(net, batch.views[0]), puzzled(net, batch.patches)
    with torch.no_grad():
        k = unit(net.twin.encoder.projector(net.twin.encoder.backbone(batch.views[1])))
    by_hand = loss_by_hand(q, q_jigsaw, k, queue)
    by_hand.backward()
    assert torch.allclose(outputs.loss, by_hand, atol=1e-12, rtol=0)
    for (name, p), other in zip(method.named_parameters(), net.parameters(), strict=True):
        assert p.grad is None and other.grad is None or torch.allclose(p.grad, other.grad, atol=1e-12, rtol=0), name
    assert method.jigsaw.together.weight.grad.abs().max() > 1e-4
    logits = torch.cat([(q_jigsaw * k).sum(1, keepdim=True), q_jigsaw @ queue.T], 1) / TAU
    assert outputs.metrics["jigsaw_probability"].item() == pytest.approx(
        logits.softmax(1)[:, 0].mean().item(), abs=1e-12
    )


def test_the_weight_is_the_patches():
    losses = {}
    for w in (0.0, 0.3, 1.0):
        method = infomin(jigsaw_weight=w)
        losses[w] = method(batch_at(0), now()).loss
        losses[w].backward()
        assert (method.jigsaw.together.weight.grad.abs().max() > 0) == (w > 0)
        assert (method.encoder.projector[0].weight.grad.abs().max() > 0) == (w < 1)
    assert torch.allclose(losses[0.3], 0.7 * losses[0.0] + 0.3 * losses[1.0], atol=1e-12, rtol=0)
    assert (losses[0.0] - losses[1.0]).abs() > 1e-3


def test_the_order_of_the_patches_counts():
    method, batch = infomin(), batch_at(0)
    other = batch_of(batch.views, patches=batch.patches.flip(1))
    assert (method(batch, now()).loss - copy.deepcopy(method)(other, now()).loss).abs() > 1e-3


def test_fifty_steps_are_those_of_a_plain_loop():
    """SGD with weight decay on all parameters, and a rate that falls by a cosine to a thousandth, constant within an
    epoch. The twin and the queue change after the optimiser's step.
    """
    method = infomin()
    net, twin = copy.deepcopy(method), copy.deepcopy(method.encoder)
    peak, decay, momentum = 0.05, 1e-3, 0.9
    optimizer = sgd(method.parameter_groups(), batch=B, lr=peak, reference_batch=None, weight_decay=decay)
    schedule = OptimizerSchedule(warmup_epochs=0, final_fraction=0.001)
    ours = drive(method, optimizer, schedule, RunShape(10, 5, B, "epoch"), 50, batch_at=batch_at)

    queue, place, velocity, theirs = unit(net.bank.rows.weight.detach()), 0, {}, []
    learned = {name: p for name, p in net.named_parameters() if p.requires_grad and not name.startswith("bank.")}
    for step in range(50):
        batch = batch_at(step)
        with torch.no_grad():
            k = unit(twin.projector(twin.backbone(batch.views[1])))
        loss = loss_by_hand(embedded(net, batch.views[0]), puzzled(net, batch.patches), k, queue)
        gradients = torch.autograd.grad(loss, learned.values())
        lr = peak / 1000 + (peak - peak / 1000) * (1 + math.cos(math.pi * (step // 5) / 10)) / 2
        with torch.no_grad():
            for (name, p), g in zip(learned.items(), gradients, strict=True):
                velocity[name] = 0.9 * velocity.get(name, 0.0) + g + decay * p
                p -= lr * velocity[name]
            for mine, its in zip(twin.parameters(), net.encoder.parameters(), strict=True):
                mine.copy_(momentum * mine + (1 - momentum) * its)
            queue[place : place + B] = k
            place = (place + B) % K
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, abs=1e-9) and len({round(loss, 9) for loss in ours}) == 50
    assert torch.allclose(method.bank.rows.weight, queue, atol=1e-8)
    for name, p in learned.items():
        assert torch.allclose(dict(method.named_parameters())[name], p, atol=1e-8), name
    for mine, its in zip(method.twin.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, its, atol=1e-8)


def test_the_twin_waits_for_the_optimiser_s_step():
    method = infomin()
    before = [p.clone() for p in method.twin.parameters()]
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(0.1)
    method.before_step(now(), None)
    method(batch_at(0), now()).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, method.twin.parameters(), strict=True))
    method.after_step(now(twin_momentum=0.9))
    for old, new, its in zip(before, method.twin.parameters(), method.encoder.parameters(), strict=True):
        assert torch.allclose(new, 0.9 * old + 0.1 * its)


def test_its_warm_start_is_without_patches_and_moves_the_twin():
    method = infomin(warm_start_steps=2, warm_start_momentum=0.5)
    method(batch_of(batch_at(0).views), now("warm start")).loss.backward()
    assert method.jigsaw.together.weight.grad is None
    method.after_step(now("warm start", twin_momentum=0.5))
    assert torch.allclose(method.bank.rows.weight[:B].norm(dim=1), torch.ones(B, dtype=torch.float64))


def test_the_published_recipe():
    """The head and optimiser are those of MoCo v2; tau is 0.15, K is 65,536, and the rate falls to a thousandth by a
    cosine over the epochs.
    """
    cfg = composition.job_config(composition.compose(["method=infomin", "batch=256"]))
    tree = plain(cfg)
    assert {key: tree["method"][key] for key in ("temperature", "momentum", "final_momentum", "jigsaw_weight",
    "num_patches")} == {
        "temperature": 0.15, "momentum": 0.999, "final_momentum": 0.999, "jigsaw_weight": 0.5, "num_patches": 9,
    }  # fmt: skip
    assert tree["bank"]["size"] == 65_536 and tree["bank"]["_target_"].endswith("FifoBank")
    assert (tree["optimizer"]["lr"], tree["optimizer"]["weight_decay"], tree["optimizer"]["momentum"]) == (
        0.03,
        1e-4,
        0.9,
    )
    assert {key: tree["schedule"][key] for key in ("final_fraction", "unit", "warmup_epochs")} == {
        "final_fraction": 0.001, "unit": "epoch", "warmup_epochs": 0,
    }  # fmt: skip
    with torch.device("meta"):
        encoder = build_encoder(cfg)
        head = JigsawHead(in_dim=2048, hidden_dim=tree["method"]["jigsaw_hidden_dim"], dim=128)
    assert layers_of(encoder.projector) == layers_of(head.each) == "2048-2048b ReLU 2048-128b"
    assert tuple(head.together.weight.shape) == (128, 1152) and head.together.bias is not None
    assert layers_of(JigsawHead(in_dim=2048, dim=128, layers=1).each) == "2048-128b", "PIRL's head has one layer"
    views = instantiate(cfg.augmentation)
    both = views.kinds.kinds[0][0]
    assert (
        views.sizes == [224, 224]
        and both.scale == [0.2, 1.0]
        and both.jitter == [0.8, 0.8, 0.8, 0.2]
        and both.jitter_p == 0.8
    )
    assert list(both.then) == ["blur", "rand_augment", "gray"] and both.gray_p == both.blur_p == 0
    rand = both.then["rand_augment"]
    assert (rand.operations, rand.magnitude, rand.spread, rand.p, rand.enhancement) == (2, 10.0, 0.5, 0.5, "two_sided")
    assert (both.then["blur"].taps, both.then["blur"].p, both.then["gray"].p) == (23, 0.5, 0.2)


def refused(*overrides):
    cfg = composition.compose([*overrides, "tracking=ledger"])
    with pytest.raises(UserError) as error:
        validation.check(cfg, overrides=overrides, choices=dict(cfg.hydra.runtime.choices))
    return str(error.value)


def test_views_without_patches_are_refused_before_anything_is_built_with_those_that_have_some():
    told = refused("preset=demo", "method=infomin")
    assert (
        "augmentation: this method takes patches of each image, and no view of this augmentation is cut into patches"
        in told
    )
    assert "choose one of infomin, infomin_cifar, pirl, pirl_cifar." in told
    assert "as the digits, are too small for patches" in told and "cpcv2" not in told
    told = refused("method=mocov2", "augmentation=infomin", "data.root=/tmp")
    assert (
        "its view jigsaw is cut into patches, which this method does not take; leave it out"
        " ('~augmentation.views.jigsaw')" in told
    )
    told = refused("method=infomin", "augmentation.views.jigsaw.patches.shuffled=false", "data.root=/tmp")
    assert (
        "takes patches in a random order; expected augmentation.views.jigsaw.patches.shuffled=true, got false" in told
    )


def test_another_number_of_patches_and_images_too_small_for_them_are_refused(tmp_path):
    small = ["method=infomin", *OF_PATCHES["infomin"], "projector=small", "optimizer=sgd"]
    with pytest.raises(UserError, match="this method takes 4 patches of each image; got a grid of 3 x 3"):
        run_training(compose(*small, "method.num_patches=4"), tmp_path)
    digits = [*small, "data._target_=caco.data.sets.folders.digits", "data.size=16"]
    with pytest.raises(
        UserError, match="images of digits/train are too small for patches: the first has 16 x 16 pixels, a third"
    ):
        run_training(compose(*digits), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jigsaw_weight": 1.5}, r"jigsaw_weight: expected float from 0 up to 1, got 1\.5"),
        ({"num_patches": 1}, "2 patches or more"),
    ],
)
def test_values_out_of_their_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        infomin(**settings)
