"""A run's identity and its directory.

The identity is everything in the resolved configuration that can change a number. What cannot (where the data lie, how
many workers read them, how often something is logged or saved, who is told) is recorded, not hashed: so a run moved to
another machine stays the same run.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from caco.errors import UserError
from caco.tracking.environment import environment
from caco.tracking.files import write_json

# A pattern covers the key itself and all below it.
NEUTRAL_KEYS = (
    "name",
    "weights",  # weights_digest is what counts
    "warm_start",  # what comes of it is under method
    "bank_learning",  # what comes of it is under bank
    "log_every_steps",
    "eval_every_epochs",
    "checkpoint",
    "profile",
    "anomaly",
    "data.root",
    "data.download",
    "data.labelled_root",
    "data.in_memory_mb",
    "eval.transfer.root",
    "loader._target_",  # every loader makes the same batches
    "loader.num_workers",
    "loader.prefetch",
    "tracking",
    "launcher",
    "hydra",
)
# Part of the identity once they are set; a run that does not use them is the run that it was before they existed.
NOTHING_IF_NULL = (
    "accumulate", "format", "weights_digest", "bank.final_lr", "method.warm_start_steps", "method.warm_start_passes",
    "schedule.final_weight_decay", "schedule.clip_gradient_norm",
)  # fmt: skip

_locks: dict[Path, int] = {}  # held until the process ends: closing one would give the lock up


def plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """cfg as dicts, lists and scalars, interpolations resolved, without Hydra's own part; `???` stays a string."""
    if not isinstance(cfg, DictConfig):
        return dict(cfg)
    # Key by key: hydra.run.dir asks for the hash while it is being resolved, so `hydra` must not be touched.
    job = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    return OmegaConf.to_container(job, resolve=True)  # type: ignore[return-value]


