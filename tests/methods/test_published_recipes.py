"""`method=NAME` without other overrides gives the published recipe: heads, optimiser, schedules and views, with every
constant.
"""

import pytest
import torch
from tiny import layers_of

from caco.config import composition
from caco.config.composition import instantiate
from caco.engine.assembly import build_encoder
from caco.runs.identity import plain

ZERO_START = {"warmup_start": 0.0, "warmup_end": "next", "unit": "step"}
LARS = "caco.engine.optimizers.lars"
RECIPES = {  # name -> optimiser; schedule; method; views; the layers of projector and predictor
    "byol": (
        {"_target_": LARS, "lr": 0.2, "reference_batch": 256, "weight_decay": 1.5e-6, "momentum": 0.9,
        "trust_coefficient": 1e-3},
        {"warmup_epochs": 10, "final_fraction": 0.0, **ZERO_START},
        {"momentum": 0.996, "final_momentum": 1.0, "twin_initialisation": "random", "reduction": "sum"},
        "byol", "2048-4096b BN ReLU 4096-256", "256-4096b BN ReLU 4096-256",
    ),
    "simsiam": (
        {"_target_": "caco.engine.optimizers.sgd", "lr": 0.05, "reference_batch": 256, "weight_decay": 1e-4,
        "momentum": 0.9},
        {"warmup_epochs": 0, "final_fraction": 0.0, "unit": "epoch"},
        {"constant_predictor_rate": True, "reduction": "mean"},
        "mocov2", "2048-2048 BN ReLU 2048-2048 BN ReLU 2048-2048 BN*", "2048-512 BN ReLU 512-2048b",
    ),
    "mocov3": (
        {"_target_": LARS, "lr": 0.6, "reference_batch": 256, "weight_decay": 1e-6, "momentum": 0.9,
        "trust_coefficient": 1e-3},
        {"warmup_epochs": 10, "final_fraction": 0.0, **ZERO_START},
        {"temperature": 1.0, "momentum": 0.99, "final_momentum": 1.0, "reduction": "sum"},
        "caco", "2048-4096 BN ReLU 4096-256 BN*", "256-4096 BN ReLU 4096-256",
    ),
    "mocov3_vit": (
        {"_target_": "caco.engine.optimizers.adamw", "lr": 1.5e-4, "reference_batch": 256, "weight_decay": 0.1,
        "decay_one_dimensional": True},
        {"warmup_epochs": 40, "final_fraction": 0.0, **ZERO_START},
        {"temperature": 0.2, "momentum": 0.99, "final_momentum": 1.0, "reduction": "sum"},
        "mocov3_vit", "384-4096 BN ReLU 4096-4096 BN ReLU 4096-256 BN*", "256-4096 BN ReLU 4096-256 BN*",
    ),
    "barlow": (
        {"_target_": LARS, "lr": 0.2, "reference_batch": 256, "weight_decay": 1e-6, "momentum": 0.9,
        "trust_coefficient": 1e-3},
        {"warmup_epochs": 10, "final_fraction": 0.001, **ZERO_START},
        {"off_diagonal_weight": 0.0051, "loss_scale": 1.0, "one_dimensional_rate": 0.0048 / 0.2},
        "byol", "2048-8192 BN ReLU 8192-8192 BN ReLU 8192-8192", None,
    ),
    "vicreg": (
        {"_target_": LARS, "lr": 0.2, "reference_batch": 256, "weight_decay": 1e-6, "momentum": 0.9,
        "trust_coefficient": 1e-3},
        {"warmup_epochs": 10, "final_fraction": 0.001, **ZERO_START},
        {"invariance_weight": 25.0, "variance_weight": 25.0, "covariance_weight": 1.0},
        "byol", "2048-8192b BN ReLU 8192-8192b BN ReLU 8192-8192", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_published_one(name):
    optimizer, schedule, method, views, projector, predictor = RECIPES[name]
    cfg = composition.job_config(composition.compose([f"method={name}"]))
    tree = plain(cfg)
    for part, expected in (("optimizer", optimizer), ("schedule", schedule), ("method", method)):
        assert {key: tree[part][key] for key in expected} == pytest.approx(expected), part
    others = plain(composition.job_config(composition.compose([f"method={name}", f"augmentation={views}"])))
    assert tree["augmentation"] == others["augmentation"] and tree["bank"] is None
    with torch.device("meta"):
        encoder = build_encoder(cfg)
        built = instantiate(cfg.method, encoder=encoder)
    assert layers_of(encoder.projector) == projector
    assert predictor is None or layers_of(built.predictor) == predictor
    if "vit" not in name:
        assert tree["backbone"]["name"] == "resnet50" and tree["backbone"]["zero_init_last"] is True
    else:
        assert tree["backbone"]["num_heads"] == 12 and tree["backbone"]["frozen_patches"] is True
