"""The contract of an evaluator, and nothing else."""

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
    """A part of what an evaluation takes, for caco.plan: so many images of one kind.

    what: in words: "segment_fcn16: crops of 513 px to train on". images: how many, over all steps. flops:
    multiplications and additions of one. once: computes one on a device, to be timed.
    """

    what: str
    images: int
    flops: float
    once: Callable[[torch.device], Any]


class Evaluator(Protocol):
    """Measures a backbone: `build` once, then `run` as often as the backbone has become another.

    An evaluator of one's own derives from it, sets `when` and defines `build` and `run`. Its constructor takes plain
    values, the keys of its YAML. Who calls: caco/evals/evaluation.py, for the Trainer and for caco.evaluate.

    when: "epoch" for every evaluation while training and the last one, "end" for the last one alone.
    on_all_ranks: whether `run` is a collective, because it trains, or because the ranks share the reading of images.
        Then what the store is asked for (`features`, `of`, `outputs`) is a collective too, whose result rank 0 alone
        has: it computes and yields, and the other ranks, having asked for the same, yield nothing. Others run on rank
        0, which reads by itself, and the other ranks wait.
    needs_labels: whether it needs labelled training and test images of the run's own `data`: then a run without any is
    told before it begins.
    needs_method: whether it looks into the method that trains (`attach`); in a backbone alone there is nothing for it.
    bounded: settings that may be at most the number of labelled training images, or of the share of each class that
    another setting says: {"k": "fraction"}, {"batch": ""}.
    departures: in what it differs from what was published by that name, a sentence each, printed with the results at
    the end.
    """

    when: When
    on_all_ranks: bool = False
    needs_labels: bool = False
    needs_method: bool = False
    bounded: Mapping[str, str] = {}
    departures: Sequence[str] = ()

    @abstractmethod
    def build(self, store: FeatureStore, *, seed: int) -> None:
        """On every rank, before anything is trained: take from the store what every `run` needs, and draw, by the seed
        alone.

        Here is said what the images lack (labels, enough of them), not after hours of training.

        Raises:
            UserError: they do not suffice; the message says what to do, and `eval.<name>: ` is put before it.
        """

    def require(self, backbone: nn.Module) -> None:
        """Called once before anything is trained, with a backbone as `run` gets it later.

        Raises:
            UserError: one of this kind cannot be evaluated so; `eval.<name>: ` is put before the message.
        """
        return None

    def attach(self, method: nn.Module) -> None:
        """Called once after `require`, with the method that trains, for what looks into more than the backbone.

        Raises:
            UserError: what it looks into is not there; `eval.<name>: ` is put before the message.
        """
        return

    @abstractmethod
    def run(self, backbone: nn.Module) -> Iterator[tuple[str, float]]:
        """Yields (name, number), accuracies in percent. A name is that of a column in the record and of no other
        evaluator.

        Leaves the backbone's weights, modes and gradients and torch's random numbers as they were: training goes on
        with them.
        """

    def inputs(self) -> list[Any]:
        """What the numbers depend on besides the constructor's arguments and the store's images, as plain values, after
        `build`: other sets of images, by name and digest. For caco.evaluate, which makes no result twice."""
        return []

    def image_sets(self) -> dict[str, str]:
        """The sets of images of its own by name, each with a digest of its content, after `build`: where another folder
        holds another set of that name, its results get a name of their own (caco/evals/record.py), and a run does not
        go on with it."""
        return {}

    def work(self, backbone: Callable[[], nn.Module]) -> list[Work]:
        """What `run` takes, without data and before `build`; nothing where nobody counted it.

        Args:
            backbone: makes one of the kind that is to be evaluated, on the CPU.
        """
        return []
