"""The names of a run and of its sweep where several runs are shown side by side."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.conf import HydraConf

from caco.config import continued
from caco.runs.identity import as_typed, is_neutral, key_of

SWEEP = "CACO_SWEEP"  # the environment variable that tells a job, wherever it runs, to which sweep it belongs


@dataclass(frozen=True)
class Label:
    """How a run is labelled where several are compared.

    name: the overrides as typed; in a sweep only those that differ between its runs.
    choices: group -> chosen option, such as {"pn": "both", "bank": "8M"}.
    sweep: in the form of a tracker's start(), or None.
    evaluators: the options of `eval`.
    """

    name: str
    choices: Mapping[str, str]
    sweep: dict[str, Any] | None = None
    evaluators: Sequence[str] = ()


def label(hydra_cfg: HydraConf) -> Label:
    """The label of a run that Hydra has composed; `hydra_cfg` holds Hydra's own settings."""
    overrides = list(hydra_cfg.overrides.task)
    sweep = json.loads(os.environ.get(SWEEP, "null"))
    varied = [item for item in overrides if sweep and key_of(item) in sweep["keys"]]
    chosen = {**continued.choices(), **hydra_cfg.runtime.choices}
    choices = {group: option for group, option in chosen.items() if option and "/" not in group}
    # For `eval`, of which several options can be chosen, Hydra's choices do not show what the command line chose.
    evaluators = next(
        (item.partition("=")[2] for item in reversed(overrides) if item.startswith("eval=")),
        str(choices.get("eval", "")),
    )
    return Label(" ".join(varied) or title(overrides), choices, sweep, re.findall(r"\w+", evaluators))


def title(overrides: Iterable[str], *, limit: int = 200) -> str:
    """The overrides of a command line as typed, without those that cannot change a number."""
    return " ".join(item for item in as_typed(overrides) if not is_neutral(key_of(item)))[:limit] or "default"


def sweep_label(overrides: Iterable[str], keys: Iterable[str], num_jobs: int) -> str:
    """The value of SWEEP for the jobs of a command line that varies `keys`. The order of the overrides does not
    matter.
    """
    overrides = list(overrides)
    name = " ".join(sorted(item for item in overrides if not is_neutral(key_of(item))))
    return json.dumps({"name": name, "title": title(overrides), "keys": sorted(keys), "jobs": num_jobs})
