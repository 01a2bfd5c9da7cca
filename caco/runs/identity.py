"""The identity of a run: all values of the resolved configuration that can change a number.

Settings that cannot (where the data lie, how many workers read them, how often something is logged or saved, which
tracker is used) are recorded but not hashed, so a run that moves to another machine stays the same run.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from caco.errors import FileError, UserError

# A pattern covers the key itself and all keys below it.
NEUTRAL_KEYS = (
    "name",
    "weights",  # the identity has weights_digest instead
    "continue_from",  # the identity has continued_run instead
    "warm_start",  # the identity has the resulting settings of `method` instead
    "bank_learning",  # the identity has the resulting settings of `bank` instead
    "log_every_steps",
    "eval_every_epochs",
    "checkpoint",
    "profile",
    "anomaly",
    "data.root",
    "data.download",
    "data.labelled_root",
    "data.in_memory_mb",
    "eval.domain.root",
    "eval.transfer.root",
    "eval.detect.root",
    "eval.detect.save_every_steps",
    "eval.detect_coco.root",
    "eval.detect_coco.save_every_steps",
    "eval.detect_coco_2x.root",
    "eval.detect_coco_2x.save_every_steps",
    "eval.detect_coco_fpn.root",
    "eval.detect_coco_fpn.save_every_steps",
    "eval.segment.root",
    "eval.segment.save_every_steps",
    "eval.dense_linear.root",
    "loader._target_",  # every loader gives the same batches
    "loader.num_workers",
    "loader.prefetch",
    "tracking",
    "launcher",
    "derived",  # only names the derived settings; their values count where they stand
    "config_dir",  # a place; environment.json records digests of the files in it
    "hydra",
)
# Settings that were added later, each with the value that reproduces the behaviour before it existed. With that value a
# setting is not part of the identity, so a run that does not use it keeps its hash. Every new setting in conf/ needs a
# line here, or the hashes of all earlier runs change.
AS_BEFORE: dict[str, Any] = {
    "accumulate": None,
    "backbone.layer_norm": False,
    "backbone.patch_size": None,
    "backbone.pool": None,
    "backbone.register_tokens": None,
    "backbone.variant": "timm",
    "backbone.zero_init_last": False,
    "bank.balance": 0.0,
    "bank.final_lr": None,
    "bank.keep_probabilities": False,
    "bank.random_norms": "unit",
    "bank.renewed_after_steps": None,
    "continued_epochs": None,
    "continued_run": None,
    "continued_schedule": None,
    "data.channels": None,
    "data.mean": None,
    "data.std": None,
    "eval.knn.choice": "random",
    "eval.linear.drop_last": True,
    "eval.linear_lightly.drop_last": True,
    "eval.linear_moco.drop_last": True,
    "format": None,
    "method.warm_start_key": "second",
    "method.warm_start_passes": None,
    "method.warm_start_steps": None,
    "negatives": None,
    "norm_groups": 1,
    "optimizer.decay_one_dimensional": False,
    "projector.activation": "relu",
    "projector.initialisation": "torch",
    "projector.last_affine": True,
    "projector.last_bias": None,
    "schedule.clip_each_gradient_norm": None,
    "schedule.clip_gradient_norm": None,
    "schedule.drop_factor": 0.1,
    "schedule.drops": [],
    "schedule.final_lr": None,
    "schedule.final_weight_decay": None,
    "schedule.warmup_end": "last",
    "schedule.warmup_start": None,
    "shuffle_keys": False,
    "weights_digest": None,
}


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """cfg as dicts, lists and scalars, interpolations resolved, without Hydra's own settings; `???` stays a string."""
    if not isinstance(cfg, DictConfig):
        return dict(cfg)
    # Key by key, because resolving hydra.run.dir asks for the hash, so `hydra` must not be touched; a copy of the rest
    # would take most of the time of a refusal.
    return {str(key): _resolved(cfg, str(key)) for key in cfg if key != "hydra"}