def flat(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of cfg by dotted name, as `bank.size`; a list's items by number, as `augmentation.views.0.blur`.

    Empty lists and dicts are leaves, or their disappearance would not show.
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
    """Whether the dotted key cannot change a number."""
    return any(key == neutral or key.startswith(neutral + ".") for neutral in NEUTRAL_KEYS)


def identity(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The flat leaves that can change a number; 1.0 and 1 are one value."""
    return {
        key: _canonical(value)
        for key, value in sorted(flat(cfg).items())
        if not is_neutral(key) and not (value is None and key in NOTHING_IF_NULL)
    }


def _canonical(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def run_hash(cfg: DictConfig | Mapping[str, Any]) -> str:
    """Ten hexadecimal digits of the identity."""
    return hashlib.sha256(json.dumps(identity(cfg)).encode()).hexdigest()[:10]


def file_digest(path: str | None) -> str | None:
    """Sixteen hexadecimal digits of a file's content; None where there is no file."""
    file = None if path is None else Path(path).expanduser().absolute()
    if file is None or not file.is_file():
        return None
    status = file.stat()
    return _digest(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=None)
def _digest(file: Path, size: int, changed_ns: int) -> str:
    """Read once a process, as long as the file stays as it is: a configuration is resolved many times."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def short_name(overrides: Iterable[str], *, limit: int = 160) -> str:
    """What a command line changed, as one readable word that is safe in a path, a shell and a Hydra override.

    `["pn=positive", "bank=12M", "data.root=/d"]` -> "bank-12M_pn-positive"; neutral settings are left out, the order in
    which they were given too; nothing changed -> "default".
    """
    kept = []
    for override in sorted(overrides):
        key, _, value = override.lstrip("+~").partition("=")
        if not is_neutral(_key(override)):
            kept.append(re.sub(r"[^A-Za-z0-9.+]+", "-", f"{key}={value}").strip("-"))
    return "_".join(kept)[:limit].rstrip("-_.") or "default"


def run_name(cfg: DictConfig) -> str:
    """The last part of a run's directory: what was overridden and the identity's hash. cfg holds Hydra's part too."""
    return f"{short_name(cfg.hydra.overrides.task)}-{run_hash(cfg)}"


SWEEP = "CACO_SWEEP"  # the environment variable that tells a sweep's jobs, wherever they run, which sweep they are of


@dataclass(frozen=True)
class Label:
    """What a run is called where several are compared.

    name: what was overridden, as typed; in a sweep only what tells its runs apart.
    choices: group -> chosen option, such as {"pn": "both", "bank": "8M"}.
    sweep: as a tracker's start() takes it, or None.
    """

    name: str
    choices: Mapping[str, str]
    sweep: dict[str, Any] | None = None


def label(hydra_cfg: DictConfig) -> Label:
    """Of a run that Hydra has composed; `hydra_cfg` is Hydra's own part."""
    overrides = list(hydra_cfg.overrides.task)
    sweep = json.loads(os.environ.get(SWEEP, "null"))
    varied = [item for item in overrides if sweep and _key(item) in sweep["keys"]]
    choices = {group: option for group, option in hydra_cfg.runtime.choices.items() if option and "/" not in group}
    return Label(" ".join(varied) or title(overrides), choices, sweep)


def title(overrides: Iterable[str], *, limit: int = 200) -> str:
    """What a command line changed, as it was typed, without what cannot change a number."""
    return " ".join(item for item in overrides if not is_neutral(_key(item)))[:limit] or "default"


def sweep_label(overrides: Iterable[str], keys: Iterable[str], num_jobs: int) -> str:
    """The value of SWEEP for the jobs of a command line that varies `keys`; its order makes no other sweep."""
    overrides = list(overrides)
    name = " ".join(sorted(item for item in overrides if not is_neutral(_key(item))))
    return json.dumps({"name": name, "title": title(overrides), "keys": sorted(keys), "jobs": num_jobs})


def _key(override: str) -> str:
    """The dotted key of an override; of hydra/sweeper=optuna hydra.sweeper."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """One line per key that two identities do not share."""
    absent = "(absent)"
    return [
        f"{key}: there {theirs.get(key, absent)}, here {ours.get(key, absent)}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key, absent) != ours.get(key, absent)
    ]


def open_run(run_dir: Path | str, cfg: DictConfig | Mapping[str, Any]) -> None:
    """Make run_dir this run's, for as long as this process lives, and write config.yaml and environment.json into it.

    Raises:
        ValueError: another process trains there now, or the directory holds a run of another identity.
    """
    run_dir = Path(run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    hold(run_dir)
    record = run_dir / "config.yaml"
    if record.exists():
        changed = differences(identity(OmegaConf.load(record)), identity(cfg))
        if changed:
            shown = "\n".join(f"  {line}" for line in changed[:20])
            more = f"\n  and {len(changed) - 20} more" if len(changed) > 20 else ""
            raise UserError(
                f"{run_dir} holds another run; choose another hydra.run.dir. What differs:\n{shown}{more}"
            )
    (run_dir / "failure.txt").unlink(missing_ok=True)
    _write(record, OmegaConf.to_yaml(OmegaConf.create(plain(cfg))))
    if not (run_dir / "summary.json").exists():  # else it is done, and was where its record says
        write_environment(run_dir)


def write_environment(run_dir: Path) -> dict[str, str]:
    """Write environment.json, what the run runs on and its command; returns the first."""
    run_dir.mkdir(parents=True, exist_ok=True)
    found = environment()
    write_json(run_dir / "environment.json", {**found, "command": command()})
    return found


def command() -> str:
    """The command line as one types it, whichever way the program was started."""
    program, *arguments = sys.argv
    if Path(program).parts[-2:-1] == ("caco",) and Path(program).suffix == ".py":
        return shlex.join(["python", "-m", f"caco.{Path(program).stem}", *arguments])
    return shlex.join([Path(program).name, *arguments])


def record_failure(run_dir: Path, text: str) -> None:
    """Write failure.txt, unless another rank has: the first to fail is the cause, others lose their peer."""
    with contextlib.suppress(OSError), open(run_dir / "failure.txt", "x", encoding="utf-8") as file:
        file.write(text.rstrip() + "\n")


def objective(summary: Mapping[str, Any]) -> float | None:
    """What a search (Optuna) maximises: k-NN accuracy if it was evaluated, else a probe's, else nothing."""
    return next((summary[name] for name in ("knn_top1", "probe_top1") if name in summary), None)


def is_first_rank() -> bool:
    """Whether this process, of those that train one run together, is the one that writes; known before torch is."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def hold(run_dir: Path) -> None:
    """Hold run_dir/.lock until this process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    run_dir = run_dir.absolute()
    if run_dir in _locks:
        return
    lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        # A POSIX record lock: forked loader workers do not inherit it, so a worker that outlives a killed run
        # cannot keep the next one out (flock would).
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(lock, 200).decode().strip() or "another process"
        os.close(lock)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{run_dir} is in use: {holder} trains or evaluates there now") from error
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return  # a file system without locks: better to run without than not at all
        raise
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _locks[run_dir] = lock


def _write(path: Path, text: str) -> None:
    """Replace path as a whole: a reader sees the old text or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
