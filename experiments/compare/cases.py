"""The cases: short runs as small as those of tests/tiny.py, which log every step and evaluate after every epoch. Each
uses the projector and optimiser of its method, with narrow layers."""

import re
from dataclasses import dataclass
from pathlib import Path

BATCH, IMAGES = 64, 1400
TINY = [
    "data=digits", "augmentation=digits", "backbone=small_resnet", "backbone.width=8", "projector.hidden_dim=16",
    "projector.dim=8",
    "schedule.warmup_epochs=0", f"batch={BATCH}", "precision=fp32", "device=cpu", "eval=[knn]", "eval_every_epochs=1",
    "tracking=ledger", "loader.num_workers=0", "log_every_steps=1",
]  # fmt: skip
MULTICROP = ["+augmentation.views.small.count=2", "+augmentation.views.small.size=8"]
SETTINGS = {  # cases for single settings of CaCo that no file of conf/method, pn, negatives, ... covers
    "bank.reading=paper": ["bank.reading=paper"],
    "bank.initialisation=random": ["bank.initialisation=random"],
    "bank.final_lr=0.01": ["bank.lr=0.3", "bank.final_lr=0.01"],
    "warm_start.passes=3": ["warm_start.passes=3"],
    "schedule.unit=epoch": ["schedule.unit=epoch", "schedule.warmup_epochs=1"],
    "precision=bf16": ["precision=bf16"],
    "accumulate=4": ["accumulate=4"],
    "augmentation=cifar": ["augmentation=cifar"],
    "evaluators": [
        "eval=[knn_all,probe,geometry,linear,semi]", "eval.linear.epochs=2", "eval.linear.batch=256",
        "eval.semi.epochs=[2,1]",
    ],
}  # fmt: skip
# Methods that need other images than the rest. Patches need larger digits. CMC needs coloured images, and a backbone
# and projector with one part for lightness and one for the colours.
PARTICULAR = {name: ["data.size=32", f"augmentation={name}_cifar"] for name in ("infomin", "cpcv2", "pirl")}
PARTICULAR["cmc"] = ["data=photo_tiles", "augmentation=cmc_cifar", "backbone=cmc_small", "projector=cmc"]
ON_TWO_RANKS = ["pn=both", "pn=positive", "method=simclr", "method=nnclr", "method=adco multi-crop"]
CUT_AND_RESUMED = ["pn=both"]


@dataclass(frozen=True)
class Case:
    """A short run. If `cut`, the finished run is taken back to its middle checkpoint and resumed from there."""

    name: str
    overrides: list[str]
    ranks: int = 1
    cut: bool = False


def options(tree: Path, group: str) -> list[str]:
    return sorted(path.stem for path in (tree / "conf" / group).glob("*.yaml"))


def replaced(overrides: list[str], others: list[str]) -> list[str]:
    """`overrides` followed by `others`, without the overrides whose key `others` sets: caco refuses a key that is set
    twice.
    """
    keys = {override.partition("=")[0] for override in others}
    return [override for override in overrides if override.partition("=")[0] not in keys] + others


def cases_of(tree: Path, steps: int) -> dict[str, Case]:
    """Every case that a commit has, by name. The overrides use the setting names of this checkout."""
    epochs = max(2, steps // (IMAGES // BATCH) + 1)
    tiny = [*TINY, f"epochs={epochs}", f"max_steps={steps}"]
    cases = {
        f"method={name}": Case(f"method={name}", replaced([*tiny, f"method={name}"], PARTICULAR.get(name, [])))
        for name in options(tree, "method")
    }
    cases |= {
        f"{name} multi-crop": Case(f"{name} multi-crop", [*case.overrides, *MULTICROP])
        for name, case in list(cases.items())
        if name != "method=cpcv2"  # it reads patches, so small crops beside whole views make no sense for it
    }
    chosen = [
        f"{group}={name}" for group in ("pn", "negatives", "optimizer", "projector") for name in options(tree, group)
    ]
    settings = {name: [name] for name in chosen} | SETTINGS
    if "projector=cmc" in settings:  # only method=cmc accepts this projector
        settings["projector=cmc"] = ["method=cmc", *PARTICULAR["cmc"]]
    cases |= {name: Case(name, replaced(tiny, overrides)) for name, overrides in settings.items()}
    for name in set(ON_TWO_RANKS) & set(cases):
        cases[f"{name}, two ranks"] = Case(f"{name}, two ranks", cases[name].overrides, ranks=2)
    for name in set(CUT_AND_RESUMED) & set(cases):
        cases[f"{name}, cut and resumed"] = Case(f"{name}, cut and resumed", cases[name].overrides, cut=True)
    return {name: cases[name] for name in sorted(cases, key=lambda name: (cases[name].ranks, name))}


def translated(overrides: list[str], changes: list[str]) -> list[str]:
    """A case's overrides for one side: a change "OLD -> NEW" replaces OLD at the start of an override by NEW; any other
    change is an override to add.
    """
    result = list(overrides)
    for change in changes:
        old, arrow, new = (part.strip() for part in change.partition("->"))
        if arrow:
            result = [re.sub(rf"^(\+*){re.escape(old)}", rf"\g<1>{new}", override) for override in result]
        else:
            result = replaced(result, [change])
    return result


def cut_settings(case: Case, steps: int) -> list[str]:
    return [f"checkpoint.every_steps={steps // 2}", "checkpoint.keep=1000"] if case.cut else []
