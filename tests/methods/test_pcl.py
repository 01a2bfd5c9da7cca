"""PCL's prototypes, their temperatures and the loss are as published; an interrupted clustering resumes to the same
bits.
"""

import math
from collections import Counter

import fifty
import numpy as np
import pytest
import torch
from fifty import B, D
from interrupted import Cut
from recorded import assert_same, final, record
from tiny import EVERY, FEW_PROTOTYPES, batch_of, now, train
from torch.nn import functional as F

from caco.banks.fifo import FifoBank
from caco.config import composition
from caco.config.composition import instantiate
from caco.data.loaders.batches import Batch
from caco.engine.assembly import build_encoder, method_on
from caco.engine.optimizers import sgd as sgd_of
from caco.methods import clusters
from caco.methods.pcl import PCL
from caco.runs.identity import plain

N, K, TAU = 30, (4, 6), 0.3
LAYERS = {"layers": 2, "batch_norm": False, "bias": True}


class Images:
    """Thirty images that a pass over all images yields in parts of 12."""

    views = torch.randn(N, 3, 2, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def __call__(self, kind, *, stream=0):
        assert kind == "plain"
        for index in torch.arange(N).split(12):
            yield Batch([self.views[index]], index, torch.full_like(index, -1))


def pcl(**settings) -> PCL:
    given = {"num_clusters": K, "num_negatives": 2, "first_clustering_epoch": 0, "temperature": TAU}
    given |= {"momentum": 0.9, "final_momentum": 0.9}
    bank = FifoBank(size=24, dim=D, seed=3)
    return PCL(encoder=fifty.encoder(**LAYERS), bank=bank, num_images=N, **{**given, **settings}).double()


def widths_by_hand(x, centroids, cluster, temperature):
    """The temperatures, one cluster at a time."""
    phi = []
    for k in range(len(centroids)):
        members = [x[i] for i in range(len(x)) if cluster[i] == k]
        distances = [math.dist(member, centroids[k]) for member in members]
        phi.append(sum(distances) / len(members) / math.log(len(members) + 10) if len(members) > 1 else None)
    largest = max(value for value in phi if value is not None)
    phi = sorted_phi = [largest if value is None else value for value in phi]
    sorted_phi = sorted(phi)

    def percentile(q):
        at = q / 100 * (len(phi) - 1)
        low = math.floor(at)
        return sorted_phi[low] + (at - low) * (sorted_phi[min(low + 1, len(phi) - 1)] - sorted_phi[low])

    phi = [min(max(value, percentile(10)), percentile(90)) for value in phi]
    return [temperature * value / (sum(phi) / len(phi)) for value in phi]


def test_the_widths_by_hand():
    """Twelve clusters, one of them with a single member and one empty. Distances are not squared, and centroids are
    means that are not normalised.
    """
    generator = np.random.default_rng(0)
    centroids, cluster = generator.normal(size=(12, D)), generator.integers(0, 10, 200)
    cluster[0] = 10
    x = centroids[cluster] + generator.normal(size=(200, D)) * (0.1 + cluster[:, None] / 10)
    ours = clusters.widths(x, centroids, cluster, 0.2)
    assert ours == pytest.approx(widths_by_hand(x, centroids, cluster, 0.2), abs=1e-12)
    assert ours.mean() == pytest.approx(0.2) and ours[10] == ours[11] == ours.max()
    with pytest.raises(ValueError, match="every image has the same embedding"):
        clusters.widths(np.ones((20, D)), np.ones((2, D)), np.zeros(20, dtype=np.int64), 0.2)


@pytest.mark.parametrize("library", ["sklearn", "faiss"])
def test_k_means_finds_groups_far_apart_and_gives_each_vector_its_nearest_mean(library):
    if library == "faiss":
        pytest.importorskip("faiss")
    generator = np.random.default_rng(1)
    group = np.arange(300) % 5
    x = (10 * generator.normal(size=(5, D))[group] + generator.normal(size=(300, D))).astype(np.float32)
    how = {"iterations": 20, "restarts": 5, "seed": 1, "library": library}
    means, nearest = clusters.k_means(x, 5, **how)
    assert len(set(zip(group, nearest, strict=True))) == 5, "each group is a cluster"
    assert np.allclose(means[nearest[0]], x[nearest == nearest[0]].mean(0), atol=1e-4)
    again = clusters.k_means(x, 5, **how)
    assert np.array_equal(means, again[0]) and np.array_equal(nearest, again[1])
    many, nearest = clusters.k_means(x, 40, **how)
    assert np.array_equal(nearest, ((x[:, None] - many) ** 2).sum(2).argmin(1))


def proto_nce_by_hand(q, clustering, images, drawn, num_columns):
    """The loss, one number at a time. Each column has its own temperature, and two images of the same cluster are
    negatives of each other.
    """
    own = [int(clustering.cluster[image]) for image in images]
    columns = own + drawn
    assert len(columns) == num_columns
    total = 0.0
    for i in range(len(images)):
        logits = torch.stack([q[i] @ clustering.centroids[j] / clustering.width[j] for j in columns])
        total = total + torch.logsumexp(logits, 0) - logits[i]
    return total / len(images)


def test_the_loss_and_its_gradient_are_those_of_the_publication():
    method, views = pcl(), fifty.views_of(0)
    method.before_epoch(now(), Images())
    assert all(clustering.width.mean() == pytest.approx(TAU) for clustering in method.clusterings)
    images = list(range(4, 4 + B))
    outputs = method(batch_of(views, first=4), now(step=3))
    outputs.loss.backward()
    ours = {name: p.grad.clone() for name, p in method.encoder.named_parameters()}
    method.zero_grad()

    q = method.encoder(views[0])
    with torch.no_grad():
        k = method.twin(views[1])
    queue = method.bank.rows.weight
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ F.normalize(queue, dim=1).T], 1) / TAU
    loss = F.cross_entropy(logits, torch.zeros(B, dtype=torch.int64))
    for number, clustering in enumerate(method.clusterings):
        own = clustering.cluster[images].long()
        drawn = drawn_by_the_method(method, number, own)
        assert not set(drawn) & set(own.tolist()) and len(set(drawn)) == len(drawn), (
            "drawn without replacement from prototypes of no image in the batch"
        )
        free = K[number] - len(set(own.tolist()))
        loss = loss + proto_nce_by_hand(q, clustering, images, drawn, B + min(2, free)) / 2
        assert max(Counter(own.tolist()).values()) > 1, "two of the batch are in one cluster"
    loss.backward()
    assert torch.allclose(outputs.loss, loss, atol=1e-12)
    for name, p in method.encoder.named_parameters():
        assert torch.allclose(ours[name], p.grad, atol=1e-12), name


