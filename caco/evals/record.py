"""Stores the results of an evaluation: a file for each result, rows in the ledger, and the summary."""

import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from caco import metrics
from caco.config import folders
from caco.errors import UserError
from caco.evals.evaluation import Evaluation
from caco.evals.feature_files import key_of
from caco.runs import renamed
from caco.runs.directory import command
from caco.runs.environment import environment
from caco.runs.files import read_json, write_json
from caco.runs.identity import flat, is_neutral, plain, run_hash
from caco.tracking import recorded
from caco.tracking.base import Tracker
from caco.tracking.ledger import Ledger
from caco.tracking.sync import last_status


class Record:
    """The results of one evaluation command in a directory.

    evaluations/NAME-KEY.json holds an evaluator's results and everything that decides them, of which KEY is a hash. So
    a repeated evaluation takes its results from that file. Ledger, MLflow and summary.json get the same numbers under
    these names:

    - NAME for results on the run's own data;
    - DATA/NAME for another data set, or DATA-DIGEST/NAME if the data set is the same but its images are others;
    - DATA-DIGEST/NAME in a folder that is not a run's, if the images differ from the first ones evaluated there;
    - SET-DIGEST/NAME for an evaluator's own set, if this directory first knew other images under the set's name;
    - untrained/NAME and pixels/NAME for the baselines.

    Results that training measured at this step are kept. If an evaluation with the same protocol gives another number,
    because of another seed, precision or batch, that number is only in its file.

    Args:
        results_dir: the directory for the results.
        cfg: configuration of the evaluation.
        tracker: as in training.
        step: step of the checkpoint.
        path: the file that is evaluated.
        is_run: whether results_dir is the run's own directory.
    """

    def __init__(
        self, results_dir: Path, cfg: DictConfig, *, tracker: Tracker, step: int, path: Path, is_run: bool
    ) -> None:
        self.dir, self.cfg, self.tracker, self.step, self.path = results_dir, cfg, tracker, step, path
        self.is_run = is_run
        self.results: dict[str, float] = {}
        self._environment = environment() | folders.record()
        self._of_training: dict[str, Any] = {}
        self._images: dict[str, str | None] = {}
        self._sets_of: dict[str, dict[str, str]] = {}

    def open(self) -> str:
        """Open the ledger to append to it; returns the status that the run had.

        Raises:
            UserError: the directory is not a run's own and holds results of other weights.
        """
        if not self.is_run:
            self._refuse_other_weights()
        about = read_json(self.dir / "tracking.json")
        status = last_status(self.dir)[0] if about else "FINISHED"
        ledger = Ledger(self.dir / "ledger.jsonl")
        self._rows = recorded.read(self.dir).rows
        if self.is_run:  # only rows that training wrote have the number of epochs
            measured = [
                row for row in self._rows if row["kind"] == "eval" and row["step"] == self.step and "epochs" in row
            ]
            self._of_training = {name: value for row in measured for name, value in row.items()}
        self.tracker.start(
            self.dir,
            params=about.get("params", flat(self.cfg)),
            tags=about.get("tags", {**self._environment, "weights": str(self.path)}),
            run_name=about.get("run_name", self.dir.name),
            state={"rows": len(ledger)},
            sweep=about.get("sweep"),  # keeps a job of a sweep in its sweep
        )
        return "FINISHED" if status == "RUNNING" else status

    def _refuse_other_weights(self) -> None:
        file, ours = self.dir / "images.json", self._whose_weights()
        recorded = read_json(file)
        if recorded.setdefault("weights", ours) != ours:
            raise UserError(
                f"{self.dir} holds results of other weights than {self.path}, and names would be the same: choose"
                " another folder with to"
            )
        write_json(file, recorded)

    def _whose_weights(self) -> str:
        """The digest of a weights file from elsewhere, or the hash of a run, because its checkpoints are one series."""
        if self.cfg.get("weights") is not None:
            return str(self.cfg.weights_digest)
        folders_above = self.path.absolute().parents[:3]
        run_dir = next(folder for folder in folders_above if (folder / "config.yaml").is_file())
        return run_hash(renamed.read_config(run_dir))

    def close(self, status: str) -> None:
        self.tracker.finish(status, read_json(self.dir / "summary.json"))

    def made_from(self, name: str, evaluation: Evaluation, encoder: nn.Module) -> dict[str, Any]:
        """Everything that decides an evaluator's numbers, as plain values."""
        store, evaluator = evaluation.store, evaluation.evaluators[name]
        splits, views, node = store.splits, store.views, plain(self.cfg)["eval"][name]
        sources = {"pretrain": splits.pretrain, "train": splits.train, "test": splits.test}
        self._images = {split: None if source is None else source.digest() for split, source in sources.items()}
        self._sets_of[name] = evaluator.image_sets()
        return {
            "evaluator": (
                {k: v for k, v in node.items() if not is_neutral(f"eval.{name}.{k}")}
                | folders.code_of([node["_target_"]])
            ),
            "inputs": evaluator.inputs(),
            "encoder": store.digest_of(encoder),
            "images": {split: None if source is None else store.key_of(source) for split, source in sources.items()},
            "augmentation": plain(self.cfg)["augmentation"],
            "plain_view": [views.size, views.plain_crop, views.plain_interpolation],
            "precision": store.precision,
            "seed": self.cfg.seed,
            **({"corrupt": "skip"} if store.loader.corrupt == "skip" else {}),
        }

    def known(self, prefix: str, name: str, made_from: dict[str, Any]) -> bool:
        """Whether the same evaluation was done before. If so, its stored results become results of this command."""
        values = read_json(self._file(name, made_from)).get("results")
        if values is None:
            return False
        self._take(prefix, name, made_from, renamed.results(values, made_from["evaluator"]))
        return True

    def add(
        self, prefix: str, name: str, made_from: dict[str, Any], values: dict[str, float], *, seconds: float
    ) -> None:
        """Store one evaluator's results. After this returns, they survive even a kill of the process."""
        file = self._file(name, made_from)
        file.parent.mkdir(exist_ok=True)
        about = {
            "weights": str(self.path),
            "step": self.step,
            "baseline": prefix.rstrip("/") or None,
            "seconds": seconds,
        }
        of = {"time": time.time(), "command": command(), "environment": self._environment}
        write_json(file, {"results": values, **about, "made_from": made_from, **of})
        self._take(prefix, name, made_from, values)

    def _take(self, prefix: str, name: str, made_from: dict[str, Any], values: dict[str, float]) -> None:
        data, others = self._of_other_data(), self._of_other_sets(self._sets_of[name])
        named = {f"{prefix}{data}{_of_set(key, others)}{key}": value for key, value in values.items()}
        self.results |= named
        for key in named.keys() & self._of_training.keys():
            if named[key] != self._of_training[key]:
                print(
                    f"caco: {key}: training measured {self._of_training[key]:.6g}, which is kept; the {named[key]:.6g}"
                    f" of this evaluation is in {self._file(name, made_from)} only",
                    file=sys.stderr,
                )
        new = {key: value for key, value in named.items() if key not in self._of_training}
        if not new:
            return
        if not any(row["step"] == self.step and new.items() <= row.items() for row in self._rows):
            self.tracker.log(self.step, new, kind="eval")
        summary = self.dir / "summary.json"
        # An unfinished run has no summary yet, and an earlier checkpoint's results are not its final ones.
        if not self.is_run or (summary.exists() and read_json(summary).get("steps") == self.step):
            write_json(summary, {**recorded.read(self.dir).summary, **new})

    def _of_other_data(self) -> str:
        """The beginning of the results' names: "" for the images of the run's own evaluations, else DATA/ or
        DATA-DIGEST/. In a folder that is not a run's, "" is for the images of its first evaluation, else DATA-DIGEST/.
        """
        if not self.is_run:
            file, ours = self.dir / "images.json", {key: one for key, one in self._images.items() if one is not None}
            about = read_json(file)
            if "images" not in about:
                write_json(file, {**about, "images": ours})
            first = about.get("images", ours)
            others = [digest for split, digest in ours.items() if first.get(split, digest) != digest]
            return f"{self._data_name()}-{others[-1]}/" if others else ""
        if not (self.dir / "config.yaml").is_file():
            return ""
        recorded = read_json(self.dir / "images.json").get(
            "images", {}
        )  # digests by split; runs of earlier versions have none
        elsewhere = ("data.root", "data.download", "data.in_memory_mb", *(["data.labelled_root"] if recorded else []))
        theirs, ours = (
            {key: value for key, value in flat({"data": tree["data"]}).items() if key not in elsewhere}
            for tree in (renamed.read_config(self.dir), plain(self.cfg))
        )
        if theirs != ours:
            return f"{self._data_name()}/"
        differ = [found for split, found in self._images.items() if split in recorded and found != recorded[split]]
        return f"{self._data_name()}-{differ[-1]}/" if differ else ""

    def _of_other_sets(self, sets: dict[str, str]) -> dict[str, str]:
        """For each of an evaluator's own sets, the beginning of its results' names: "" for the images that this
        directory first knew under the set's name, else SET-DIGEST/.
        """
        file = self.dir / "images.json"
        about = read_json(file)
        first: dict[str, str] = dict(about.get("sets", {}))
        for read in (*about.get("epoch", {}).values(), *about.get("end", {}).values()):
            # The images that training used take precedence over those of other evaluations.
            first |= read if isinstance(read, dict) else {}
        if sets.keys() - first.keys():
            write_json(file, {**about, "sets": {**sets, **first}})
        return {name: "" if first.get(name, digest) == digest else f"{name}-{digest}/" for name, digest in sets.items()}

    def _data_name(self) -> str:
        return plain(self.cfg)["data"]["_target_"].rpartition(".")[2]

    def _file(self, name: str, made_from: dict[str, Any]) -> Path:
        return self.dir / "evaluations" / f"{name}-{key_of(made_from)}.json"

    def table(self) -> str:
        """The results as text, a line each, with columns for the baselines if there are any."""
        names = [name for name in self.results if not name.startswith(metrics.BASELINES)]
        columns = {"": "trained"} | {
            b: b.rstrip("/") for b in metrics.BASELINES if any(r.startswith(b) for r in self.results)
        }
        width = max(map(len, names))
        lines = [" " * width + "".join(f"{title:>12}" for title in columns.values())] if len(columns) > 1 else []
        for name in names:
            values = [self.results.get(f"{prefix}{name}") for prefix in columns]
            lines.append(f"{name:<{width}}" + "".join(f"{'' if v is None else f'{v:.6g}':>12}" for v in values))
        return "\n".join(lines)


def _of_set(key: str, beginnings: dict[str, str]) -> str:
    """The beginning of a result's name. If an evaluator has several sets, the last part of the name begins with the
    set, as in transfer/cars_top1.
    """
    measure = key.rpartition("/")[2]
    named = [name for name in beginnings if len(beginnings) == 1 or measure.startswith(f"{name}_")]
    return beginnings[max(named, key=len)] if named else ""
