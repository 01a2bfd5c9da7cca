"""Refuses plain values of the root, by themselves, as batch=1, and beside each other.

What cannot work is refused, not what is unusual. What depends on the data is checked once the data are known.
"""

import re
from collections.abc import Callable
from typing import Any

from caco.config import folders, signatures
from caco.installed import is_installed, to_install
from caco.runs.identity import file_digest
from caco.saying import amount

FORMATS = (  # of weights files, read by caco/nn/formats.py
    "caco", "adco", "moco", "torchvision", "timm", "transformers", "vissl", "dino", "dinov2", "lightly",
    "stable_pretraining", "solo",
    "instdisc", "pycontrast", "pcl", "mocov3", "simsiam", "swav", "barlow", "vicreg", "simclr", "sela", "mmselfsup",
    "byol",
)  # fmt: skip
EXPORTS = ("safetensors", "timm", "torchvision", "detectron2")  # written by caco/export.py


def of_a_training(tree: dict[str, Any]) -> list[str]:
    """Checks the plain values of a training."""
    problems, demand = _demands(tree)
    demand("config_dir", tree["config_dir"] == folders.config_dir(), "this key left out; use --config-dir DIR instead")
    _continued(tree, problems, demand)
    schedule, checkpoint, warm_start = tree["schedule"], tree["checkpoint"], tree["warm_start"]
    demand("name", re.fullmatch(r"\w[\w.+-]*", tree["name"]) is not None, "letters, digits and ._+- (a folder's name)")
    demand("batch", tree["batch"] >= 2, "at least 2 images")
    demand("epochs", tree["epochs"] >= 1, "at least 1")
    demand("max_steps", tree["max_steps"] is None or tree["max_steps"] >= 1, "null or at least 1")
    demand("accumulate", tree["accumulate"] is None or tree["accumulate"] >= 1, "null or at least 1")
    groups, batch = tree["norm_groups"], tree["batch"]
    counted = type(groups) is int and groups >= 1 and (groups == 1 or batch % groups == 0 and batch // groups >= 2)
    demand(
        "norm_groups",
        groups == "rank" or counted,
        f"1, rank, or a divisor of batch={batch} that leaves 2 or more images in each group",
    )
    demand(
        "shuffle_keys", not tree["shuffle_keys"] or groups != 1, "false, because norm_groups=1 leaves it without effect"
    )
    demand("seed", 0 <= tree["seed"] < 2**32, "0 to 2**32 - 1")
    demand("precision", tree["precision"] in ("bf16", "fp32"), "bf16 or fp32")
    demand("device", tree["device"] in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
    _weights(tree, demand)
    demand("schedule.warmup_epochs", schedule["warmup_epochs"] >= 0, "0 or more")
    demand("schedule.warmup_start", 0 <= (schedule["warmup_start"] or 0) <= 1, "null, or 0 to 1")
    demand("schedule.warmup_end", schedule["warmup_end"] in ("last", "next"), "last or next")
    demand("schedule.final_fraction", 0 <= (schedule["final_fraction"] or 0) <= 1, "0 to 1, or null")
    demand("schedule.final_lr", (schedule["final_lr"] or 0) >= 0, "null, or 0 or more")
    demand("schedule.drops", all(0 < share < 1 for share in schedule["drops"]), "shares of the run, between 0 and 1")
    demand("schedule.drop_factor", 0 < schedule["drop_factor"] < 1, "a number between 0 and 1")
    if [schedule["final_fraction"] is None, schedule["final_lr"] is None, not schedule["drops"]].count(False) != 1:
        problems.append(
            "schedule: set one of final_fraction, final_lr and drops, and the others to null (drops to []); got"
            " {final_fraction}, {final_lr} and {drops}".format(**schedule)
        )
    by_image = tree["bank"] is not None and signatures.declared(tree["bank"]["_target_"], "by_image")
    demand(
        "bank.size",
        not by_image or tree["bank"].get("size") is None,
        "null: this bank always has one row for each training image",
    )
    demand("warm_start.steps", warm_start["steps"] is None or warm_start["steps"] >= 0, "null, or 0 or more")
    demand("warm_start.passes", warm_start["passes"] is None or warm_start["passes"] >= 0, "null, or 0 or more")
    if None not in warm_start.values():
        problems.append(
            "warm_start: expected steps or passes, got both, {steps} and {passes}; set one of them to null".format(
                **warm_start
            )
        )
    elif warm_start["passes"] and tree["bank"] is None:
        problems.append(
            "warm_start.passes: counts passes over the rows of a bank, and this configuration has no bank, got"
            f" {warm_start['passes']}; use warm_start.steps=N instead"
        )
    demand("schedule.unit", schedule["unit"] in ("step", "epoch"), "step or epoch")
    demand("log_every_steps", tree["log_every_steps"] >= 1, "at least 1")
    demand("eval_every_epochs", tree["eval_every_epochs"] >= 1, "at least 1")
    demand("checkpoint.every_epochs", checkpoint["every_epochs"] >= 1, "at least 1")
    every_steps = checkpoint["every_steps"]
    demand("checkpoint.every_steps", every_steps is None or every_steps >= 1, "null or at least 1")
    demand("checkpoint.keep", checkpoint["keep"] >= 1, "at least 1")
    demand("checkpoint.milestone_epochs", all(epoch >= 1 for epoch in checkpoint["milestone_epochs"]), "epochs from 1")
    return problems


def _demands(tree: dict[str, Any]) -> tuple[list[str], Callable[[str, bool, str], None]]:
    """A list of problems, and a function `demand(key, holds, expected)` that adds a line to it unless `holds`."""
    problems: list[str] = []

    def demand(key: str, holds: bool, expected: str) -> None:
        if not holds:
            got = tree
            for part in key.split("."):
                got = got[part]
            problems.append(f"{key}: expected {expected}, got {got!r}")

    return problems, demand


def _weights(tree: dict[str, Any], demand: Callable[[str, bool, str], None]) -> None:
    weights = tree["weights"]
    demand("weights", weights is None or tree["weights_digest"] is not None, "a file that exists and can be read")
    demand(
        "weights_digest",
        tree["weights_digest"] == (None if weights is None else file_digest(weights)),
        "this key left out; it follows from weights=FILE",
    )
    if weights is None:
        demand("format", tree["format"] is None, "null, because no weights=FILE is given")
    else:
        family, _, choice = (tree["format"] or FORMATS[0]).partition(":")
        expected = (
            f"null, to detect the format from the keys of weights={weights}, or one of {', '.join(FORMATS)}, optionally"
            " followed by :online or :twin"
        )
        demand("format", family in FORMATS and choice in ("", "online", "twin"), expected)


def _continued(tree: dict[str, Any], problems: list[str], demand: Callable[[str, bool, str], None]) -> None:
    """Checks the settings of a run that continues a finished one; in any other run they must be null."""
    run, schedule, before, epochs = (
        tree["continue_from"],
        tree["continued_schedule"],
        tree["continued_epochs"],
        tree["epochs"],
    )
    if run is None:
        for key in ("continued_schedule", "continued_run", "continued_epochs"):
            demand(key, tree[key] is None, "null, because no continue_from=RUN is given")
        return
    if before is None:
        demand("continue_from", False, "null: only caco.train can continue a run")
        return
    demand(
        "continued_schedule", schedule in ("restart", "planned"),
        "restart (a new schedule over the added epochs) or planned (the schedule of all epochs, from where RUN ended)",
    )  # fmt: skip
    demand("epochs", epochs > before, f"more than the {amount(before, 'epoch')} of {run}, which count too")
    if schedule == "restart" and before != int(before):
        problems.append(
            f"continued_schedule: {run} ended within an epoch, after {amount(before, 'epoch')}, and a new schedule can"
            " start only with a whole epoch; expected planned"
        )


def of_the_pretrained(tree: dict[str, Any]) -> list[str]:
    """Checks the plain values of conf/evaluate.yaml, conf/export.yaml and conf/embed.yaml."""
    problems, demand = _demands(tree)
    if (tree["run"] is None) == (tree["weights"] is None):
        got = "both" if tree["run"] else "neither"
        problems.append(f"expected run=RUN or weights=FILE, got {got}")
    _weights(tree, demand)
    if "layouts" in tree:
        demand("to", tree["to"] is not None, "the folder to write to, as to=FOLDER")
        demand(
            "layouts", bool(tree["layouts"]) and set(tree["layouts"]) <= set(EXPORTS), f"some of {', '.join(EXPORTS)}"
        )
        return problems + _stored_images(tree)
    demand("batch", tree["batch"] >= 1, "at least 1 image")
    demand("precision", tree["precision"] in ("bf16", "fp32"), "bf16 or fp32")
    demand("device", tree["device"] in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
    if "eval" in tree:
        demand("seed", 0 <= tree["seed"] < 2**32, "0 to 2**32 - 1")
        demand("overlap", tree["overlap"] in ("refuse", "allow"), "refuse or allow")
        demand("eval", bool(tree["eval"]), "at least one evaluator, as eval=[knn,linear]")
    else:
        demand(
            "to",
            (tree["to"] or "").endswith((".npz", ".parquet")),
            "the file to write to, as to=FILE.npz or to=FILE.parquet",
        )
        if (tree["to"] or "").endswith(".parquet") and not is_installed("pyarrow"):
            problems.append(
                f"to: a .parquet file needs pyarrow, which is not installed{to_install(package='pyarrow')}; or use"
                " to=FILE.npz"
            )
        unreadable = tree["loader"].get("corrupt", "fail") if isinstance(tree["loader"], dict) else "fail"
        if unreadable != "fail":
            problems.append(
                f"loader.corrupt: expected fail, got {unreadable!r}: an unreadable image would get the features of"
                " another image"
            )
    return problems


def _stored_images(tree: dict[str, Any]) -> list[str]:
    """Checks an export's data.channels, data.mean and data.std: given together, and only for weights from elsewhere."""
    channels, mean, std = (tree["data"][key] for key in ("channels", "mean", "std"))
    if channels is None and mean is None and std is None:
        return []
    if tree["run"] is not None:
        return ["data: a run has recorded channels, mean and std of its images; leave them out when you give run="]
    if channels is None or channels < 1 or not len(mean or ()) == len(std or ()) == channels:
        return [
            "data: expected data.channels=N together with data.mean and data.std of N values each, got"
            f" {channels}, {mean} and {std}"
        ]
    return []
