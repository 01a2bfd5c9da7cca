"""The names of results. A name tells the protocol, so numbers of the same name can be compared.

    knn20_top1             k-NN with 20 neighbours among all training images
    knn20_20pct_top1       among 20 % of each class, drawn at random;  knn20_20pct_first_top1: the first 20 % by file
                           name
    knn200_t0.1_top1       200 neighbours, weight exp(cosine / 0.1)
    linear_moco_top1       linear evaluation by MoCo's recipe
    linear_batch-256_top1  by the paper's recipe, but with batches of 256
    semi_1_top1            fine-tuned on 1 % of the labels;  semi_1_listed_top1: on those of a published list
    transfer/cifar10_top1, geometry/rank_me, pacs/sketch_top1, pacs_finetune/mean_top1
    detect_voc_c4/voc2007_ap50          detection on VOC 07+12 by MoCo's C4 recipe; detect_voc_c4_steps-2400/...: with a
                                        tenth of its steps
    segment_fcn16/voc2012_miou          fine-tuned on VOC 2012 with MoCo's head; segment_fcn16_images-8/...: with 8
                                        images in a step
    dense_linear/voc2012_miou           a linear head on frozen features: not comparable with fine-tuning

The part before the measure (top1, map11, rank_me, ...) is the protocol. Each evaluator gets the name of its protocol
here, and so do tables, figures, run directories and searches, without torch. A setting that can change a number appears
in the name if it differs from the recipe of that name. Settings of the run rather than the evaluator (precision, views,
seed) do not appear."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# The recipes as they are in conf/eval/*.yaml.
PAPER = {
    "epochs": 100, "batch": 4096, "lr": 0.025, "reference_batch": 256, "momentum": 0.9, "weight_decay": 0.0,
    "larc": True,
    "trust_coefficient": 1e-3, "schedule": "cosine", "milestones": [], "decay": 0.1, "unit": "epoch",
    "scale": [0.08, 1.0],
    "interpolation": "bilinear", "drop_last": False,
}  # fmt: skip
LINEAR = {
    "linear": PAPER,
    "linear_lightly": {
        **PAPER,
        "epochs": 90,
        "batch": 256,
        "lr": 0.1,
        "larc": False,
        "unit": "step",
        "drop_last": True,
    },
    "linear_moco": {**PAPER, "batch": 256, "lr": 30.0, "larc": False, "schedule": "steps", "milestones": [60, 80]},
}
FINE_TUNING = {
    "batch": 1024, "lr": 0.05, "reference_batch": 256, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0,
    "unit": "step",
    "scale": [0.08, 1.0], "interpolation": "bilinear",
}  # fmt: skip
FINE_TUNING_EPOCHS = {0.01: 60, 0.05: 60, 0.1: 30, 1.0: 30}  # share of the labels -> epochs
FROZEN_BELOW = {"semi": 0.0, "finetune": 0.0, "domain_labels": 0.1}  # from this share on the whole network learns
PROBE = {"l2": 1e-3, "max_iterations": 500}
TRANSFER = {
    "size": 224,
    "num_strengths": 45,
    "weakest": 1e-6,
    "strongest": 1e5,
    "max_iterations": 1000,
    "tolerance": 1e-5,
}
GEOMETRY = {"images": 2048}
PURITY = {"images": 5000, "train_images": 50_000, "rows": 2048}
SEGMENT = {
    "train": "trainaug", "images": 16, "steps": 30_000, "rate": 0.003, "milestones": [0.7, 0.9], "momentum": 0.9,
    "weight_decay": 1e-4,
    "crop": 513, "scale": [0.5, 2.0], "channels": 256, "precision": "fp32",
}  # fmt: skip
DENSE_LINEAR = {"train": "trainaug", "size": 448, "places": 20, "l2": 1e-3, "max_iterations": 500, "precision": "fp32"}

_DETECT = {
    "dataset": "coco", "head": "c4", "steps": 90_000, "images": 16, "rate": 0.02, "milestones": [60 / 90, 80 / 90],
    "warmup_steps": 1000, "momentum": 0.9, "weight_decay": 1e-4, "short_sides": list(range(640, 801, 32)),
    "test_side": 800,
    "longest": 1333,
    "anchors": [32, 64, 128, 256, 512], "proposal_samples": 256, "region_samples": 512, "region_cells": 14,
    "precise_batches": 200,
    "precision": "fp32",
}  # fmt: skip
DETECT = {
    "detect_voc_c4": {
        **_DETECT, "dataset": "voc", "steps": 24_000, "milestones": [18 / 24, 22 / 24], "warmup_steps": 100,
        "short_sides": list(range(480, 801, 32)),
    },
    "detect_coco_c4_1x": _DETECT,
    "detect_coco_c4_2x": {**_DETECT, "steps": 180_000, "milestones": [120 / 180, 160 / 180]},
    "detect_coco_fpn_1x": {**_DETECT, "head": "fpn"},
}  # fmt: skip
DOMAIN_WAYS: dict[str, Mapping[str, Any]] = {
    "frozen": TRANSFER,
    "finetune": {
        "size": 224, "lrs": [0.001], "epochs": 30, "batch": 128, "momentum": 0.9, "weight_decay": 5e-4,
        "milestones": [24], "decay": 0.1,
        "scale": [0.8, 1.0],
    },
}  # fmt: skip

KNN = "caco.evals.knn.KNN"
BASELINES = ("untrained/", "pixels/")  # prefixes of an evaluation's baselines, as in untrained/NAME


def knn(*, k: int = 20, temperature: float = 0.2, fraction: float = 1.0, choice: str = "random", **_: Any) -> str:
    """The name of the protocol of a k-NN evaluation."""
    share = "" if fraction == 1 else f"_{100 * fraction:g}pct" + ("" if choice == "random" else f"_{choice}")
    return f"knn{k}{share}" + ("" if temperature == 0.2 else f"_t{temperature:g}")


def probe(**settings: Any) -> str:
    return _with_changes("probe", settings, PROBE)


def linear(*, name: str = "linear", **recipe: Any) -> str:
    """If no recipe has this name, the user chose the name, and it stays as it is. Recipes without `drop_last` are from
    before that setting existed, when the last batch was dropped.
    """
    return _with_changes(name, {**PAPER, "drop_last": True, **recipe}, LINEAR.get(name, {}))


def fine_tuned(*, name: str, fraction: float, epochs: int, listed: bool, **recipe: Any) -> str:
    """The name of the protocol for one share of the labels.

    Args:
        listed: whether a list names the images; otherwise they are drawn.
    """
    share = ("" if fraction == 1 else f"_{100 * fraction:g}") + ("_listed" if listed else "")
    of_share = {"epochs": FINE_TUNING_EPOCHS.get(fraction), "frozen_below": FROZEN_BELOW.get(name)}
    standard = {**FINE_TUNING, **of_share} if name in FROZEN_BELOW else {}
    return _with_changes(name + share, {**recipe, "epochs": epochs}, standard)


def transfer(**settings: Any) -> str:
    return _with_changes("transfer", settings, TRANSFER)


def geometry(**settings: Any) -> str:
    return _with_changes("geometry", settings, GEOMETRY)


def purity(**settings: Any) -> str:
    return _with_changes("purity", settings, PURITY)


def detect(*, name: str = "detect_voc_c4", **settings: Any) -> str:
    """If no recipe has this name, the user chose the name, and it stays as it is."""
    return _with_changes(name, settings, DETECT.get(name, {}))


def segment(**settings: Any) -> str:
    """The name includes the head, because numbers of different heads cannot be compared."""
    return _with_changes("segment_fcn16", settings, SEGMENT)


def dense_linear(**settings: Any) -> str:
    return _with_changes("dense_linear", settings, DENSE_LINEAR)


def domain(*, ways: Iterable[str] = tuple(DOMAIN_WAYS), **settings: Any) -> list[str]:
    """The name of the protocol for each of `ways`."""
    return [
        _with_changes("pacs" if way == "frozen" else f"pacs_{way}", settings, DOMAIN_WAYS[way])
        for way in ways
        if way in DOMAIN_WAYS
    ]


def _with_changes(name: str, settings: Mapping[str, Any], standard: Mapping[str, Any]) -> str:
    changed = (key for key, value in standard.items() if key in settings and _plain(settings[key]) != value)
    return "_".join([name, *(f"{key}-{_text(_plain(settings[key]))}" for key in changed)])


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else list(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(_text, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def protocols(evaluator: Mapping[str, Any]) -> list[str]:
    """The names of the protocols of an evaluator with this configuration; [] if it is not one of caco's own."""
    settings = dict(evaluator)
    target = settings.pop("_target_")
    if target == "caco.evals.finetune.FineTune":
        name, lists = settings.pop("name", "finetune"), settings.pop("lists", None)
        fractions, epochs = settings.pop("fractions", [1.0]), settings.pop("epochs", [30])
        shares = zip(fractions, epochs, strict=False)  # FineTune refuses lists of other lengths
        return [
            fine_tuned(name=name, fraction=part, epochs=count, listed=lists is not None, **settings)
            for part, count in shares
        ]
    if target == "caco.evals.domain.Domain":
        return domain(**settings)
    named = {
        KNN: knn,
        "caco.evals.probe.Probe": probe,
        "caco.evals.linear.Linear": linear,
        "caco.evals.transfer.Transfer": transfer,
        "caco.evals.geometry.Geometry": geometry,
        "caco.evals.purity.Purity": purity,
        "caco.evals.dense.detect.Detect": detect,
        "caco.evals.dense.segment.Segment": segment,
        "caco.evals.dense.dense_linear.DenseLinear": dense_linear,
    }
    return [named[target](**settings)] if target in named else []


