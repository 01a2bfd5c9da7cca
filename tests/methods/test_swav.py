"""SwAV's balanced assignment over all ranks, its prediction across views and its queue are as published; the expected
values are computed independently here.
"""

import copy
import math

import pytest
import rank_worker
import torch
from driven import drive, tiny_encoder, views_of
from processes import ranks
from tiny import batch_of, now
from torch import nn
from torch.nn import functional as F

from caco import equations
from caco.config import composition
from caco.config.composition import instantiate
from caco.engine.optimizers import OptimizerSchedule, larc
from caco.methods import assignments, diagnostics
from caco.methods.swav import SwAV
from caco.schedules import RunShape

B, D, K = 6, 5, 4


def swav(**settings):
    return SwAV(encoder=tiny_encoder(), num_prototypes=K, **{"prototypes_frozen_steps": 0, **settings}).double()


def codes_by_loops(scores, epsilon, iterations=3):
    """The assignment by loops: scale the columns to 1/K and the rows to 1/B in turn; finally scale each row to 1."""
    q = [[math.exp(s / epsilon) for s in row] for row in scores.tolist()]
    images, prototypes = len(q), len(q[0])
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        columns = [sum(q[i][k] for i in range(images)) for k in range(prototypes)]
        q = [[q[i][k] / columns[k] / prototypes for k in range(prototypes)] for i in range(images)]
        q = [[x / sum(row) / images for x in row] for row in q]
    return torch.tensor([[x * images for x in row] for row in q], dtype=torch.float64)


def test_an_assignment_by_hand():
    """For exp(s / epsilon) = [[2, 1], [4, 1]], dividing the columns by (6, 2) and the rows by (5/6, 7/6) gives [[.4,
    .6], [4/7, 3/7]], whose rows sum to 1.
    """
    score = torch.tensor([[2.0, 1.0], [4.0, 1.0]], dtype=torch.float64).log() * 0.05
    by_hand = torch.tensor([[0.4, 0.6], [4 / 7, 3 / 7]], dtype=torch.float64)
    assert torch.allclose(equations.sinkhorn(score, 0.05, iterations=1), by_hand, atol=1e-12)
    assert torch.allclose(assignments.balanced(score, epsilon=0.05, iterations=1), by_hand, atol=1e-12)


