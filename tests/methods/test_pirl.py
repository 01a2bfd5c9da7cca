"""PIRL's loss, heads and bank are as published; the expected values are computed independently here."""

import fifty
import pytest
import torch
from fifty import B, D, sgd
from test_instdisc import TAU, M, N, drawn_by_hand, nce_by_hand, normaliser_by_hand, softmax_by_hand
from tiny import batch_of, now

from caco.banks.by_image import ImageBank
from caco.data.loaders.batches import mixed_seed
from caco.engine.optimizers import sgd as sgd_of
from caco.methods.pirl import PIRL

LAYERS = {"layers": 1, "batch_norm": False, "bias": True}
P = 9


def pirl(**settings) -> PIRL:
    given = {"temperature": TAU, "num_noise": M, "seed": 5, "num_patches": P, **settings}
    encoder = fifty.encoder(**LAYERS)
    encoder.backbone.num_features = fifty.FEATURES
    return PIRL(encoder=encoder, bank=ImageBank(size=N, dim=D, seed=3, norms="unit"), num_images=N, **given).double()


def patches_of(step):
    return torch.randn(B, P, 3, 2, 2, generator=torch.Generator().manual_seed(300 + step), dtype=torch.float64)


def embeddings_by_hand(w, view, patches):
    """Embeddings of images and of their nine patches. Each patch goes through a linear layer, and all nine, in their
    order, through another one; there is no ReLU."""
    v = fifty.backbone(w, view) @ w["encoder.projector.0.weight"].T + w["encoder.projector.0.bias"]
    features = fifty.backbone(w, patches.flatten(0, 1))
    each = features @ w["jigsaw.each.0.weight"].T + w["jigsaw.each.0.bias"]
    together = torch.stack([torch.cat(list(each[P * image : P * image + P])) for image in range(len(view))])
    g = together @ w["jigsaw.together.weight"].T + w["jigsaw.together.bias"]
    return v / v.norm(dim=1, keepdim=True), g / g.norm(dim=1, keepdim=True)


def draws_of(step, which, images):
    return [drawn_by_hand(mixed_seed(5, step, which), image, M, N) for image in images]


@pytest.mark.parametrize(
    "settings", [{}, {"loss": "softmax"}, {"patches_weight": 0.2}, {"loss": "softmax", "num_noise": None}]
)
def test_fifty_steps_are_those_of_a_plain_loop(settings):
    """Each of the two losses has its own draws; both use the Z of the first step's patches. Rows are written with the
    image's embedding alone, and biases and BatchNorm have no weight decay."""
    method, peak = pirl(**settings), 0.05
    w, velocity, Z = fifty.weights_of(method), {}, None
    V = method.bank.rows.weight.detach().clone()
    assert torch.allclose(V.norm(dim=1), torch.ones(N, dtype=torch.float64), atol=1e-6)
    first = lambda step: 3 * step % (N - B)  # noqa: E731
    optimizer = sgd_of(method.parameter_groups(), batch=B, lr=peak, reference_batch=None, weight_decay=1e-3)
    losses = fifty.train(
        method, optimizer, count=1, first=first, patches=patches_of, unit="epoch", warmup_epochs=0, final_fraction=0.001
    )
    share, by_hand = settings.get("patches_weight", 0.5), []
    for step in range(fifty.STEPS):
        (view,), images = fifty.views_of(step, 1), list(range(first(step), first(step) + B))
        v, g = embeddings_by_hand(w, view, patches_of(step))
        of_patches, of_images = draws_of(step, 0, images), draws_of(step, 1, images)
        if settings.get("loss") == "softmax":
            some = "num_noise" not in settings
            parts = [
                softmax_by_hand(x, V, images, draws if some else None, TAU)
                for x, draws in ((v, of_images), (g, of_patches))
            ]
        else:
            Z = normaliser_by_hand(g.detach(), V, images, of_patches, TAU) if Z is None else Z
            parts = [
                nce_by_hand(x, V, images, draws, TAU, Z, epsilon=1.2e-7)
                for x, draws in ((v, of_images), (g, of_patches))
            ]
        loss = (1 - share) * parts[0] + share * parts[1]
        by_hand.append(loss)
        rate = (
            0.001 * peak
            + 0.999 * peak * (1 + torch.cos(torch.tensor(torch.pi * (step // 5) / 10, dtype=torch.float64)).item()) / 2
        )
        gradients = fifty.gradients_of(loss, w)
        for name, value in w.items():  # one at a time, because their weight decay differs
            own = {name: velocity[name]} if name in velocity else {}
            sgd({name: value}, {name: gradients[name]}, own, {"": rate}, 1e-3 if value.ndim > 1 else 0.0)
            velocity |= own
        moved = 0.5 * V[images] + 0.5 * v.detach()
        V[images] = moved / moved.norm(dim=1, keepdim=True)
    fifty.assert_same_training(losses, method, by_hand, w)
    assert torch.allclose(method.bank.rows.weight, V, atol=1e-9)
    assert Z is None or method.bank.normaliser.item() == pytest.approx(Z, abs=1e-9)


def test_the_order_of_an_image_s_patches_is_part_of_what_is_embedded():
    method, (view,) = pirl(loss="softmax").eval(), fifty.views_of(0, 1)
    one = method(batch_of([view], patches=patches_of(0)), now()).loss
    other = method(batch_of([view], patches=patches_of(0).flip(1)), now()).loss
    assert not torch.allclose(one, other)


def test_batches_without_patches_and_weights_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="needs patches of each image, but its batches have none"):
        pirl()(batch_of(fifty.views_of(0, 1)), now())
    with pytest.raises(ValueError, match="patches_weight: expected float from 0 up to 1, got 1.5"):
        pirl(patches_weight=1.5)


def test_it_says_what_it_needs_and_costs():
    method = pirl()
    assert (method.needs.indices, method.needs.patches, method.needs.num_patches) == (True, "shuffled", P)
    costs = method.costs([2])
    assert (costs.terms, costs.drawn_terms, costs.drawn_rows, costs.bank_terms) == (2, 2, M, 0)
    assert costs.patch_network(patches_of(0)).shape == (B, D)