def protocol_of(metric: str) -> str:
    """linear_moco_top1 -> linear_moco, transfer/sun397_top1 -> transfer."""
    return metric.partition("/")[0] if "/" in metric else metric.rpartition("_")[0]


def knn_metric(evaluators: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The k-NN accuracy that a run with these evaluators logs, or None."""
    return next((f"{knn(**node)}_top1" for node in evaluators.values() if node["_target_"] == KNN), None)


def objective(summary: Mapping[str, Any], evaluators: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The number that a search (Optuna) maximises, from the run's own evaluations: k-NN accuracy, else that of a probe,
    else None.
    """
    probes = (f"{probe(**node)}_top1" for node in evaluators.values() if node["_target_"] == "caco.evals.probe.Probe")
    return next(
        (summary[name] for name in (knn_metric(evaluators), *probes) if name is not None and name in summary), None
    )


def accuracies(names: Iterable[str]) -> list[str]:
    """The names of top-1 accuracies of a run's own backbone on its own data, sorted."""
    return sorted({name for name in names if name.endswith("_top1") and "/" not in name})


def missing_at_the_end(summary: Mapping[str, Any]) -> list[str]:
    """Why results are missing in a run that reached its end: one line for each evaluator that failed at the end.
    Earlier failures do not count.
    """
    return [one["message"] for one in summary.get("failed_evaluations", ()) if one["step"] == summary["steps"]]


def is_percent(metric: str) -> bool:
    """Whether the metric is an accuracy or another share in percent."""
    names = (
        "top\\d+|mean_per_class|map11|ap_per_image|miou|mean_accuracy|pixel_accuracy|ap(50|75|_small|_medium|_large)?"
    )
    return re.search(rf"(_({names})|^purity.*/(positives|chance))$", metric) is not None


def title(metric: str) -> str:
    """A metric's name as a heading: knn20_20pct_top1 -> k-NN (20 of 20 %); probe_top1 -> probe; others stay as they
    are.
    """
    found = re.fullmatch(r"knn(\d+)(?:_([\d.]+)pct(_first)?)?(?:_t([\d.e-]+))?_top1", metric)
    if found is None:
        return metric.removesuffix("_top1")
    k, share, first, temperature = found.groups()
    of = f" of {'the first ' if first else ''}{share} %" if share else ""
    return f"k-NN ({k}{of}" + (f", t {temperature}" if temperature else "") + ")"
