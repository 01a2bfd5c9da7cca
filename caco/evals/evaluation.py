"""An evaluation round: several evaluators of one backbone that share its features."""

from typing import Any, Literal

import torch
from torch import nn

from caco.data.sources import Splits
from caco.data.views import Views
from caco.evals.features import FeatureStore, Precision


class Evaluation:
    """Builds each evaluator once and then runs them on whatever the backbone has become.

    An evaluator has `when`, `build(store, *, seed)` and `run(backbone)`, which yields (name, value) pairs.

    Args:
        evaluators: by their config name (`eval.<name>`); may be empty.
        splits, views, batch, device, precision, num_workers: see FeatureStore.
        seed: of the evaluators' own draws.
    Raises:
        ValueError: an evaluator cannot work on these splits; names it and says what to do.
    """

    def __init__(
        self,
        evaluators: dict[str, Any],
        splits: Splits,
        views: Views,
        *,
        batch: int,
        device: torch.device | str,
        precision: Precision,
        seed: int,
        num_workers: int = 0,
    ) -> None:
        self.evaluators = evaluators
        self.store = FeatureStore(
            splits, views, batch=batch, device=device, precision=precision, num_workers=num_workers
        )
        for name, evaluator in evaluators.items():
            try:
                evaluator.build(self.store, seed=seed)
            except ValueError as error:
                raise ValueError(f"eval.{name}: {error}") from error

    def run(self, backbone: nn.Module, when: Literal["epoch", "end"]) -> dict[str, float]:
        """Results by name, of the evaluators for "epoch", or of all at the "end"; leaves the backbone as it was."""
        if when not in ("epoch", "end"):
            raise ValueError(f"when: expected epoch or end, got {when!r}")
        self.store.forget()
        results: dict[str, float] = {}
        for name, evaluator in self.evaluators.items():
            if when == "end" or evaluator.when == "epoch":
                for key, value in evaluator.run(backbone):
                    if key in results:
                        raise ValueError(f"eval.{name}: another evaluator already gave {key}")
                    results[key] = value
        self.store.forget()  # a round's features must not lie in memory while training goes on
        return results
