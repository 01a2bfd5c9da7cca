"""Commands in conf/ that claim to be a published recipe compose that recipe. tests/test_printed_commands.py tests that
every command can be run.
"""

import re
import shlex

import pytest

from caco.config.composition import CONF, compose, instantiate
from caco.methods.terms import Term, terms_of

COMMAND = re.compile(r"python -m caco\.train((?: [^\s(]\S*)*)")


def printed(file):
    """The overrides of each command in a file of conf/; a command ends with its line or at two spaces."""
    return [shlex.split(words) for words in COMMAND.findall((CONF / file).read_text())]


def terms(cfg):
    return terms_of(instantiate(cfg.augmentation).sizes, symmetric=cfg.method.symmetric, reduction=cfg.method.reduction)


def test_caco_s_multi_crop_is_the_mean_of_two_terms_and_that_of_twelve():
    (words,) = printed("augmentation/caco_multicrop.yaml")
    cfg = compose(words)
    assert instantiate(cfg.augmentation).sizes == [224, 224] + [96] * 6
    large = [Term(1, 0, 1 / 2), Term(0, 1, 1 / 2)]
    assert terms(cfg) == large + [Term(query, key, 1 / 12) for key in (0, 1) for query in range(2, 8)]
    assert (cfg.batch, cfg.epochs, cfg.bank.size, cfg.schedule.unit, cfg.precision) == (
        2048,
        800,
        65536,
        "epoch",
        "fp32",
    )


def test_adco_s_multi_crop_has_one_key_and_adds_five_losses_up():
    (words,) = printed("augmentation/adco_multicrop.yaml")
    cfg = compose(words)
    assert instantiate(cfg.augmentation).sizes == [224, 224, 192, 160, 128, 96]
    assert terms(cfg) == [Term(query, 1, 1.0) for query in (0, 2, 3, 4, 5)]
    assert cfg.method.warm_start_key == "last", "the key of the warm start is the smallest crop, of 96 px"
    assert (cfg.batch, cfg.method.warm_start_temperature, cfg.bank.pull) == (256, 0.12, 0.0)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("caco", {"unit": "epoch", "warmup_epochs": 10, "final_fraction": 0.01}),
        ("adco", {"unit": "epoch", "warmup_epochs": 0, "final_fraction": 0.0006 / 0.03}),
        ("mocov2", {"unit": "epoch", "warmup_epochs": 0, "final_fraction": 0.0}),
        (
            "simclr",
            {"unit": "step", "warmup_epochs": 10, "warmup_start": 0.0, "warmup_end": "next", "final_fraction": 0.0},
        ),
    ],
)
def test_a_method_s_own_command_has_the_published_schedule_in_float32(method, expected):
    cfg = compose(printed(f"method/{method}.yaml")[0])
    assert {key: cfg.schedule[key] for key in expected} == pytest.approx(expected) and cfg.precision == "fp32"


def test_simclr_starts_and_crops_as_published():
    cfg = compose(printed("method/simclr.yaml")[0])
    assert (cfg.backbone.name, cfg.backbone.zero_init_last) == ("resnet50", True)
    assert cfg.projector.initialisation == "normal_0.01" and (cfg.projector.layers, cfg.projector.last_batch_norm) == (
        2,
        True,
    )
    assert [view.interpolation for view in cfg.augmentation.views.values()] == ["bicubic"]


def test_adco_warms_up_at_its_own_temperature():
    assert compose(["method=adco", "method.temperature=0.14"]).method.warm_start_temperature == 0.14