def drawn_by_the_method(method, number, own, step=3):
    from caco.data.loaders.batches import mixed_seed

    others, taken = method._drawn(own, K[number], mixed_seed(method.seed, step, number))
    return others[~taken].tolist()


def test_other_steps_draw_other_prototypes_all_as_often():
    method, own = pcl(num_negatives=3), torch.tensor([2, 2, 5])
    method.clusterings = None
    drawn = [method._drawn(own, 8, step) for step in range(3000)]
    assert not any(taken.any() for _, taken in drawn)
    counts = Counter(j for others, _ in drawn for j in others.tolist())
    assert set(counts) == {0, 1, 3, 4, 6, 7}
    assert all(abs(count - 1500) < 6 * math.sqrt(1500 / 2) for count in counts.values()), (
        "each of the six free prototypes is drawn in half of the steps"
    )


def test_before_its_epoch_it_is_mocov2():
    method, views = pcl(first_clustering_epoch=2), fifty.views_of(0)
    at = now()
    method.before_epoch(at, None)
    assert not method.made
    alone = method(batch_of(views), at)
    assert "prototype_loss" not in alone.metrics
    method.before_epoch(type(at)(40, "training", 40, False, 2, 0, at.values), Images())
    assert method.made == 1 and method(batch_of(views), at).loss > alone.loss


