"""Tables (the paper's and our own) and scales: from the YAML files of both to the command of every run.

A table does not depend on a scale: each of its rows chooses a method and gives the paper's epochs, batch size and bank
size. A scale says which data, network and recipe all rows use, and by how much it shrinks the paper's sizes. This
module does not import torch.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caco import metrics
from caco.config import composition, folders, refusals, schema, validation
from caco.errors import UserError
from caco.runs.identity import is_neutral, plain, read_yaml, run_hash

HERE = Path(__file__).parent
SCALED = ("epochs", "batch", "bank")


@dataclass
class Row:
    """One row of a table.

    Args:
        label: the row's name as the paper prints it.
        epochs, batch, bank: the paper's sizes; bank in rows. null: the method has no bank, or the paper does not say.
        run: overrides of caco.train that choose the method; null if caco does not implement the method.
        after: overrides applied after the scale's, for a row that studies a setting which the scale also sets.
        published: the paper's numbers by column.
        columns: the columns for which the row's runs are evaluated; null for all.
        note: what a reader must know about the row.
        seeds: the row's seeds; null for those of the scale or the table.
    """

    label: str = MISSING
    epochs: int | None = None
    batch: int | None = None
    bank: int | None = None
    run: list[str] | None = None
    after: list[str] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)
    columns: list[str] | None = None
    note: str | None = None
    seeds: list[int] | None = None


@dataclass
class Table:
    """One table of the paper, or one of our own.

    Args:
        id: the name of its file, as table7.
        table: the paper's numeral, or a letter for our own.
        reference: the row against which gains are computed.
        columns: key and header of each column.
        compare: "difference" or, for times, "ratio": how a gain is computed.
        note: what a reader must know about the table.
    """

    id: str = MISSING
    table: str = MISSING
    title: str = MISSING
    reference: str = MISSING
    seeds: list[int] = MISSING
    columns: dict[str, str] = MISSING
    rows: dict[str, Row] = MISSING
    compare: str = "difference"
    note: str | None = None


@dataclass
class Scale:
    """The data, sizes and recipe with which the rows of a table are trained.

    Args:
        like: another scale to start from. Its overrides come before this scale's; its other settings hold unless this
            scale sets them.
        times: factors by which the paper's epochs, batch and bank are multiplied.
        exactly: epochs, batch or bank in numbers, instead of the paper's times a factor.
        overrides: overrides of caco.train for every row, applied after the row's own.
        where: further overrides for the rows that contain a given override, as `pn=both`.
        toy_sets: a folder that some overrides name as a data root. Toy sets are drawn into it before the first run
            that reads it (experiments/toy_sets).
        without: for a given override, the reason why rows that contain it cannot be run at this scale.
        seeds: these seeds instead of the table's.
        metrics: the metrics that we measure for each column of the table, the main metric first.
        same_as_paper: whether data, recipe and metric are the paper's, so that our numbers can be compared with its
            numbers.
        controls: by TABLE/ROW, what others published for exactly that run.
        theirs: by column and override (as `method=byol`), what others published for the recipe of this scale.
        theirs_are: the heading of the column with these numbers.
    """

    id: str = MISSING
    title: str = MISSING
    like: str | None = None
    times: dict[str, float] = field(default_factory=dict)
    exactly: dict[str, int] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    where: dict[str, list[str]] = field(default_factory=dict)
    toy_sets: str | None = None
    without: dict[str, str] = field(default_factory=dict)
    seeds: list[int] | None = None
    metrics: dict[str, list[str]] = field(default_factory=dict)
    same_as_paper: bool = False
    controls: dict[str, str] = field(default_factory=dict)
    theirs: dict[str, dict[str, float]] = field(default_factory=dict)
    theirs_are: str = "theirs"

    def evaluator_of(self, metric: str) -> str | None:
        """The overrides that choose the evaluator of a metric, with the settings that this scale gives that evaluator;
        None if no evaluator measures the metric.
        """
        protocol = metrics.protocol_of(metric)
        overrides = [*self.overrides, *(override for further in self.where.values() for override in further)]
        for option in folders.groups()["eval"]:
            file = folders.option_file("eval", option)
            assert file is not None, "`groups` lists files"
            text = file.read_text(encoding="utf-8")
            package = text.partition("# @package ")[2].partition("\n")[0].strip()  # knn_all has the package eval.knn
            own = [override for override in overrides if override.startswith(f"{package}.")]
            given = OmegaConf.from_dotlist([override.removeprefix(f"{package}.") for override in own])
            known = metrics.protocols(plain(DictConfig(OmegaConf.merge(OmegaConf.create(text), given))))
            if protocol in (known or [option]):  # a user's evaluator may not declare its protocols; then go by name
                return " ".join([f"eval=[{option}]", *own])
        return None


def _files(pattern: str) -> dict[str, Path]:
    """Files by name: those of this folder, and those in DIR/experiments for each --config-dir DIR.

    Raises:
        UserError: two files have the same name.
    """
    found: dict[str, Path] = {}
    for folder in (HERE, *(own / "experiments" for own in folders.own())):
        for path in sorted(folder.glob(pattern)):
            if found.setdefault(path.stem, path) != path:
                raise UserError(f"{path}: {found[path.stem]} has the same name already; give yours another name")
    return dict(sorted(found.items()))


def tables() -> list[str]:
    return list(_files("*.yaml"))


def scales() -> list[str]:
    return list(_files("scale/*.yaml"))


def _pick(kind: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise UserError(
            f"{kind} {name}: no such {kind}{refusals.nearest(name, known) or '.'} There are: {', '.join(known)}"
        )
    return name


def _read(path: Path, schema: type, **more: Any) -> Any:
    """Read a YAML file as an object of the dataclass `schema`.

    Raises:
        UserError: a key is unknown or missing, or has a value of the wrong type.
    """
    try:
        content = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path), more)
        missing = sorted(OmegaConf.missing_keys(content))
        if missing:
            raise UserError(f"{path}: {', '.join(missing)}: must be given")
        return OmegaConf.to_object(content)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def load_table(name: str) -> Table:
    """Load a table by its name, as table7, 7, rivals or negatives.

    Raises:
        UserError: there is no such table, or its file has a mistake.
    """
    name = _pick("table", f"table{name}" if name.isdigit() else name, tables())
    path = _files("*.yaml")[name]
    table = _read(path, Table, id=name)
    _pick_in(path, "reference", table.reference, table.rows)
    for row in table.rows.values():
        for column in (*row.published, *(row.columns or ())):
            _pick_in(path, "published, columns", column, table.columns)
    return table


def _pick_in(path: Path, key: str, name: str, known: Any) -> None:
    if name not in known:
        raise UserError(f"{path}: {key}: expected one of {', '.join(known)}, got {name}")


def load_scale(name: str) -> Scale:
    """Load a scale by its name.

    Raises:
        UserError: there is no such scale, or its file has a mistake.
    """
    path = _files("scale/*.yaml")[_pick("scale", name, scales())]
    scale: Scale = _read(path, Scale, id=name)
    for key in {**scale.times, **scale.exactly}:
        _pick_in(path, "times, exactly", key, SCALED)
    if scale.like is None:
        return scale
    given = read_yaml(path)
    base = load_scale(scale.like)
    for key in Scale.__dataclass_fields__:
        if key not in given and key != "id":
            setattr(scale, key, getattr(base, key))
    scale.overrides = [*base.overrides, *given.get("overrides", [])]
    return scale


@dataclass(frozen=True)
class Experiment:
    """One row of a table at a scale. Together with a seed it makes a run."""

    table: Table
    row_id: str
    scale: Scale
    further: tuple[str, ...] = ()  # overrides from the command line, which cannot change a result

    @property
    def row(self) -> Row:
        return self.table.rows[self.row_id]

    @property
    def name(self) -> str:
        return f"{self.table.id}/{self.row_id}"

    @property
    def seeds(self) -> list[int]:
        return self.row.seeds or self.scale.seeds or self.table.seeds

    @cached_property
    def why_not(self) -> str | None:
        """Why the row cannot be run at this scale, or None if it can."""
        if self.row.run is None:
            return f"caco has no {self.row.label}; the number is cited"
        return next((why for override, why in self.scale.without.items() if override in self.row.run), None)

    def theirs(self, column: str) -> float | None:
        """The number that others published for this row with the scale's recipe; None if there is none."""
        by_override = self.scale.theirs.get(column, {})
        return next((value for override, value in by_override.items() if override in (self.row.run or ())), None)

    def sized(self, key: str) -> int | None:
        """The row's epochs, batch or bank at this scale; None if the row gives none."""
        published = getattr(self.row, key)
        if published is None:
            return None
        return self.scale.exactly.get(key) or max(
            2 if key == "batch" else 1, round(published * self.scale.times.get(key, 1.0))
        )

    def overrides(self, seed: int) -> list[str]:
        """The overrides for caco.train. If several set the same key, only the last one is kept."""
        sizes = {"epochs": self.sized("epochs"), "batch": self.sized("batch"), "bank.size": self.sized("bank")}
        parts = [
            f"name={self.scale.id}",
            *(self.row.run or ()),
            *(f"{key}={size}" for key, size in sizes.items() if size is not None),
            *self.scale.overrides,
            *(
                extra
                for override, extras in self.scale.where.items()
                if override in (self.row.run or ())
                for extra in extras
            ),
            *self.row.after,
            *self.further,
            *self._shown_beside(),
            f"seed={seed}",
        ]
        by_key: dict[str, str] = {}
        for override in parts:
            key = override.lstrip("+").partition("=")[0]
            by_key.pop(key, None)
            by_key[key] = override
        return list(by_key.values())

    def _shown_beside(self) -> list[str]:
        """The override that makes MLflow show the row's published values beside ours.

        Empty unless the user chose tracking=mlflow and the scale has the paper's data, recipe and metric.
        """
        by_metric = {
            metric: value
            for column, value in self.row.published.items()
            for metric in self.scale.metrics.get(column, [])[:1]
        }
        if not (by_metric and self.scale.same_as_paper and "tracking=mlflow" in self.further):
            return []
        return [f"tracking.paper={{{', '.join(f'{metric}: {value}' for metric, value in by_metric.items())}}}"]

    @cached_property
    def cfg(self) -> DictConfig:
        """The configuration of the row's first seed, composed and validated, without Hydra's own node.

        Raises:
            UserError: the configuration is not valid; one line per problem.
        """
        overrides = self.overrides(self.seeds[0])
        try:
            return _composed(tuple(overrides))
        except (*refusals.COMPOSITION_ERRORS, UserError) as error:
            why = str(error) if isinstance(error, UserError) else refusals.explain(error, overrides)
            raise UserError(f"{self.name} at scale {self.scale.id}: {why}") from error

    def with_seed(self, seed: int) -> DictConfig:
        return _with_seed(self.cfg, seed)

    def hash(self, seed: int) -> str:
        """The hash of the run with this seed: equal for two runs only if all settings that can change a result are."""
        self.cfg  # noqa: B018 - raises a readable UserError if the configuration does not compose
        return _hash(tuple(self.overrides(self.seeds[0])), seed)

    def command(self, seed: int | str | None = None) -> str:
        """The command that runs this row. `seed` is one seed, or several as "0,1"; None for all."""
        words = [
            "python -m experiments.run",
            *folders.flag(),
            self.table.id,
            f"scale={self.scale.id}",
            f"rows={self.row_id}",
        ]
        words += [f"seed={seed}"] if seed is not None else []
        words += ["data.root=PATH"] if "root" in self.cfg.data and self.cfg.data.root is None else []
        return " ".join(words)


