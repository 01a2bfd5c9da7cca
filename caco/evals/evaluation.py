"""One round of evaluation: several evaluators measure one backbone and share its features."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from caco import distributed
from caco.data.loaders.bound import Loader
from caco.data.sets.overlap import Overlap
from caco.data.sets.sources import Splits
from caco.data.views.augmentation import Views
from caco.errors import UserError, require_contract
from caco.evals.base import Evaluator, When
from caco.evals.extraction import Precision
from caco.evals.features import FeatureStore
from caco.saying import Say, doing, silent

Failed = Callable[[str, Exception], None]  # called with an evaluator's name and its error


class Evaluation:
    """Builds each evaluator once and then runs them whenever the backbone is to be measured.

    Args:
        evaluators: the evaluators by their config name (`eval.<name>`), possibly none. caco/evals/base.py says which
            members are called when.
        splits, views, batch, device, precision, loader, folder, cache, passing, overlap, compared, say: see
            FeatureStore.
        seed: seed of the evaluators' own draws.
    Raises:
        UserError: evaluators cannot work on these splits; the message names all of them and says what to do.
    """

    def __init__(
        self,
        evaluators: dict[str, Evaluator],
        splits: Splits,
        views: Views,
        *,
        batch: int,
        device: torch.device | str,
        precision: Precision,
        seed: int,
        loader: Loader | None = None,
        folder: Path | None = None,
        cache: Path | None = None,
        passing: bool = False,
        overlap: Literal["refuse", "allow"] = "refuse",
        compared: Overlap | None = None,
        say: Say = silent,
    ) -> None:
        self.evaluators = evaluators
        self.store = FeatureStore(
            splits,
            views,
            batch=batch,
            device=device,
            precision=precision,
            loader=loader,
            folder=folder,
            cache=cache,
            passing=passing,
            overlap=overlap,
            compared=compared,
            say=say,
        )
        for name, evaluator in evaluators.items():
            require_contract(f"eval.{name}", evaluator, Evaluator)
        self._of_each(lambda evaluator: evaluator.build(self.store, seed=seed))

    def require(self, backbone: nn.Module, method: nn.Module | None = None) -> None:
        """Check that all evaluators can handle a backbone and the method that trains it.

        Args:
            method: the method that trains the backbone; None if there is only a backbone.
        Raises:
            UserError: evaluators cannot handle them; the message names all of these evaluators.
        """
        self._of_each(lambda evaluator: evaluator.require(backbone))
        self._of_each(lambda evaluator: _attach(evaluator, method))

    def _of_each(self, ask: Callable[[Evaluator], None]) -> None:
        refused = []
        for name, evaluator in self.evaluators.items():
            try:
                ask(evaluator)
            except UserError as error:
                refused.append(f"eval.{name}: {error}")
        if refused:
            raise UserError("\n".join(refused))

    def run(self, backbone: nn.Module, when: When, failed: Failed | None = None) -> dict[str, float]:
        """The results by name, of the evaluators for "epoch", or of all at the "end". The backbone is left unchanged.

        A collective; only rank 0 gets the results, the other ranks an empty dictionary.
        """
        if when not in ("epoch", "end"):
            raise ValueError(f"when: expected epoch or end, got {when!r}")
        chosen = [name for name, evaluator in self.evaluators.items() if when == "end" or evaluator.when == "epoch"]
        results: dict[str, float] = {}
        for name, values in self.each(backbone, chosen, failed):
            if twice := results.keys() & values:
                error = UserError(f"eval.{name}: another evaluator already gave {', '.join(sorted(twice))}")
                if failed is None:
                    raise error
                failed(name, error)
                continue
            results |= values
            for line in self.evaluators[name].departures if when == "end" else ():
                self.store.say(line)
        return results

    def each(
        self, backbone: nn.Module, names: list[str], failed: Failed | None = None
    ) -> Iterator[tuple[str, dict[str, float]]]:
        """Run these evaluators one after the other and yield (name, results) of each.

        Args:
            failed: called on every rank for an evaluator that raised an error; the others go on. Without it the error
                is raised.
        """
        self.store.forget()
        try:
            for name in names:
                evaluator = self.evaluators[name]
                self.store.all_ranks = evaluator.on_all_ranks
                work = evaluator.on_all_ranks or distributed.is_main()
                try:
                    # An error on one rank must reach all ranks; and rank 0 may work for hours while the others wait.
                    with doing(f"evaluating by {name}"):
                        values = distributed.together(lambda: dict(evaluator.run(backbone)) if work else {})[0]
                except Exception as error:
                    self.store.over(failed=True)
                    if failed is None:
                        raise
                    failed(name, error)
                    continue
                self.store.over(failed=False)
                yield name, values if distributed.is_main() else {}
        finally:
            self.store.forget()  # a round's features must not take memory while training goes on


def _attach(evaluator: Evaluator, method: nn.Module | None) -> None:
    if method is not None:
        evaluator.attach(method)
    elif evaluator.needs_method:
        raise UserError(
            "needs the method that trains the backbone, but only a backbone was given; measure it during training"
        )
