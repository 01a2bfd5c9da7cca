"""The table of all renamed things, through which runs and records of earlier versions appear under today's names.

A commit that renames a configuration key, the target of a `_target_`, a metric or a kind of row must add a line here.
All renames since commit a06a4e7 are listed. tests/old_runs holds runs made by an earlier version; a rename that none of
them shows needs one more such run. A checkpoint of an earlier version cannot be continued under new names, so
continuing is refused (caco/runs/directory.py).
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caco import metrics
from caco.runs.files import read_json
from caco.runs.identity import flat, plain, read_recorded, run_hash

# Targets of `_target_`: a single class or function, or a module with everything in it.
TARGETS = {
    "caco.annotations": "caco.config.annotations",
    "caco.banks.fused": "caco.banks.kernels.fused",
    "caco.banks.triton_kernels": "caco.banks.kernels.triton_kernels",
    "caco.build": "caco.engine.assembly",
    "caco.checkpoint": "caco.runs.checkpoint",
    "caco.data.batches": "caco.data.loaders.batches",
    "caco.data.beton": "caco.data.sets.beton",
    "caco.data.datasets": "caco.data.sets.folders",
    "caco.data.downloaded": "caco.data.sets.downloaded",
    "caco.data.ffcv_pipeline": "caco.data.loaders.ffcv_pipeline",
    "caco.data.imagenet100": "caco.data.sets.imagenet100",
    "caco.data.loader.AutoLoader": "caco.data.loaders.ffcv_loader.AutoLoader",
    "caco.data.loader.Batch": "caco.data.loaders.batches.Batch",
    "caco.data.loader.BoundLoader": "caco.data.loaders.bound.BoundLoader",
    "caco.data.loader.FFCVLoader": "caco.data.loaders.ffcv_loader.FFCVLoader",
    "caco.data.loader.TorchLoader": "caco.data.loaders.torch_loader.TorchLoader",
    "caco.data.loader.plain_batches": "caco.data.loaders.plain.plain_batches",
    "caco.data.native": "caco.data.views.native",
    "caco.data.overlap": "caco.data.sets.overlap",
    "caco.data.sources": "caco.data.sets.sources",
    "caco.data.transfer": "caco.data.sets.transfer",
    "caco.data.views": "caco.data.views.augmentation",
    "caco.data.write": "caco.write",
    "caco.launchers.Local": "caco.launch.local.Local",
    "caco.launchers.Slurm": "caco.launch.slurm.Slurm",
    "caco.methods.contrastive.Outputs": "caco.methods.base.Outputs",
    "caco.optimizers": "caco.engine.optimizers",
    "caco.optimizers.lars": "caco.engine.optimizers.lars_timm",  # the name lars now means the published optimiser
    "caco.preemption": "caco.engine.preemption",
    "caco.pretrained": "caco.config.pretrained",
    "caco.progress": "caco.engine.progress",
    "caco.refusals": "caco.config.refusals",
    "caco.results": "caco.evals.record",
    "caco.signatures": "caco.config.signatures",
    "caco.snapshot": "caco.launch.snapshot",
    "caco.sweep": "caco.launch.sweep",
    "caco.tracking.environment": "caco.runs.environment",
    "caco.tracking.files": "caco.runs.files",
    "caco.trainer": "caco.engine.trainer",
    "caco.validation": "caco.config.validation",
    "caco.weights": "caco.nn.weights",
}
KEYS = {
    "bank.filling_passes": "method.warm_start_passes",
    "bank_learning.filling_passes": "warm_start.passes",
    "method.filling_momentum": "method.warm_start_momentum",
    "method.filling_temperature": "method.warm_start_temperature",
}
# Arguments that conf/ sets explicitly now; earlier runs left them at these defaults.
NAMED_SINCE = {"caco.methods.nnclr.NNCLR": {"warm_start_temperature": 0.2}}
ROW_KINDS = {"filling": "warm_start"}
ROW_VALUES = {"momentum": "twin_momentum"}  # values in rows of the kinds train and filling


def _former_protocols(evaluator: Mapping[str, Any]) -> list[str]:
    """The names that commit a06a4e7 gave to the protocols of an evaluator, in the order of `metrics.protocols`: for
    example knn for k-NN with any k.
    """
    kind = evaluator["_target_"].rpartition(".")[2]
    fractions = evaluator.get("fractions", [1.0])
    if kind == "FineTune" and len(fractions) > 1:
        return [f"{evaluator['name']}_{100 * fraction:g}" for fraction in fractions]
    named = {"Linear": evaluator.get("name", "linear"), "FineTune": evaluator.get("name", "finetune")}
    return [named.get(kind, kind.lower())]


def _before_last_batches(evaluator: Mapping[str, Any]) -> list[str]:
    """The protocol names of the versions after a06a4e7 for `Linear`. They left out a smaller last batch, and the names
    did not say so.
    """
    return (
        metrics.protocols({"drop_last": False, **evaluator})
        if evaluator["_target_"] == "caco.evals.linear.Linear"
        else []
    )


# Reading a run with this table.


def target(name: str) -> str:
    """Today's name of a `_target_`."""
    module, _, attribute = name.rpartition(".")
    return TARGETS.get(name) or (f"{TARGETS[module]}.{attribute}" if module in TARGETS else name)


