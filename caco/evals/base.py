"""The contract of an evaluator."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from caco.evals.features import FeatureStore

When = Literal["epoch", "end"]


@dataclass(frozen=True)
class Work:
    """The cost of a part of an evaluation, for caco.plan: a number of images of one kind.

    Attributes:
        what: a description: "segment_fcn16: crops of 513 px to train on".
        images: number of images, over all steps.
        flops: multiplications and additions for one image.
        once: processes one image on a device, so that its time can be measured.
    """

    what: str
    images: int
    flops: float
    once: Callable[[torch.device], Any]


class Evaluator(Protocol):
    """Measures a backbone: `build` is called once, then `run` each time that the backbone is to be measured.

    To write an evaluator of your own, derive it from this class, set `when`, and define `build` and `run`. Its
    constructor takes plain values, the keys of its YAML file. caco/evals/evaluation.py calls the evaluator, for the
    Trainer and for caco.evaluate.

    Attributes:
        when: "epoch" runs it in every evaluation during training and in the last one, "end" only in the last one.
        on_all_ranks: True if `run` is a collective, because it trains or because the ranks share the reading of images.
            The store's `features`, `of` and `outputs` are then collectives too, whose result only rank 0 has. So rank 0
            computes and yields, and the other ranks make the same calls and yield nothing. With False, `run` is called
            on rank 0 alone, which reads by itself while the other ranks wait.
        needs_labels: True if it needs labelled training and test images of the run's own `data`; a run without these is
            refused at its start.
        needs_method: True if it needs the method that trains (see `attach`), so that a backbone alone is not enough.
        bounded: settings that must not exceed the number of labelled training images, or the share of each class that
            another setting gives: {"k": "fraction"}, {"batch": ""}.
        departures: the differences from the published protocol of that name, a sentence each. They are printed with the
            results at the end.
    """

    when: When
    on_all_ranks: bool = False
    needs_labels: bool = False
    needs_method: bool = False
    bounded: Mapping[str, str] = {}
    departures: Sequence[str] = ()

    @abstractmethod
    def build(self, store: FeatureStore, *, seed: int) -> None:
        """Prepare before any training, on every rank: get from the store what every `run` needs, and make all draws,
        which must depend on the seed alone.

        Anything that the images lack, such as labels or a sufficient number, must be reported here, not after hours of
        training.

        Raises:
            UserError: the images do not suffice. The message says what to do; `eval.<name>: ` is put before it.
        """

    def require(self, backbone: nn.Module) -> None:
        """Called once before any training, with a backbone of the kind that `run` will get.

        Raises:
            UserError: the evaluator cannot handle such a backbone; `eval.<name>: ` is put before the message.
        """
        return None

    def attach(self, method: nn.Module) -> None:
        """Called once after `require`, with the method that trains, for evaluators that use more than the backbone.

        Raises:
            UserError: the method lacks what the evaluator needs; `eval.<name>: ` is put before the message.
        """
        return

    @abstractmethod
    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (name, number); accuracies are in percent. Each name is a column of the record, and no other evaluator
        may give it.

        Must leave the backbone's weights, modes and gradients and torch's random number generators unchanged, because
        training goes on with them.
        """

    def inputs(self) -> list[Any]:
        """Everything besides the constructor's arguments and the store's images that the numbers depend on, as plain
        values; other sets of images by name and digest. Called after `build`. caco.evaluate uses it to avoid computing
        a result twice."""
        return []

    def image_sets(self) -> dict[str, str]:
        """The evaluator's own sets of images: name -> digest of the content. Called after `build`. If a set of the same
        name in another folder has other content, its results get other names (caco/evals/record.py), and a run does not
        resume with it."""
        return {}

    def work(self, backbone: Callable[[], nn.Module]) -> list[Work]:
        """The cost of one `run`, determined without data and before `build`; an empty list if it is unknown.

        Args:
            backbone: makes a backbone of the kind to be evaluated, on the CPU.
        """
        return []
