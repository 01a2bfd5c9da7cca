"""Every refusal that needs neither torch nor data; it comes before either is loaded.

The root's types come from its schema. Each component's keys are checked against the signature of its `_target_`. Plain
values are checked against each other. A choice on the command line that something later undoes is refused, not ignored.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from caco import metrics
from caco.config import channels_needed, folders, no_effect, signatures, views_needed
from caco.config.annotations import argument_mismatches, mismatches
from caco.config.schema import COMPONENTS, AnyRoot, Root
from caco.errors import UserError
from caco.installed import is_installed, to_install
from caco.redaction import OF_SECRETS, holds_secret, names_secret, shortened
from caco.runs import renamed
from caco.runs.identity import file_digest, flat, plain
from caco.saying import amount

FORMATS = (  # of weights files, read by caco/nn/formats.py
    "caco", "adco", "moco", "torchvision", "timm", "transformers", "vissl", "dino", "dinov2", "lightly",
    "stable_pretraining", "solo",
    "instdisc", "pycontrast", "pcl", "mocov3", "simsiam", "swav", "barlow", "vicreg", "simclr", "sela", "mmselfsup",
    "byol",
)  # fmt: skip
EXPORTS = ("safetensors", "timm", "torchvision", "detectron2")  # written by caco/export.py
# Plain values that are never set in YAML, because another component or the data determine them.
SUPPLIED = {"projector": ("in_dim",), "method": ("num_images",), "backbone": ("in_channels",)}


def check(
    cfg: DictConfig, *, overrides: Sequence[str] = (), choices: Mapping[str, Any] | None = None, root: AnyRoot = Root
) -> None:
    """Refuse a configuration that cannot be run.

    Args:
        cfg: the composed configuration; Hydra's own settings are ignored.
        overrides: the command line, to report which of its words would have no effect.
        choices: group -> option, from Hydra.
        root: the schema that cfg was composed with.

    Raises:
        UserError: one line per problem, with the key, the expected value and the given one.
    """
    try:
        tree = plain(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise UserError("a setting refers to itself through a circle of ${...}; write its value out") from error
    if missing := sorted(key for key, value in flat(tree).items() if value == "???"):
        raise UserError("\n".join(f"{key}: must be given, as {key}=..." for key in missing))
    problems = _shape(tree, root) + _senseless(tree)
    if not problems:
        values = _root(tree) if root is Root else _root_of_the_pretrained(tree)
        problems = (
            values + _components(tree) + _not_installed(tree) + no_effect.problems(tree, overrides, choices or {})
        )
        problems = problems or _of_one_name(tree.get("eval", {})) + (
            views_needed.early_problems(tree) if root is Root else []
        )
        problems = problems or channels_needed.problems(tree, overrides)
    if problems:
        raise UserError("\n".join(problems))


def _senseless(tree: dict[str, Any]) -> list[str]:
    """Values that make no sense in any setting. Also covers the user's own components, whose arguments declare no
    range.
    """
    problems = []
    for key, value in flat(tree).items():
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{key}: expected a finite number, got {value}")
        elif isinstance(value, int) and not -(2**32) < value < 2**32:
            problems.append(f"{key}: expected a number below 2**32, got {shortened(value, 40)}")
        elif not isinstance(value, str):
            continue
        elif not value and not key.startswith("launcher.sbatch."):
            problems.append(
                f"{key}: expected a value, got an empty text. Is a shell variable unset? To set nothing, write null"
            )
        elif "\0" in value:
            problems.append(f"{key}: expected text without NUL characters, got {shortened(value, 60)}")
        elif names_secret(key.rpartition(".")[2]) or holds_secret(value):
            problems.append(f"{key}: {OF_SECRETS}")
    return problems


def _shape(tree: dict[str, Any], root: AnyRoot) -> list[str]:
    """Checks that the root has exactly its own keys, and a component wherever one belongs."""
    known = list(root.__dataclass_fields__)
    problems = []
    for key in tree.keys() - set(known):
        near = difflib.get_close_matches(key, known, n=1)
        problems.append(f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else ""))
    problems += [f"{key}: is missing" for key in known if key not in tree]
    for key, field in root.__dataclass_fields__.items():
        inner = getattr(field.default_factory, "__dataclass_fields__", {})  # schedule, warm_start, checkpoint
        if isinstance(tree.get(key), dict):
            problems += [f"{key}.{name}: is missing" for name in inner if name not in tree[key]]
    taken = signatures.find(f"{root.__module__}.{root.__name__}")
    assert taken is not None
    # OmegaConf checks types when it composes, but not those of items of lists, nor of a list that ${...} stands for.
    problems += [
        line
        for key, parameter in taken.parameters.items()
        if key in tree
        for line in mismatches(tree[key], parameter.annotation, taken.module, key)
    ]
    structured = [
        key
        for key, field in root.__dataclass_fields__.items()
        if hasattr(field.default_factory, "__dataclass_fields__")
    ]
    for key in COMPONENTS:
        if (
            key in known
            and key not in structured
            and key in tree
            and not (isinstance(tree[key], dict) and "_target_" in tree[key])
        ):
            problems.append(f"{key}: expected a component with a _target_, got {shortened(tree[key], 60)}")
    if tree.get("bank") is not None and not (isinstance(tree["bank"], dict) and "_target_" in tree["bank"]):
        problems.append(
            f"bank: expected a component with a _target_, or null, got {shortened(tree['bank'], 60)}; the file of a"
            " method without a bank says bank: null, as conf/method/simclr.yaml does"
        )
    if tree.get("negatives") is not None and not (
        isinstance(tree["negatives"], dict) and "_target_" in tree["negatives"]
    ):
        problems.append(
            "negatives: expected a treatment of negatives with a _target_, or null for plain ones, got"
            f" {shortened(tree['negatives'], 60)}"
        )
    if tree.get("launcher") is not None and not (isinstance(tree["launcher"], dict) and "_target_" in tree["launcher"]):
        problems.append(f"launcher: expected none, local or slurm, got {shortened(tree['launcher'], 60)}")
    evaluators = tree.get("eval", {} if "eval" not in known else None)
    if not isinstance(evaluators, dict):
        problems.append(f"eval: expected evaluators by name, as eval=[knn,probe], got {shortened(evaluators, 60)}")
    else:
        for name, part in evaluators.items():
            if not (isinstance(part, dict) and "_target_" in part):
                problems.append(f"eval.{name}: expected an evaluator with a _target_, got {shortened(part, 60)}")
    return problems


def _root(tree: dict[str, Any]) -> list[str]:
    """Checks the plain values of a training. Refuses what cannot work, not what is unusual; whatever depends on the
    data is checked once the data are known."""
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


def _root_of_the_pretrained(tree: dict[str, Any]) -> list[str]:
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


def _components(node: Any, path: str = "") -> list[str]:
    """Checks that every `_target_` in the tree exists and takes the arguments that stand beside it."""
    if isinstance(node, list):
        return [line for number, item in enumerate(node) for line in _components(item, f"{path}.{number}")]
    if not isinstance(node, dict):
        return []
    problems = _component(node, path) if "_target_" in node else []
    for key, value in node.items():
        problems += _components(value, f"{path}.{key}" if path else str(key))
    return problems


def _component(part: dict[str, Any], path: str) -> list[str]:
    target = part["_target_"]
    if not isinstance(target, str) or "." not in target:
        return [f"{path}._target_: expected a dotted path to a class or function, got {target!r}"]
    if (new := renamed.target(target)) != target:
        return [f"{path}._target_: {target} is now called {new}; use that name"]
    module_name, _, name = target.rpartition(".")
    module = signatures.load(module_name)
    if module is None:
        if signatures.load(module_name.partition(".")[0]) is None:
            return [f"{path}._target_: {target} is not installed here{folders.lacks(module_name)}"]
        return [f"{path}._target_: cannot find or read the module {module_name} of {target}"]
    if signatures.lookup(module, name) is None:
        near = difflib.get_close_matches(name, [*module.nodes, *module.imports], n=1)
        return [f"{path}._target_: no {name} in {module_name}" + (f"; did you mean {near[0]}?" if near else "")]
    taken = signatures.find(target)
    given = {key: value for key, value in part.items() if key != "_target_"}
    return argument_mismatches(given, taken, path, name, SUPPLIED.get(path, ())) if taken else []


def _of_one_name(evaluators: dict[str, Any]) -> list[str]:
    """One line for each evaluator whose results would get the same name as another one's."""
    first: dict[str, str] = {}
    given = [(name, protocol) for name, node in evaluators.items() for protocol in metrics.protocols(node)]
    return [
        f"eval.{name}: its results would be called {protocol}, the same as those of eval.{first[protocol]}: leave one"
        " of them out, or give it other settings"
        for name, protocol in given
        if first.setdefault(protocol, name) != name
    ]


def missing_package(tracking: Mapping[str, Any]) -> str | None:
    """The package that the chosen tracker needs (caco/tracking/base.py: `package`) and that is not installed; None if
    nothing is missing.
    """
    package = signatures.declared(str(tracking.get("_target_")), "package")
    return None if package is None or is_installed(package) else package


def _not_installed(tree: dict[str, Any]) -> list[str]:
    """One line if the tracker's package is missing. Without MLflow, mlflow is chosen only by a user who names it
    (composition.py: installed_tracking).
    """
    package = missing_package(tree.get("tracking", {}))
    if package is None:
        return []
    name, how = ("MLflow", to_install("mlflow")) if package == "mlflow" else (package, to_install(package=package))
    return [
        f"tracking={package}: {name} is not installed{how}; or leave tracking out: "
        "the ledger keeps everything, and python -m caco.tracking.sync can send it later"
    ]
