"""The cases of the tests that check every method and every setting of pn in conf/, and some more: each is a list of
overrides for tests/tiny.py. Importing this module composes no configuration, because that takes time.
"""

from tiny import FEW_PROTOTYPES, MIXED, OF_PATCHES, compose

from caco.config.composition import CONF

# These files are CaCo, DINO and MoCo v3 with other settings, so they are no cases of their own.
WITH_OTHER_NUMBERS = ("caco_small", "dino_vit", "mocov3_vit")
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if path.stem not in WITH_OTHER_NUMBERS)
SETTINGS = sorted(path.stem for path in (CONF / "pn").glob("*.yaml"))
# Each method chooses its projector, optimiser and views; tests need small ones.
SMALL = ["augmentation=digits", "projector=small", "projector.hidden_dim=16", "projector.dim=8", "optimizer=sgd"]
MULTICROP = ["+augmentation.views.small._target_=caco.data.views.augmentation.View",
"+augmentation.views.small.count=2",
             "+augmentation.views.small.size=8"]  # fmt: skip
CASES = {
    f"method={name}": [f"method={name}", *SMALL, *FEW_PROTOTYPES.get(name, []), *OF_PATCHES.get(name, [])]
    for name in METHODS
}
# CPC v2 has no views, only patches.
CASES |= {
    f"{name} multi-crop": [*overrides, *MULTICROP] for name, overrides in list(CASES.items()) if name != "method=cpcv2"
}
CASES |= {f"pn={name}": [f"pn={name}"] for name in SETTINGS}
QUEUE = ["method.queue_size=128", "method.queue_start_epoch=0"]
CASES["method=swav with a queue"] = [*CASES["method=swav"], *QUEUE]
CASES["method=adco with shuffled keys"] = [*CASES["method=adco"], "norm_groups=4", "shuffle_keys=true"]
CASES["rows renewed and in balance"] = ["bank_learning.renewed_after_steps=2", "bank_learning.balance=0.5"]
# Each treatment of negatives, with a bank that provides positives (pn=both) and one that provides none (pn=negative),
# and with a few methods.
TREATED = {
    name: [f"negatives={name}", *(MIXED if name == "mixed" else [])] for name in ("debiased", "hard", "margin", "mixed")
}
CASES |= {
    f"pn={pn} negatives={name}": [f"pn={pn}", *treated]
    for pn in ("both", "negative")
    for name, treated in TREATED.items()
}
CASES |= {
    f"method={m} negatives={name}": [*CASES[f"method={m}"], *TREATED[name]]
    for m, name in (("adco", "hard"), ("adco", "mixed"), ("nnclr", "margin"))
}
# Cases that only the long tier of tests runs. Of the cases with small views (multi-crop), the fast tier runs those of
# CaCo and SwAV; of those with treated negatives, it runs one.
LONG = {f"method={name} multi-crop" for name in METHODS if name not in ("caco", "swav")}
LONG |= {case for case in CASES if " negatives=" in case and case != "pn=both negatives=hard"} | {
    "method=ifm",
    "method=debiased",
}
LONG |= {"pn=both_blended", "pn=both_by_class"}
LONG |= {f"method={name}" for name in ("cpcv2", "cmc", "pirl", "sela", "hcl")}


def bank_of(overrides):
    return compose(*overrides, bank=False).bank


def has_bank(overrides):
    """Whether the configuration has a bank whose size is a setting instead of following from the number of images."""
    return bank_of(overrides) is not None and bank_of(overrides).size is not None
