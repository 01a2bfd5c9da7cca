"""Domain generalisation: train on three domains, choose settings with their crossval lists, and test on all images of
the fourth.
"""

import numpy as np
import pytest
import torch
from colours import Colours
from sklearn.linear_model import LogisticRegression
from torch import nn
from toy_pacs import write_pacs

from caco import metrics
from caco.config.composition import compose, instantiate
from caco.data.sets.domains import DOMAINS, others_than, pacs
from caco.data.sets.sources import Splits, labels_of
from caco.errors import UserError
from caco.evals.domain import Domain
from caco.evals.features import FeatureStore
from caco.evals.finetune import FineTune

QUICK = {"size": 16, "num_strengths": 5}


class Means(nn.Module):
    """A backbone whose features are the channel means in the four quarters, twelve noisy numbers."""

    num_features = 12

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def built(store, root, **settings):
    evaluator = Domain(root=str(root), **{**QUICK, **settings})
    evaluator.build(store, seed=0)
    return evaluator


def test_frozen_features_are_classified_as_scikit_learn_does_by_the_strength_that_the_crossval_lists_choose(
    store_of, tmp_path
):
    write_pacs(tmp_path, train=4, crossval=2, noise=230)
    evaluator = built(store_of(), tmp_path, ways=["frozen"])
    results = dict(evaluator.run(Means()))
    protocol = "pacs_size-16_num_strengths-5"
    assert list(results) == [f"{protocol}/{d}_{what}" for d in DOMAINS for what in ("top1", "strength")] + [
        f"{protocol}/mean_top1"
    ]

    every = evaluator._pacs.every
    x = torch.stack([evaluator._views.plain(every.image(i)) for i in range(len(every))])
    x, y = Means()(x).double().numpy(), labels_of(every)
    for target in DOMAINS:
        train, crossval = (evaluator._pacs.at(others_than(target), which) for which in ("train", "crossval"))
        test = evaluator._pacs.at([target])
        assert len(test) == 42 and not set(test) & {*train, *crossval}
        best, chosen = -1.0, None
        for strength in np.logspace(5, -6, 5):
            fitted = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=5000).fit(x[train], y[train])
            if (value := fitted.score(x[crossval], y[crossval])) > best:
                best, chosen = value, (strength, fitted)
        assert results[f"{protocol}/{target}_strength"] == pytest.approx(chosen[0])
        assert results[f"{protocol}/{target}_top1"] == pytest.approx(
            100 * chosen[1].score(x[test], y[test]), abs=100 / 42 + 1e-9
        )
    mean = np.mean([results[f"{protocol}/{target}_top1"] for target in DOMAINS])
    assert results[f"{protocol}/mean_top1"] == pytest.approx(mean) and 20 < mean < 100


def test_a_copy_of_the_network_is_fine_tuned_for_each_target_and_the_best_rate_taken(store_of, tmp_path):
    write_pacs(tmp_path)
    torch.manual_seed(0)
    colours = Colours()
    colours.num_features = 4
    before = {name: value.clone() for name, value in colours.state_dict().items()}
    settings = {
        "ways": ["finetune"],
        "targets": ["photo", "sketch"],
        "epochs": 6,
        "batch": 21,
        "milestones": [5],
        "weight_decay": 0.0,
    }
    evaluator = built(store_of(), tmp_path, lrs=[1e-7, 1.0], **settings)
    results = dict(evaluator.run(colours))
    (protocol,) = evaluator.protocols
    assert protocol == "pacs_finetune_size-16_lrs-1e-07-1_epochs-6_batch-21_weight_decay-0_milestones-5"
    assert list(results) == [f"{protocol}/{d}_{what}" for d in ("photo", "sketch") for what in ("top1", "lr")], (
        "there is no mean over only two domains"
    )
    assert results[f"{protocol}/photo_lr"] == results[f"{protocol}/sketch_lr"] == 1.0
    assert min(results[f"{protocol}/{d}_top1"] for d in ("photo", "sketch")) > 60
    assert all(torch.equal(value, before[name]) for name, value in colours.state_dict().items())


def test_an_encoder_is_not_tested_on_the_domain_that_it_was_pre_trained_on(store_of, tmp_path):
    write_pacs(tmp_path)
    store = store_of()
    splits = pacs(root=str(tmp_path), target="sketch")
    store.splits = Splits(splits.pretrain, store.splits.train, store.splits.test)
    with pytest.raises(
        UserError, match=r"21 of the 28 images of pacs/art_painting are images of .*eval.domain.targets=\[DOMAIN\]"
    ):
        built(store, tmp_path)
    built(store, tmp_path, targets=["sketch"])
    store.overlap = "allow"
    built(store, tmp_path)


def test_the_option_and_the_names_say_the_protocol(store_of, tmp_path):
    cfg = compose(["eval=[domain,domain_labels]"], "evaluate").eval
    made = instantiate(cfg.domain)
    assert metrics.protocols(cfg.domain) == made.protocols == ["pacs", "pacs_finetune"]
    assert metrics.protocol_of("pacs_finetune/mean_top1") == "pacs_finetune" and metrics.is_percent("pacs/sketch_top1")
    assert (made.recipe.lr, made.recipe.batch, made.recipe.epochs, made.recipe.lr_factors(1)[23:25]) == (
        0.001,
        128,
        30,
        [1.0, 0.1],
    )
    shares = instantiate(cfg.domain_labels)
    expected = ["domain_labels_1", "domain_labels_5", "domain_labels_10", "domain_labels"]
    assert metrics.protocols(cfg.domain_labels) == shares.protocols == expected and shares.frozen == [
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(
        UserError, match="root: expected the folder that holds PACS, as eval.domain.root=PATH, got None"
    ):
        made.build(store_of(), seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": []}, "domain targets: expected some of art_painting"),
        ({"targets": ["photo", "photo"]}, "each once, got"),
        ({"ways": ["linear"]}, "domain ways: expected some of frozen, finetune"),
        ({"lrs": []}, "lrs: expected list of float above 0, 1 or more of them"),
        ({"num_strengths": 0}, "num_strengths: expected int from 1"),
        ({"when": "now"}, r"when: expected epoch \| end, got 'now'"),
    ],
)
def test_refuses_settings_that_make_no_sense(arguments, message):
    with pytest.raises(UserError, match=message):
        Domain(**arguments)


def test_below_a_share_the_classifier_alone_learns_and_from_it_on_the_whole_network(colours, store_of, monkeypatch):
    shares = FineTune(name="domain_labels", fractions=[0.1, 0.5], epochs=[8, 4], batch=9, lr=8.0, frozen_below=0.2)
    shares.build(store_of(train=90), seed=0)
    trained, original = [], FeatureStore.outputs
    monkeypatch.setattr(
        FeatureStore,
        "outputs",
        lambda self, network, *rest: (trained.append(network[0]), original(self, network, *rest))[1],
    )
    results = dict(shares.run(colours))
    assert (
        trained[0] is colours
        and trained[1] is not colours
        and not torch.equal(trained[1].layer.weight, colours.layer.weight)
    )
    changed = "frozen_below-0.2_top1"
    assert list(results) == [
        f"domain_labels_10_batch-9_lr-8_epochs-8_{changed}",
        f"domain_labels_50_batch-9_lr-8_epochs-4_{changed}",
    ]