def cosines(images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    unit = [F.normalize(torch.randn(n, D, generator=generator, dtype=torch.float64), dim=1) for n in (images, K)]
    return unit[0] @ unit[1].T


def test_the_assignment_is_the_equation_s_and_uses_every_prototype_alike():
    score = cosines(50)
    assert torch.allclose(equations.sinkhorn(score, 0.05), codes_by_loops(score, 0.05), atol=1e-12)
    assert torch.allclose(
        assignments.balanced(score, epsilon=0.05, iterations=3), codes_by_loops(score, 0.05), atol=1e-12
    )
    long = assignments.balanced(score, epsilon=0.05, iterations=200)
    assert torch.allclose(long.sum(0), torch.full((K,), 50 / K, dtype=torch.float64), atol=1e-3)
    assert torch.allclose(long.sum(1), torch.ones(50, dtype=torch.float64), atol=1e-12)


def test_a_small_epsilon_is_no_infinity_in_float32():
    """exp(1 / 0.01) overflows float32, but recipes for small images use this epsilon."""
    score = torch.cat([cosines(50), torch.ones(1, K, dtype=torch.float64)]).float()
    codes = assignments.balanced(score, epsilon=0.01, iterations=3)
    assert codes.dtype == torch.float32 and codes.isfinite().all()
    assert torch.allclose(codes.double(), codes_by_loops(score.double(), 0.01), atol=1e-5)


def test_two_ranks_assign_as_one(tmp_path):
    codes, outputs = ranks(2, rank_worker.write_balanced, str(tmp_path / "codes.pt"))
    assert codes == [0, 0], outputs[0][1][-3000:]
    assert torch.allclose(
        torch.load(tmp_path / "codes.pt"), codes_by_loops(rank_worker.scores_of_all_ranks(), 0.05), atol=1e-12
    )


def scores_by_hand(method, views):
    """Scores of two large views and a small one. The backbone takes the views of one size together, the head takes all;
    embeddings are normalised and multiplied by the prototypes.
    """
    large, small = torch.cat(views[:2]), views[2]
    features = torch.cat([method.encoder.backbone(large), method.encoder.backbone(small)])
    z = method.encoder.projector(features)
    z = z / z.norm(dim=1, keepdim=True)
    return z.split(len(views[0])), (z @ method.prototypes.weight.T).split(len(views[0]))


def loss_by_hand(scores, codes, temperature=0.1):
    """The loss, one number at a time: -sum_k q log p, averaged over images, over the other views v != c and over the
    two assigned views c.
    """
    total = 0.0
    for c in range(2):
        for v in range(len(scores)):
            if v == c:
                continue
            for i in range(len(scores[v])):
                log_p = scores[v][i] / temperature - torch.logsumexp(scores[v][i] / temperature, 0)
                total = total - (codes[c][i] * log_p).sum() / len(scores[v]) / (len(scores) - 1) / 2
    return total


def test_loss_and_gradients_are_those_of_the_publication():
    method, views = swav(), views_of(0, B)
    other = copy.deepcopy(method)
    outputs = method(batch_of(views), now())
    outputs.loss.backward()
    _, scores = scores_by_hand(other, views)
    codes = [codes_by_loops(s.detach(), 0.05) for s in scores[:2]]
    by_hand = loss_by_hand(scores, codes)
    by_hand.backward()
    assert torch.allclose(outputs.loss, by_hand, atol=1e-12)
    assert torch.allclose(outputs.loss, equations.cross_view_loss(codes, list(scores), 0.1), atol=1e-12)
    for (name, p), q in zip(method.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-12), name
    assert method.prototypes.weight.grad.abs().max() > 1e-4
    entropy = -sum((q * q.log()).sum() for q in codes) / (2 * B)
    assert outputs.metrics["target_entropy"].item() == pytest.approx(entropy.item(), abs=1e-12)


def test_lightly_computes_the_same_loss_with_and_without_a_queue():
    """lightly appends the queue after the batch and does not divide by K; neither makes a difference."""
    theirs = pytest.importorskip("lightly.loss").SwaVLoss()
    for settings in ({}, {"queue_size": 2 * B, "queue_start_epoch": 0}):
        method, views = swav(**settings), views_of(0, B)
        if settings:
            with torch.no_grad():
                method.queue.copy_(
                    F.normalize(torch.randn(2, 2 * B, D, generator=torch.Generator().manual_seed(2)), dim=2)
                )
        ours = method(batch_of(views), now()).loss
        _, scores = scores_by_hand(method, views)
        queued = [method.queue[c] @ method.prototypes.weight.T for c in range(2)] if settings else None
        assert ours.item() == pytest.approx(theirs(list(scores[:2]), list(scores[2:]), queued).item(), abs=1e-6)


def test_the_queue_by_hand():
    """A queue of ten rows holds two batches of four. It is filled from its first epoch on, with the newest in front,
    and used when it is full, with the current prototypes.
    """
    method = swav(queue_size=10, queue_start_epoch=1)
    embeddings = []
    for step, epoch in enumerate((0, 1, 1, 1)):
        at, views = now(step=step), views_of(step, 4)
        at = type(at)(step, "training", step, False, epoch, step, at.values)
        with torch.no_grad():
            method.prototypes.weight.add_(0.01 * step)
        method.before_step(at, None)
        assert torch.allclose(method.prototypes.weight.norm(dim=1), torch.ones(K, dtype=torch.float64))
        other, before = copy.deepcopy(method), method.queue.clone()
        loss = method(batch_of(views), at).loss
        assert torch.equal(method.queue, before), "the queue must not change before the loss is known to be finite"
        method.after_step(at)
        z, scores = scores_by_hand(other, views)
        codes = []
        for c in range(2):
            rows = scores[c].detach()
            if step == 3:  # the first step with a full queue, filled by steps 2 and 1
                old = torch.cat([embeddings[2][c], embeddings[1][c]])
                rows = torch.cat([old @ other.prototypes.weight.T, rows]).detach()
            codes.append(codes_by_loops(rows, 0.05)[-4:])
        assert torch.allclose(loss, loss_by_hand(scores, codes), atol=1e-12), step
        embeddings.append([part.detach() for part in z[:2]])
        newest = [] if epoch == 0 else embeddings[:0:-1][:2]
        for c in range(2):
            rows = torch.cat([*(each[c] for each in newest), torch.zeros(10, D, dtype=torch.float64)])[:10]
            assert torch.allclose(method.queue[c], rows, atol=1e-12), step
    without = codes_by_loops(scores[0].detach(), 0.05)
    assert (codes[0] - without).abs().max() > 1e-2, "the queue must change the codes, or the test would not notice it"


def test_fifty_steps_are_those_of_a_plain_loop():
    """Five steps per epoch, a queue of two batches from epoch 2 on, prototypes frozen for 7 steps, and LARC with a
    warm-up of one epoch.
    """
    method = swav(prototypes_frozen_steps=7, queue_size=2 * B, queue_start_epoch=2)
    net = copy.deepcopy(method)  # only its networks are used; the loop below keeps its own state
    peak, final, decay, frozen = 0.6, 0.0006, 1e-2, {}

    def remember(step):
        frozen[step] = method.prototypes.weight.detach().clone()

    optimizer = larc(
        method.parameter_groups(), batch=B, lr=peak, reference_batch=None, weight_decay=decay, trust_coefficient=0.02
    )
    schedule = OptimizerSchedule(warmup_epochs=1, warmup_start=0.5, final_fraction=None, final_lr=final)
    ours = drive(method, optimizer, schedule, RunShape(10, 5, B), 50, remember)
    for before, after in ((0, 6), (6, 7)):
        moved = not torch.allclose(frozen[before], frozen[after], atol=1e-12)
        assert moved == (after == 7), "the seven first steps leave the prototypes where they were"

    parameters, velocity = dict(net.named_parameters()), {}
    queue, queued = torch.zeros(2, 2 * B, D, dtype=torch.float64), 0
    rates = [0.3 + (peak - 0.3) * t / 4 for t in range(5)]
    rates += [final + (peak - final) * (1 + math.cos(math.pi * t / 45)) / 2 for t in range(45)]
    theirs = []
    for step in range(50):
        with torch.no_grad():
            net.prototypes.weight.copy_(net.prototypes.weight / net.prototypes.weight.norm(dim=1, keepdim=True))
        z, scores = scores_by_hand(net, views_of(step, B))
        codes = []
        for c in range(2):
            rows = scores[c].detach()
            if queued >= 2:
                rows = torch.cat([queue[c] @ net.prototypes.weight.T, rows]).detach()
            codes.append(codes_by_loops(rows, 0.05)[-B:])
            if step >= 10:
                queue[c] = torch.cat([z[c].detach(), queue[c, :-B]])
        queued += step >= 10
        loss = loss_by_hand(scores, codes)
        theirs.append(loss.item())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        with torch.no_grad():
            for name, p in parameters.items():
                if name.startswith("prototypes") and step < 7:
                    continue
                g = gradients[name]
                if p.norm() > 0 and g.norm() > 0:
                    g = 0.02 * p.norm() / (g.norm() + decay * p.norm() + 1e-8) * (g + decay * p)
                velocity[name] = 0.9 * velocity[name] + g if name in velocity else g
                p -= rates[step] * velocity[name]
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert abs(ours[-1] - ours[0]) > 1e-3
    for (name, p), q in zip(method.named_parameters(), net.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-9), name


def test_the_prototypes_use_is_counted_and_a_collapse_is_said():
    method = swav()
    method(batch_of(views_of(0, B)), now())
    counts = method.uses.clone()
    assert counts.sum() == 2 * B, "one nearest prototype is counted for each image and assigned view"
    share = (counts / counts.sum())[counts > 0]
    statistics = method.statistics()
    assert statistics["prototypes/use_perplexity"] == pytest.approx(
        (-(share * share.log()).sum()).exp().item(), rel=1e-5
    )
    assert statistics["prototypes/used"] == 100 * len(share) / K
    assert method.statistics() == {}, "the counts start again in each epoch"
    even = assignments.use_statistics(torch.full((K,), 7))
    assert even == pytest.approx(
        {"prototypes/used": 100, "prototypes/use_perplexity": K, "prototypes/use_entropy": 100}
    )
    one = assignments.use_statistics(torch.tensor([12, 0, 0, 0]))
    assert one == pytest.approx({"prototypes/used": 25, "prototypes/use_perplexity": 1, "prototypes/use_entropy": 0})
    assert method.warning(even) is None
    assert "The embedding has collapsed: almost all images have the same nearest prototype" in method.warning(one)
    collapsed = swav()
    with torch.no_grad():
        collapsed.encoder.projector[-1].weight.zero_()
    outputs = collapsed(batch_of(views_of(0, B)), now())
    assert diagnostics.spread(outputs.embedding) == pytest.approx(0, abs=1e-9)
    assert outputs.metrics["target_entropy"] == pytest.approx(math.log(K)), (
        "equal embeddings get even codes, which are easy to predict"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature: expected float above 0, got 0\.0"),
        ({"epsilon": 0.001}, r"method\.epsilon: expected at least 0\.004, got 0\.001"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations: expected int from 1, got 0"),
        ({"queue_size": -1}, "queue_size: expected int from 0, got -1"),
        ({"num_prototypes": 1}, "num_prototypes: expected int from 2, got 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SwAV(**{"encoder": tiny_encoder(), "num_prototypes": K, "prototypes_frozen_steps": 0, **settings})


def test_a_queue_that_holds_no_batch_and_a_single_view_are_refused():
    with pytest.raises(ValueError, match="queue_size: expected 0 for no queue, or at least the batch, 64"):
        swav(queue_size=63).phases(RunShape(1, 1, 64))
    with pytest.raises(ValueError, match="expected at least 2 views of an image, got 1"):
        swav()(batch_of(views_of(0, B)[:1]), now())


def test_its_configuration_is_the_published_one():
    cfg = composition.job_config(composition.compose(["method=swav", "batch=4096"]))
    method = instantiate(cfg.method, encoder=tiny_encoder())
    groups = method.parameter_groups()
    optimizer = instantiate(cfg.optimizer, groups=groups)
    assert type(optimizer).__name__ == "LARC" and [group["frozen_steps"] for group in optimizer.param_groups] == [
        0,
        313,
    ]
    assert all(group["weight_decay"] == 1e-6 and group["lr"] == pytest.approx(4.8) for group in optimizer.param_groups)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(method.parameters())), (
        "the optimiser must also have biases and BatchNorm"
    )
    assert method.prototypes.weight.shape == (3000, D) and method.queue.shape[1] == 0
    assert [type(layer) for layer in instantiate(cfg.projector, in_dim=4)] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Linear,
    ]
    assert instantiate(cfg.augmentation).sizes == [224] * 2 + [96] * 6
    schedule = {name: value for name, value in cfg.schedule.items() if name != "unit"}
    rates = [4.8 * factor for factor in OptimizerSchedule(**schedule).learning_rate(RunShape(800, 3, 4096))]
    assert (rates[0], rates[29], rates[30]) == pytest.approx((0.3, 4.8, 4.8)) and rates[-1] == pytest.approx(
        0.0048, abs=1e-5
    )
