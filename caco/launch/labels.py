"""What a run is called where several are compared, and what its sweep is called."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.conf import HydraConf

from caco.config import continued
from caco.runs.identity import is_neutral, key_of

SWEEP = "CACO_SWEEP"  # the environment variable that tells a sweep's jobs, wherever they run, which sweep they are of


@dataclass(frozen=True)
class Label:
    """What a run is called where several are compared.

    name: what was overridden, as typed; in a sweep only what tells its runs apart.
    choices: group -> chosen option, such as {"pn": "both", "bank": "8M"}.
    sweep: as a tracker's start() takes it, or None.
    evaluators: the options of `eval`.
    """

    name: str
    choices: Mapping[str, str]
    sweep: dict[str, Any] | None = None
    evaluators: Sequence[str] = ()


def label(hydra_cfg: HydraConf) -> Label:
    """Of a run that Hydra has composed; `hydra_cfg` is Hydra's own part."""
    overrides = list(hydra_cfg.overrides.task)
    sweep = json.loads(os.environ.get(SWEEP, "null"))
    varied = [item for item in overrides if sweep and key_of(item) in sweep["keys"]]
    chosen = {**continued.choices(), **hydra_cfg.runtime.choices}
    choices = {group: option for group, option in chosen.items() if option and "/" not in group}
    # Hydra does not say among the choices what a command line chooses of a group of which there may be several.
    evaluators = next(
        (item.partition("=")[2] for item in reversed(overrides) if item.startswith("eval=")),
        str(choices.get("eval", "")),
    )
    return Label(" ".join(varied) or title(overrides), choices, sweep, re.findall(r"\w+", evaluators))


def title(overrides: Iterable[str], *, limit: int = 200) -> str:
    """What a command line changed, as it was typed, without what cannot change a number."""
    return " ".join(item for item in overrides if not is_neutral(key_of(item)))[:limit] or "default"


def sweep_label(overrides: Iterable[str], keys: Iterable[str], num_jobs: int) -> str:
    """The value of SWEEP for the jobs of a command line that varies `keys`; its order makes no other sweep."""
    overrides = list(overrides)
    name = " ".join(sorted(item for item in overrides if not is_neutral(key_of(item))))
    return json.dumps({"name": name, "title": title(overrides), "keys": sorted(keys), "jobs": num_jobs})
