"""The scales cifar10_lightly and cifar10_solo train each method with the CIFAR-10 recipe of lightly or solo-learn, with
every constant.
"""

import pytest
import torch
from tiny import layers_of

from caco.config.composition import instantiate
from caco.data.views.augmentation import View
from caco.engine.assembly import build_encoder
from caco.runs.identity import plain
from experiments.tables import experiments, load_scale, load_table

ROWS = {
    "simclr": ("1", "simclr"), "mocov2": ("1", "mocov2"), "simsiam": ("1", "simsiam"), "swav": ("1", "swav"),
    "nnclr": ("1", "nnclr"),
    "byol": ("1", "byol"), "mocov3": ("2", "mocov3"), "barlow": ("rivals", "barlow"), "vicreg": ("rivals", "vicreg"),
    "dino": ("rivals", "dino"),
}  # fmt: skip
SGD, ADAM, LARS = "sgd", "adam", "lars_timm"
WEAK, BYOL, STRONG, VICREG = [0.4, 0.4, 0.4, 0.1], [0.4, 0.4, 0.2, 0.1], [0.8, 0.8, 0.8, 0.2], [0.4, 0.4, 0.2, 0.1]
# The rate at the scale's batch and the weight decay; the smallest crop, jitter, blur and solarize of the two views; the
# heads; other settings of the method.
LIGHTLY = {
    "simclr": (SGD, 0.06, 5e-4, 0.08, WEAK, 0, (0, 0), "512-512b ReLU 512-128b", None, {"temperature": 0.5}),
    "mocov2": (
        SGD, 0.06, 5e-4, 0.08, WEAK, 0, (0, 0), "512-512b ReLU 512-128b", None,
        {"temperature": 0.1, "momentum": 0.99, "final_momentum": 0.99, "symmetric": True, "reduction": "mean",
        "size": 4096},
    ),
    "simsiam": (
        SGD, 0.06, 5e-4, 0.2, WEAK, 0, (0, 0), "512-2048 BN ReLU 2048-2048 BN", "2048-512 BN ReLU 512-2048b",
        {"constant_predictor_rate": False, "reduction": "mean"},
    ),
    "swav": (
        ADAM, 1e-3, 1e-6, 0.14, WEAK, 0, (0, 0), "512-512 BN ReLU 512-128b", None,
        {"num_prototypes": 512, "temperature": 0.1, "epsilon": 0.05, "prototypes_frozen_steps": 0, "queue_size": 0},
    ),
    "nnclr": (
        SGD, 0.06, 5e-4, 0.08, WEAK, 0, (0, 0), "512-2048 BN ReLU 2048-256 BN", "256-4096b BN ReLU 4096-256b",
        {"temperature": 0.5, "size": 4096},
    ),
    "byol": (  # our loss is twice lightly's, so the rate is half of 0.06 and the decay twice 5e-4
        SGD, 0.03, 1e-3, 0.08, BYOL, 0, (0, 0.2), "512-1024 BN ReLU 1024-256b", "256-1024b BN ReLU 1024-256",
        {"momentum": 0.99, "final_momentum": 0.99, "reduction": "mean", "twin_initialisation": "copy"},
    ),
    "barlow": (
        SGD, 0.06, 5e-4, 0.08, BYOL, 0, (0, 0.2), "512-2048 BN ReLU 2048-2048b", None,
        {"off_diagonal_weight": 0.005, "loss_scale": 1.0, "one_dimensional_rate": 1.0},
    ),
    "dino": (
        SGD, 0.06, 5e-4, 0.4, BYOL, 0, (0, 0.2), "512-2048 BN GELU 2048-256b", None,
        {"num_prototypes": 2048, "momentum": 0.99, "final_momentum": 0.99, "teacher_temperature": 0.04,
        "first_teacher_temperature": 0.04,
         "last_layer_frozen_epochs": 0},
    ),
}  # fmt: skip
SOLO = {
    "simclr": (LARS, 0.4, 1e-4, 0.08, STRONG, 0.5, (0, 0), "512-2048b ReLU 2048-256b", None, {"temperature": 0.2}),
    "mocov2": (
        SGD, 0.3, 1e-4, 0.08, WEAK, 0.5, (0, 0), "512-2048b ReLU 2048-256b", None,
        {"temperature": 0.2, "momentum": 0.99, "final_momentum": 0.999, "symmetric": True, "size": 32768},
    ),
    "simsiam": (
        SGD, 0.5, 1e-5, 0.08, WEAK, 0.5, (0, 0), "512-2048 BN ReLU 2048-2048 BN ReLU 2048-2048 BN*",
        "2048-512 BN ReLU 512-2048b",
        {"constant_predictor_rate": True},
    ),
    "swav": (
        LARS, 0.6, 1e-6, 0.08, STRONG, 0.5, (0, 0), "512-2048b BN ReLU 2048-128b", None,
        {"num_prototypes": 3000, "queue_size": 3840, "queue_start_epoch": 50,
        "prototypes_frozen_steps": 2 * (50000 // 256)},
    ),
    "nnclr": (
        LARS, 0.4, 1e-5, 0.08, BYOL, 0, (0, 0.2), "512-2048b BN ReLU 2048-2048b BN ReLU 2048-256b BN",
        "256-4096b BN ReLU 4096-256b",
        {"temperature": 0.2, "size": 65536},
    ),
    "byol": (
        LARS, 1.0, 1e-5, 0.08, BYOL, 0, (0, 0.2), "512-4096b BN ReLU 4096-256b", "256-4096b BN ReLU 4096-256",
        {"momentum": 0.99, "final_momentum": 1.0, "reduction": "sum"},
    ),
    "mocov3": (
        LARS, 0.3, 1e-6, 0.08, BYOL, 0, (0, 0.2), "512-4096 BN ReLU 4096-256 BN*", "256-4096 BN ReLU 4096-256",
        {"temperature": 0.2, "momentum": 0.99, "final_momentum": 1.0},
    ),
    "barlow": (
        LARS, 0.3, 1e-4, 0.08, BYOL, 0, (0, 0.2), "512-2048b BN ReLU 2048-2048b BN ReLU 2048-2048b", None,
        {"loss_scale": 0.1, "off_diagonal_weight": 0.0051, "one_dimensional_rate": 1.0},
    ),
    "vicreg": (
        LARS, 0.3, 1e-4, 0.2, VICREG, 0, (0.1, 0.1), "512-2048b BN ReLU 2048-2048b BN ReLU 2048-2048b", None,
        {"invariance_weight": 25.0, "variance_weight": 25.0, "covariance_weight": 1.0},
    ),
    "dino": (
        LARS, 0.3, 1e-6, 0.08, BYOL, 0, (0, 0.2), "512-2048b GELU 2048-2048b GELU 2048-256b", None,
        {"num_prototypes": 4096, "momentum": 0.9995, "final_momentum": 1.0, "teacher_temperature": 0.07,
        "first_teacher_temperature": 0.04,
         "teacher_temperature_epochs": 50, "last_layer_frozen_epochs": 1},
    ),
}  # fmt: skip
THEIRS = {
    "cifar10_lightly": dict(
        barlow=84.2, byol=86.9, dino=84.0, mocov2=83.8, nnclr=83.4, simclr=84.7, simsiam=81.9, swav=81.2
    ),
    "cifar10_solo": dict(
        barlow=92.10,
        byol=92.58,
        dino=89.52,
        mocov2=92.94,
        mocov3=93.10,
        nnclr=91.88,
        simclr=90.74,
        simsiam=90.51,
        swav=89.17,
        vicreg=92.07,
    ),
}
SHARED = {  # scale -> epochs, batch, the schedule's warm-up and unit, precision, interpolation, means
    "cifar10_lightly": (200, 128, 0, "epoch", "fp32", "bilinear", [0.485, 0.456, 0.406]),
    "cifar10_solo": (1000, 256, 10, "step", "bf16", "bicubic", [0.4914, 0.4822, 0.4465]),
}
CASES = [pytest.param("cifar10_lightly", name, *LIGHTLY[name], id=f"lightly {name}") for name in LIGHTLY]
CASES += [
    pytest.param("cifar10_solo", name, *SOLO[name], id=f"solo-learn {name}", marks=pytest.mark.long) for name in SOLO
]


def one(scale, name):
    table, row = ROWS[name]
    (experiment,) = experiments(load_table(table), load_scale(scale), rows=[row])
    return experiment


@pytest.mark.parametrize(
    (
        "scale",
        "name",
        "optimizer",
        "rate",
        "decay",
        "area",
        "jitter",
        "blur_p",
        "solarize_p",
        "projector",
        "predictor",
        "told",
    ),
    CASES,
)
def test_each_method_has_the_constants_of_its_recipe(
    scale, name, optimizer, rate, decay, area, jitter, blur_p, solarize_p, projector, predictor, told
):
    cfg = one(scale, name).cfg
    epochs, batch, warmup_epochs, unit, precision, interpolation, mean = SHARED[scale]
    assert (cfg.epochs, cfg.batch, cfg.precision, cfg.data._target_) == (
        epochs,
        batch,
        precision,
        "caco.data.sets.downloaded.cifar10",
    )
    assert (cfg.schedule.warmup_epochs, cfg.schedule.unit, cfg.schedule.final_fraction, cfg.schedule.final_lr) == (
        warmup_epochs,
        unit,
        0,
        None,
    )
    assert (cfg.backbone.name, cfg.backbone.cifar_stem) == ("resnet18", True)

    whole = plain(cfg)
    tree = whole["optimizer"]
    assert tree["_target_"] == f"caco.engine.optimizers.{optimizer}"
    assert tree["lr"] * batch / tree["reference_batch"] == pytest.approx(rate) and tree[
        "weight_decay"
    ] == pytest.approx(decay)
    assert tree.get("momentum", 0.9) == 0.9
    assert optimizer != LARS or (tree["trust_coefficient"], tree["trust_clip"]) == (0.02, True)

    kinds = [View(**kind) for kind in whole["augmentation"]["views"].values()]
    views = [kind for kind in kinds for _ in range(kind.count)]
    assert len(views) == 2 and whole["augmentation"]["mean"] == mean and cfg.augmentation.size == 32
    expected_crop = "bicubic" if (scale, name) == ("cifar10_lightly", "dino") else interpolation
    for view, solarize in zip(views, solarize_p, strict=True):
        assert (list(view.scale), list(view.jitter), view.jitter_p, view.gray_p, view.flip_p) == (
            [area, 1.0],
            jitter,
            0.8,
            0.2,
            0.5,
        )
        assert (view.blur_p, view.solarize_p, view.interpolation) == (blur_p, solarize, expected_crop)

    method, bank = whole["method"], whole["bank"] or {}
    assert {key: bank.get(key, method.get(key)) for key in told} == pytest.approx(told)
    with torch.device("meta"):
        encoder = build_encoder(cfg)
        built = instantiate(
            cfg.method, encoder=encoder, **({} if cfg.bank is None else {"bank": instantiate(cfg.bank)})
        )
    assert layers_of(encoder.projector) == projector
    assert predictor is None or layers_of(built.predictor) == predictor


@pytest.mark.parametrize("scale", THEIRS)
def test_what_they_published_is_that_of_the_facts(scale):
    rows = {name: one(scale, name) for name in ROWS}
    assert {name: row.theirs("top1") for name, row in rows.items() if row.theirs("top1") is not None} == THEIRS[scale]
    assert {name for name, row in rows.items() if row.why_not is not None} == (
        {"mocov3", "vicreg"} if scale == "cifar10_lightly" else set()
    )