@functools.cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    """Compose and validate a configuration. Cached, because this takes half a second."""
    cfg = composition.compose(list(overrides))
    hydra_cfg = cfg.hydra
    validation.check(cfg, overrides=list(hydra_cfg.overrides.task), choices=dict(hydra_cfg.runtime.choices))
    return composition.job_config(cfg)


@functools.cache
def _hash(overrides: tuple[str, ...], seed: int) -> str:
    return run_hash(_with_seed(_composed(overrides), seed))


def _with_seed(cfg: DictConfig, seed: int) -> DictConfig:
    cfg = cfg.copy()
    cfg.seed = seed
    return cfg


def experiments(
    table: Table, scale: Scale, *, rows: Sequence[str] | None = None, further: Sequence[str] = ()
) -> Iterator[Experiment]:
    """The rows of a table at a scale, in the table's order.

    Args:
        rows: only these rows; None for all.
        further: overrides from the command line, which must not be able to change a result.
    Raises:
        UserError: there is no such row, or an override could change a result.
    """
    for row in rows or ():
        _pick("row", row, list(table.rows))
    for override in further:
        key = re.split("[=@]", override.lstrip("+~"))[0]
        root, known = key.partition(".")[0], {*schema.Root.__dataclass_fields__, *refusals.groups()}
        if root not in known:
            raise UserError(f"{override}: no such key{refusals.nearest(root, known)}")
        if not is_neutral(key):
            raise UserError(
                f"{override}: could change a number, and then this would not be scale {scale.id} any more; make a scale"
                " with it, experiments/scale/NAME.yaml"
            )
    return (Experiment(table, id, scale, tuple(further)) for id in table.rows if rows is None or id in rows)