def test_the_embeddings_are_the_twin_s_in_evaluation_mode_and_nothing_moves():
    method = pcl()
    before = {name: value.clone() for name, value in method.twin.state_dict().items()}
    x = method._embeddings(Images())
    method.twin.eval()
    assert torch.allclose(x, method.twin(Images.views), atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in method.twin.state_dict().items())
    method.before_epoch(now(), Images())
    largest = method.clusterings[1]
    from sklearn.cluster import KMeans

    theirs = KMeans(K[1], init="random", n_init=5, max_iter=20, tol=0, random_state=1, algorithm="lloyd").fit(x.numpy())
    assert torch.equal(largest.cluster, torch.from_numpy(theirs.labels_))
    means = torch.from_numpy(theirs.cluster_centers_)
    assert torch.allclose(largest.centroids, means / means.norm(dim=1, keepdim=True), atol=1e-12), (
        "means are normalised only at the end"
    )
    assert largest.width.tolist() == pytest.approx(widths_by_hand(x.tolist(), means.tolist(), theirs.labels_, TAU))


def test_fifty_steps_are_those_of_a_plain_loop():
    """Ten epochs of five steps with a queue of 24 rows; the last eight epochs begin with a clustering, and the twin
    moves before the keys are computed.
    """
    method, peak = pcl(first_clustering_epoch=2), 0.05
    w, twin, velocity = fifty.weights_of(method.encoder), fifty.twin_of(method.twin), {}
    w = {f"encoder.{name}": value for name, value in w.items()}
    queue, at = F.normalize(method.bank.rows.weight.detach(), dim=1), 0
    first = lambda step: 3 * step % (N - B)  # noqa: E731
    reference = pcl()  # makes clusterings and running statistics from the loop's weights
    optimizer = sgd_of(method.parameter_groups(), batch=B, lr=peak, reference_batch=None, weight_decay=1e-4)
    losses = fifty.train(
        method, optimizer, first=first, images=Images(), unit="epoch", warmup_epochs=0, final_fraction=0.0
    )

    def embed(weights, view):
        x = (
            fifty.backbone(weights, view) @ weights["encoder.projector.0.weight"].T
            + weights["encoder.projector.0.bias"]
        )
        x = x.clamp_min(0) @ weights["encoder.projector.2.weight"].T + weights["encoder.projector.2.bias"]
        return x / x.norm(dim=1, keepdim=True)

    def of_encoder(weights):
        return {name.removeprefix("encoder."): value for name, value in weights.items()}

    norm = reference.twin.encoder.backbone[2]  # keeps the running statistics that evaluation mode uses
    by_hand, made = [], False
    for step in range(fifty.STEPS):
        views, images = fifty.views_of(step), list(range(first(step), first(step) + B))
        if step % 5 == 0 and step >= 10:
            reference.twin.encoder.load_state_dict(of_encoder(twin), strict=False)
            reference.before_epoch(now(), Images())
            made = True
        fifty.follow(twin, w, 0.9)
        q = embed(w, views[0])
        with torch.no_grad():
            k = embed(twin, views[1])
            reference.twin.encoder.load_state_dict(of_encoder(twin), strict=False)
            norm.train()
            norm(views[1].flatten(1) @ twin["encoder.backbone.1.weight"].T + twin["encoder.backbone.1.bias"])
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / TAU
        loss = F.cross_entropy(logits, torch.zeros(B, dtype=torch.int64))
        for number, clustering in enumerate(reference.clusterings if made else []):
            drawn = drawn_by_the_method(reference, number, clustering.cluster[images].long(), step)
            loss = loss + proto_nce_by_hand(q, clustering, images, drawn, B + len(drawn)) / 2
        by_hand.append(loss)
        rate = peak * (1 + math.cos(math.pi * (step // 5) / 10)) / 2
        fifty.sgd(w, fifty.gradients_of(loss, w), velocity, {"": rate}, 1e-4)
        queue[at : at + B], at = k, (at + B) % 24
    assert torch.allclose(torch.tensor(losses, dtype=torch.float64), torch.stack(by_hand).detach(), atol=1e-9)
    for name, value in fifty.weights_of(method.encoder).items():
        assert torch.allclose(value, w[f"encoder.{name}"], atol=1e-8), name
    assert method.made == 8


TINY_PCL = ["method=pcl", "augmentation=digits", "projector=small", "projector.hidden_dim=16", "projector.dim=8",
"optimizer=sgd",
            *FEW_PROTOTYPES["pcl"], "data.limit=256", "epochs=3", "max_steps=10", "eval=[]"]  # fmt: skip


def test_a_run_cut_in_the_middle_of_a_clustering_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """Four steps per epoch. The run is interrupted before the second of the third epoch's three clusterings, and in the
    middle of the second epoch."""
    train(tmp_path / "whole", *TINY_PCL, *EVERY)
    original, calls = clusters.k_means, []

    def cut(*arguments, **options):
        calls.append(1)
        if len(calls) == 8:
            raise Cut
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(clusters, "k_means", cut)
        with pytest.raises(Cut):
            train(tmp_path / "cut", *TINY_PCL, *EVERY)
    saved = final(tmp_path / "cut")
    assert saved["step"] == 8 and saved["method"]["made"] == 2
    sorted((tmp_path / "cut" / "checkpoints").glob("*.pt"))[
        -1
    ].unlink()  # so that the run resumes from step 6, with the clusters made at step 4
    train(tmp_path / "cut", *TINY_PCL, *EVERY)
    whole = final(tmp_path / "whole")
    assert_same(whole, final(tmp_path / "cut"))
    assert record(tmp_path / "whole") == record(tmp_path / "cut")
    assert whole["method"]["made"] == 3 and whole["method"]["clusterings.2.cluster"].max() > 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clusters": [4, 30]}, r"from 2 to below the 30 images, got \[4, 30\].*method.num_clusters=\[2,2,2\]"),
        ({"num_clusters": []}, r"num_clusters: expected list of int from 2, 1 or more of them, got \[\]"),
        ({"num_negatives": -1}, "num_negatives: expected int from 0, got -1"),
        ({"restarts": 0}, "restarts: expected int from 1, got 0"),
        ({"library": "annoy"}, r"library: expected sklearn \| faiss, got 'annoy'"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        pcl(**settings)


def test_faiss_where_it_is_missing_is_refused_with_how_to_have_it(monkeypatch):
    monkeypatch.setattr(clusters, "is_installed", lambda module: False)
    with pytest.raises(ValueError, match="faiss is not installed; to install it: pip install faiss-cpu; or choose"):
        pcl(library="faiss")


def test_its_configuration_is_the_published_one():
    cfg = composition.job_config(composition.compose(["method=pcl", "batch=256"]))
    tree = plain(cfg)
    expected = {
        "temperature": 0.2, "momentum": 0.999, "final_momentum": 0.999, "num_clusters": [25_000, 50_000, 100_000],
        "num_negatives": 16_384, "first_clustering_epoch": 20, "iterations": 20, "restarts": 5,
    }  # fmt: skip
    assert {key: tree["method"][key] for key in expected} == expected
    assert (
        tree["bank"]["size"] == 16_384
        and tree["bank"]["_target_"].endswith("FifoBank")
        and tree["schedule"]["unit"] == "epoch"
    )
    cfg.bank.size = 64
    method = method_on(build_encoder(cfg), cfg, 1_281_167)[0]
    assert [tuple(clustering.centroids.shape) for clustering in method.clusterings] == [
        (25_000, 128),
        (50_000, 128),
        (100_000, 128),
    ]
    optimizer = instantiate(cfg.optimizer, groups=method.parameter_groups())
    assert all(
        (group["lr"], group["weight_decay"], group["momentum"]) == (0.03, 1e-4, 0.9) for group in optimizer.param_groups
    )