def _resolved(cfg: DictConfig, key: str) -> Any:
    if OmegaConf.is_missing(cfg, key):
        return "???"
    value = cfg[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def read_yaml(file: Path) -> DictConfig:
    """A YAML file of keys and values, such as an option of conf/."""
    cfg = OmegaConf.load(file)
    assert isinstance(cfg, DictConfig), f"{file}: expected keys"
    return cfg


def read_recorded(file: Path) -> DictConfig:
    """A run's config.yaml.

    Raises:
        UserError: it is something else, or empty, as a machine that lost its power may leave a file; or cannot be read.
    """
    try:
        cfg = OmegaConf.load(file)
        if not isinstance(cfg, DictConfig) or not file.read_bytes().strip():
            raise TypeError("it has no settings")
        plain(cfg)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException, AttributeError, TypeError, OSError) as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # without, it is OmegaConf's, of a text that is a number
            raise FileError(error.errno, error.strerror, str(file)) from error
        raise UserError(f"{file} is damaged ({str(error).splitlines()[0]}): take it from a copy of the run") from error
    return cfg


def flat(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of cfg by dotted name, such as `bank.size`; items of a list by number, as in
    `augmentation.views.0.blur`.

    Empty lists and dicts count as leaves, so that removing all entries still shows.
    """
    leaves: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        children = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in items]
        if children:
            for name, value in children:
                visit(name, value)
        elif prefix:
            leaves[prefix] = node

    visit("", plain(cfg))
    return leaves


def is_neutral(key: str) -> bool:
    """Whether a dotted key is one that cannot change a number."""
    return any(key == neutral or key.startswith(neutral + ".") for neutral in NEUTRAL_KEYS)


def identity(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The flat leaves that can change a number; 1.0 and 1 count as the same value."""
    return {
        key: _canonical(value)
        for key, value in sorted(flat(cfg).items())
        if not is_neutral(key) and not (key in AS_BEFORE and value == AS_BEFORE[key])
    }


def _canonical(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def run_hash(cfg: DictConfig | Mapping[str, Any]) -> str:
    """The first ten hexadecimal digits of a SHA-256 over the identity."""
    return hashlib.sha256(json.dumps(identity(cfg)).encode()).hexdigest()[:10]


def file_digest(path: str | None) -> str | None:
    """Sixteen hexadecimal digits of a file's content; None if there is no file or it cannot be read."""
    file = None if path is None else Path(os.path.expanduser(path)).absolute()
    try:
        if file is None or not file.is_file():
            return None
        status = file.stat()
        return _digest(file, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError):
        return None  # an impossible name, or no permission; the code that uses the file reports it


@lru_cache(maxsize=None)
def _digest(file: Path, size: int, changed_ns: int) -> str:
    """Cached by size and time, because a configuration is resolved many times in a process."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def as_typed(overrides: Iterable[str]) -> list[str]:
    """The overrides without those that were derived (caco/engine/fitting.py), which an override `derived=[...]` among
    them names.
    """
    overrides = list(overrides)
    named = {name for item in overrides if key_of(item) == "derived" for name in re.findall(r"[\w.]+", item)}
    return [item for item in overrides if key_of(item) not in named]


def short_name(overrides: Iterable[str], *, limit: int = 160) -> str:
    """The overrides of a command line as one readable word that is safe in a path, a shell and a Hydra override.

    `["pn=positive", "bank=12M", "data.root=/d"]` -> "bank-12M_pn-positive". Neutral settings are left out, the order of
    the overrides does not matter, and no overrides give "default".
    """
    kept = []
    for override in sorted(overrides):
        key, _, value = override.lstrip("+~").partition("=")
        if not is_neutral(key_of(override)):
            kept.append(re.sub(r"[^A-Za-z0-9.+]+", "-", f"{key}={value}").strip("-"))
    return "_".join(kept)[:limit].rstrip("-_.") or "default"


def run_name(cfg: DictConfig) -> str:
    """The last part of a run's directory: its overrides as typed and the identity's hash, to which derived settings
    belong too. cfg includes Hydra's own settings.
    """
    return f"{short_name(as_typed(cfg.hydra.overrides.task))}-{run_hash(cfg)}"


def key_of(override: str) -> str:
    """The dotted key of an override; for hydra/sweeper=optuna it is hydra.sweeper."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """One line for each key in which two identities differ."""
    absent = "(absent)"
    return [
        f"{key}: there {theirs.get(key, absent)}, here {ours.get(key, absent)}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key, absent) != ours.get(key, absent)
    ]
