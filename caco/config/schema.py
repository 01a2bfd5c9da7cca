"""The roots of the configuration: name and type of every setting that does not belong to a component."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class Schedule:
    warmup_epochs: float = MISSING
    warmup_start: float | None = MISSING
    warmup_end: str = MISSING
    final_fraction: float | None = MISSING
    final_lr: float | None = MISSING
    drops: list[float] = MISSING
    drop_factor: float = MISSING
    unit: str = MISSING
    final_weight_decay: float | None = MISSING
    clip_gradient_norm: float | None = MISSING
    clip_each_gradient_norm: float | None = MISSING


@dataclass
class WarmStart:
    steps: int | None = MISSING
    passes: int | None = MISSING


@dataclass
class Checkpoint:
    every_epochs: int = MISSING
    every_steps: int | None = MISSING
    keep: int = MISSING
    milestone_epochs: list[int] = MISSING


@dataclass
class Root:
    """The settings of conf/config.yaml, which has their values and meanings; only their types are given here.

    A component has the type Any: caco/config/components.py checks it against the signature of its `_target_`.
    """

    name: str = MISSING
    batch: int = MISSING
    epochs: int = MISSING
    max_steps: int | None = MISSING
    accumulate: int | None = MISSING
    norm_groups: Any = MISSING
    shuffle_keys: bool = MISSING
    seed: int = MISSING
    precision: str = MISSING
    compile: bool = MISSING
    device: str = MISSING
    weights: str | None = MISSING
    format: str | None = MISSING
    weights_digest: str | None = MISSING
    continue_from: str | None = MISSING
    continued_schedule: str | None = MISSING
    continued_run: str | None = MISSING
    continued_epochs: float | None = MISSING
    derived: list[str] = MISSING
    config_dir: str | None = MISSING
    schedule: Schedule = field(default_factory=Schedule)
    warm_start: WarmStart = field(default_factory=WarmStart)
    bank_learning: dict[str, Any] = field(default_factory=dict)  # settings of the bank, checked as the bank's arguments
    log_every_steps: int = MISSING
    eval_every_epochs: int = MISSING
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    profile: bool = MISSING
    anomaly: bool = MISSING
    method: Any = MISSING
    bank: Any = MISSING
    negatives: Any = MISSING
    backbone: Any = MISSING
    projector: Any = MISSING
    optimizer: Any = MISSING
    augmentation: Any = MISSING
    data: Any = MISSING
    loader: Any = MISSING
    eval: dict[str, Any] = field(default_factory=dict)
    tracking: Any = MISSING
    launcher: Any = MISSING


@dataclass
class EvaluateRoot:
    """Like Root, for conf/evaluate.yaml."""

    name: str = MISSING
    run: str | None = MISSING
    weights: str | None = MISSING
    format: str | None = MISSING
    weights_digest: str | None = MISSING
    to: str | None = MISSING
    cache: str | None = MISSING
    baselines: bool = MISSING
    overlap: str = MISSING
    seed: int = MISSING
    batch: int = MISSING
    precision: str = MISSING
    device: str = MISSING
    backbone: Any = MISSING
    augmentation: Any = MISSING
    data: Any = MISSING
    loader: Any = MISSING
    eval: dict[str, Any] = field(default_factory=dict)
    tracking: Any = MISSING


@dataclass
class StoredImages:
    channels: int | None = MISSING
    mean: list[float] | None = MISSING
    std: list[float] | None = MISSING


@dataclass
class ExportRoot:
    """Like Root, for conf/export.yaml."""

    run: str | None = MISSING
    weights: str | None = MISSING
    format: str | None = MISSING
    weights_digest: str | None = MISSING
    to: str | None = MISSING
    layouts: list[str] = MISSING
    data: StoredImages = field(default_factory=StoredImages)
    backbone: Any = MISSING
    augmentation: Any = MISSING


@dataclass
class EmbedRoot:
    """Like Root, for conf/embed.yaml."""

    run: str | None = MISSING
    weights: str | None = MISSING
    format: str | None = MISSING
    weights_digest: str | None = MISSING
    to: str | None = MISSING
    batch: int = MISSING
    precision: str = MISSING
    device: str = MISSING
    backbone: Any = MISSING
    augmentation: Any = MISSING
    data: Any = MISSING
    loader: Any = MISSING


COMPONENTS = (
    "method",
    "backbone",
    "projector",
    "optimizer",
    "augmentation",
    "data",
    "loader",
    "tracking",
)  # of a run; bank, negatives, launcher and eval may be null or empty, so they are not listed
AnyRoot = type[Root] | type[EvaluateRoot] | type[ExportRoot] | type[EmbedRoot]
ROOTS: dict[str, AnyRoot] = {
    "config": Root,
    "continued": Root,
    "evaluate": EvaluateRoot,
    "export": ExportRoot,
    "embed": EmbedRoot,
}