def config(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration with today's names, as dicts and lists; `recorded` is not changed."""
    tree = copy.deepcopy(dict(recorded))
    _rename_targets(tree)
    for old, new in KEYS.items():
        _move(tree, old, new)
    if tree == recorded:
        return tree
    method, bank = (part if isinstance(part, dict) else {} for part in (tree.get("method"), recorded.get("bank")))
    for key, value in NAMED_SINCE.get(method.get("_target_", ""), {}).items():
        method.setdefault(key, value)
    # A single pass was the default and is today's meaning of null. A bank of random rows had a number of passes in its
    # configuration but made none.
    if str(bank.get("filling_passes")) == "1" or ("filling_passes" in bank and bank["initialisation"] != "keys"):
        del method["warm_start_passes"]
    return tree


def _rename_targets(node: Any) -> None:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key == "_target_" and isinstance(value, str):
            node[key] = target(value)
        _rename_targets(value)


def _move(tree: dict[str, Any], old: str, new: str) -> None:
    part, _, name = old.partition(".")
    if isinstance(tree.get(part), dict) and name in tree[part]:
        to_part, _, to_name = new.partition(".")
        tree.setdefault(to_part, {})[to_name] = tree[part].pop(name)


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration whose `flat` leaves these are. A name that is also the start of another's is left out, because
    MLflow's parameters include the chosen options."""
    tree: dict[str, Any] = {}
    for name in sorted(leaves, key=len, reverse=True):
        *parts, last = name.split(".")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node.setdefault(last, leaves[name])
    return _with_lists(tree)


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node and all(key.isdigit() for key in node):
        return [_with_lists(node[key]) for key in sorted(node, key=int)]
    return {key: _with_lists(value) for key, value in node.items()}


def read_config(run_dir: Path) -> dict[str, Any]:
    """The content of config.yaml with today's names; {} if there is no such file."""
    return config(_recorded_config(run_dir))


def is_old(run_dir: Path) -> bool:
    """Whether the run was made by a version that used another name for anything in its configuration."""
    recorded = _recorded_config(run_dir)
    return config(recorded) != recorded


def _recorded_config(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "config.yaml"
    return plain(read_recorded(file)) if file.is_file() else {}


class Names:
    """Reads one run, and gives everything that its version called otherwise today's name.

    The name of a metric may not tell its protocol. It is then renamed by the configuration of the evaluator that gave
    the number. For evaluations while training, that is in the run's configuration; for those afterwards, it is in their
    file below evaluations/. If that file is gone, the old name stays.

    Args:
        recorded: the run's configuration as it was recorded.
        evaluations: the contents of its evaluations/*.json.
    """

    def __init__(self, recorded: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]] = ()) -> None:
        self.config = config(recorded)
        self.is_old = self.config != recorded
        self._protocols = _renames((self.config.get("eval") or {}).values())
        self._evaluations = [(one, _renames([one["made_from"]["evaluator"]])) for one in evaluations]

    @classmethod
    def of(cls, run_dir: Path) -> "Names":
        """The names of the run in this directory."""
        files = sorted((run_dir / "evaluations").glob("*.json"))
        return cls(_recorded_config(run_dir), [one for one in map(read_json, files) if "made_from" in one])

    @staticmethod
    def params(recorded: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of tracking.json: the chosen options, and the leaves of the configuration, as text."""
        options = {
            name: value for name, value in recorded.items() if any(other.startswith(f"{name}.") for other in recorded)
        }
        rest = {name: value for name, value in recorded.items() if name not in options}
        return {**options, **flat(config(nested(rest)))}

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the ledger, with today's names."""
        if row["kind"] == "eval":
            # Only rows of evaluations while training have "epochs".
            new = _of_training(row, self._protocols) if "epochs" in row else self._of_evaluations(row, row["step"])
        elif self.is_old and row["kind"] in ("train", *ROW_KINDS):
            new = {old: name for old, name in ROW_VALUES.items() if name not in row}
        else:
            new = {}
        return {new.get(k, k): ROW_KINDS.get(v, v) if k == "kind" and self.is_old else v for k, v in row.items()}

    def summary(self, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A run's final values, with today's names.

        Args:
            rows: of its ledger, as recorded. They tell what training measured: up to a06a4e7, a later evaluation with
                another protocol replaced that value in the summary. Without rows, the summary's values are taken to be
                training's.
        """
        measured = {k: v for row in rows if row["kind"] == "eval" and "epochs" in row for k, v in row.items()}
        trained = {
            old: new for old, new in _of_training(summary, self._protocols).items() if not rows or old in measured
        }
        evaluated = self._of_evaluations(summary, summary.get("steps"))
        values = {new: measured.get(old, summary[old]) for old, new in trained.items()}
        for name, value in summary.items():
            if name not in trained or values[trained[name]] != value:
                values.setdefault(evaluated.get(name, name), value)
        return self.with_hash(values)

    def with_hash(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a summary, or of tracking.json's tags, with the hash that the configuration has today."""
        return (
            {**values, "config_hash": run_hash(self.config)}
            if self.is_old and "config_hash" in values
            else dict(values)
        )

    def _of_evaluations(self, values: Mapping[str, Any], step: int | None) -> dict[str, str]:
        """Old name -> new name, for the values that an evaluation after training gave."""
        found = {}
        for one, protocols in self._evaluations:
            for old, new in _of_training(one["results"], protocols).items():
                for name, value in values.items():
                    prefix = name.removesuffix(old)
                    is_its = (
                        name.endswith(old) and (prefix == "" or prefix.endswith("/")) and value == one["results"][old]
                    )
                    baseline = next((of.rstrip("/") for of in metrics.BASELINES if prefix.startswith(of)), None)
                    if is_its and one["step"] == step and one["baseline"] == baseline:
                        found[name] = prefix + new
        return found


def results(values: Mapping[str, Any], evaluator: Mapping[str, Any]) -> dict[str, Any]:
    """The results of an evaluator with this configuration, with today's names."""
    new = _of_training(values, _renames([evaluator]))
    return {new.get(name, name): value for name, value in values.items()}


def _renames(evaluators: Any) -> dict[str, str]:
    """Former protocol -> today's protocol, for those that were renamed."""
    formerly = (_former_protocols, _before_last_batches)
    pairs = [zip(former(one), metrics.protocols(one), strict=False) for one in evaluators for former in formerly]
    return {old: new for of_one in pairs for old, new in of_one if old != new}


def _of_training(values: Mapping[str, Any], protocols: Mapping[str, str]) -> dict[str, str]:
    """Old name -> new name, for the values named by a former protocol. If the new name is present too, it belongs to a
    newer version, and the value is not renamed.
    """
    found = {}
    for name in values:
        protocol = metrics.protocol_of(name)
        new = protocols.get(protocol, protocol) + name.removeprefix(protocol)
        if new != name and new not in values:
            found[name] = new
    return found
