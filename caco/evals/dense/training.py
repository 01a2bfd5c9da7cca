"""The loop in which dense evaluators fine-tune a network: steps of images of any shapes, over all ranks, resumed to the
bit.

An evaluator says what an example is and what its loss is, in a `Task`; how long it is trained, in a `Recipe`; the loop
does the rest:

    recipe = Recipe(steps=24_000, images=16, rate=0.02, milestones=[18 / 24, 22 / 24], warmup_steps=100,
    decay_norms=False) network = train(
        new_network,  # a copy of its own; its BatchNorm is made one over all ranks
        task,  # a Task: the training images
        recipe,
        store,  # device, workers, folder of checkpoints, who is told
        seed=seed,
        name="detect_voc_c4",  # of its lines and checkpoints
        made_from={"backbone": store.digest_of(backbone), "images": images.digest(), "head": "c4"}, # what else decides
        the weights precision="fp32",
        save_every_steps=1000,
    )
    for index, example in one_by_one(test_example, test.files, store, name=name): # this rank's share of the test images
        ...

A step's images depend on (seed, step) alone and an example's draws on (seed, its place in the order), whatever the
number of ranks and workers. The ranks may have unequal numbers of images in a step, of unequal shapes: `Task.loss` says
how a loss is shared.

An image that cannot be read, or its labels, ends it by name; with loader.corrupt=skip the next one, with its own
labels, stands in for it in training, and of the test images it is left out. Each is named, with how many there are.
"""

import contextlib
import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from caco import distributed
from caco.data.loaders.batches import called, mixed_seed, say_stand_ins, those_after
from caco.data.loaders.workers import in_order
from caco.data.sets.sources import Source, UnreadableImage
from caco.errors import UserError
from caco.evals.features import FeatureStore, Precision
from caco.nn.norm import BATCH_NORMS, over_all_ranks
from caco.saying import counting
from caco.schedules import Table

LOOK_EVERY_STEPS = 20  # how often the loss is read, which a GPU has to be waited for
_ORDER, _EXAMPLE, _NETWORK = range(3)  # what is drawn: apart from one another, whatever the numbers after it
_NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how fast a network is fine-tuned.

    `steps` and `rate` belong to `reference_images` a step, as published. Other `images` change both: half the images,
    half the rate and twice the steps, of the warm-up too, so that as many images are seen.

    Args:
        steps, rate: at `reference_images` a step.
        images: a step, over all ranks.
        milestones: shares of the steps after each of which the rate is times `decay`, ascending.
        warmup_steps, warmup_start: the rate rises in a line from that share of itself; at `reference_images` a step.
        weight_decay, decay_norms: of the weights; of the scales and shifts of normalisation only with `decay_norms`.
    Raises:
        UserError: a value out of its range.
    """

    steps: int
    images: int
    rate: float
    reference_images: int = 16
    milestones: list[float] = field(default_factory=list)
    decay: float = 0.1
    warmup_steps: int = 0
    warmup_start: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norms: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected {wanted}, got {value}"
            for name, value, fine, wanted in (
                ("steps", self.steps, self.steps >= 1, "at least 1"),
                ("images", self.images, self.images >= 1, "at least 1 a step"),
                ("rate", self.rate, self.rate > 0, "a positive learning rate"),
                ("milestones", self.milestones, self._in_order(), "ascending shares of the steps between 0 and 1"),
                ("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more"),
            )
            if not fine
        ]
        if problems:
            raise UserError("; ".join(problems))

    def _in_order(self) -> bool:
        return list(self.milestones) == sorted(self.milestones) and all(0 < share < 1 for share in self.milestones)

    @property
    def num_steps(self) -> int:
        """Steps of `images`, in which as many images are seen as in `steps` of `reference_images`."""
        return max(1, round(self.steps * self.reference_images / self.images))

    @property
    def highest_rate(self) -> float:
        return self.rate * self.images / self.reference_images

    def refuse_more_ranks_than_images(self) -> None:
        """
        Raises:
            UserError: a step has no image for some rank.
        """
        if self.images < distributed.world():
            raise UserError(
                f"images: expected at least one a step for each of the {distributed.world()} processes, got"
                f" {self.images}"
            )

    def rates(self) -> Table:
        """The learning rate of each step."""
        drops = [round(share * self.num_steps) for share in self.milestones]
        warmup = round(self.warmup_steps * self.reference_images / self.images)

        def rate(step: int) -> float:
            rising = self.warmup_start + (1 - self.warmup_start) * step / warmup if step < warmup else 1.0
            return self.highest_rate * rising * self.decay ** sum(step >= drop for drop in drops)

        return [rate(step) for step in range(self.num_steps)]

    def optimizer(self, network: nn.Module) -> torch.optim.SGD:
        """SGD on what learns, in two groups: with weight decay and without."""
        norms = {
            id(p)
            for module in network.modules()
            if isinstance(module, _NORMS)
            for p in module.parameters(recurse=False)
        }
        learning = [p for p in network.parameters() if p.requires_grad]
        without = [] if self.decay_norms else [p for p in learning if id(p) in norms]
        chosen = {id(p) for p in without}
        groups = [
            {"params": [p for p in learning if id(p) not in chosen], "weight_decay": self.weight_decay},
            {"params": without, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(
            [group for group in groups if group["params"]], lr=self.highest_rate, momentum=self.momentum
        )

    def shown(self) -> str:
        """In words, as it stands after scaling."""
        return f"{self.num_steps:,} steps of {self.images} images, rate {self.highest_rate:g}"


class Task(Protocol):
    """What a network is trained on.

    files: the training images, as many as there are, by which messages name them.
    """

    files: Source

    @abstractmethod
    def example(self, index: int, seed: int) -> Any:
        """One image with its labels, augmented by draws from the seed alone: tensors on the CPU and plain values.
        Called in workers.

        Raises:
            UnreadableImage: it, or its labels, cannot be read; the message names the file.
        """

    @abstractmethod
    def loss(self, network: nn.Module, examples: list[Any]) -> Tensor:
        """A scalar with gradient, of this rank's examples of a step. A collective, under the precision's autocast.

        The mean over the ranks of what they return is the loss of the step's images together: where that divides by a
        number of pixels, each rank divides its sum by that of all ranks (distributed.sum_) and multiplies by
        distributed.world().
        """


def train(
    network: nn.Module,
    task: Task,
    recipe: Recipe,
    store: FeatureStore,
    *,
    seed: int,
    name: str,
    made_from: dict[str, Any],
    precision: Precision,
    save_every_steps: int = 1000,
) -> nn.Module:
    """The network, trained, in eval mode and on the store's device. A collective.

    Deterministic on CPUs. With a folder in the store there is a checkpoint every `save_every_steps` steps and at the
    end, and a call with the same arguments goes on from the last one to the same bits.

    Args:
        network: becomes the trained one; BatchNorm in it takes its statistics over all ranks' images.
        name: what its lines and its checkpoints are called.
        made_from: plain values: all that decides the weights besides recipe, seed, precision and number of ranks.
        save_every_steps: changes no number.
    Raises:
        UserError: fewer images a step than ranks; ranks that see other checkpoints; a loss that is not finite; an
            unreadable image. On all ranks, wherever it is.
    """
    world, device = distributed.world(), store.device
    recipe.refuse_more_ranks_than_images()
    if save_every_steps < 1:
        raise UserError(f"save_every_steps: expected at least 1, got {save_every_steps}")
    network = over_all_ranks(network, device).to(device).to(memory_format=torch.channels_last).train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer, rates = recipe.optimizer(network), recipe.rates()
    checkpoints = store.checkpoints(
        name, {**made_from, "recipe": vars(recipe), "seed": seed, "precision": precision, "world": world}
    )
    first = 0
    if checkpoints is not None:
        newest = checkpoints.load_newest()
        if newest is not None:
            state, path = newest
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
            store.say(f"{name}: going on from {path}, step {first} of {len(rates)}")
        if len(found := set(distributed.all_objects(first))) > 1:
            raise UserError(
                f"{name}: the processes found checkpoints of steps {sorted(found)}; all must see"
                f" {checkpoints.directory}"
            )
    if first < len(rates):
        store.say(f"{name}: training on {len(task.files):,} images, {recipe.shown()}")
    count = counting(store.say, f"{name}: step", len(rates), first)
    total = torch.zeros((), dtype=torch.float64, device=device)
    since = 0
    steps = batches(task, recipe.images, first, len(rates), store, seed=seed)
    with contextlib.closing(steps), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(first, len(rates)):
            examples = distributed.on_each(
                lambda: next(steps)
            )  # what one rank cannot read must not leave the others waiting
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            torch.manual_seed(
                mixed_seed(seed, _NETWORK, step, distributed.rank())
            )  # dropout and other draws of the network
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = task.loss(network, examples)
            loss.backward()
            distributed.mean_gradients(parameters)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
            since, done = since + 1, step + 1
            saving = done % save_every_steps == 0 or done == len(rates)
            if not saving and done % LOOK_EVERY_STEPS:
                continue
            mean = (distributed.sum_(total) / (since * world)).item()
            if not math.isfinite(mean):
                raise UserError(
                    f"{name}: the loss became {mean} by step {done}; a lower rate may help, or a longer warm-up"
                )
            count(since, f", loss {mean:.4f}")
            total.zero_()
            since = 0
            if saving and checkpoints is not None and distributed.is_main():
                checkpoints.save(
                    {"step": done, "network": network.state_dict(), "optimizer": optimizer.state_dict()}, done
                )
        if first < len(rates):
            store.say(f"{name}: trained for {len(rates):,} steps, loss {mean:.4f}")
    return network.eval()


def batches(
    task: Task, images: int, first: int, last: int, store: FeatureStore, *, seed: int
) -> Generator[list[Any], None, None]:
    """This rank's examples of the steps from `first` to before `last`, made ahead in workers; to be closed.

    What `train` trains on, and what statistics are taken over afterwards, with a seed of their own.
    """
    if first == last:
        return
    stand_ins: dict[int, int] = {}
    keys = _Steps(len(task.files), images, first, last, seed)
    with contextlib.closing(in_order(_Examples(task, seed, store.loader.corrupt), keys, workers_of(store))) as made:
        for one in made:
            if isinstance(one, UnreadableImage):
                raise UnreadableImage(str(one))
            examples, other_than_asked = one
            say_stand_ins(task.files, other_than_asked, stand_ins)
            yield examples


def one_by_one(
    example: Callable[[int], Any], files: Source, store: FeatureStore, *, name: str, verb: str = "tested", skip: int = 0
) -> Generator[tuple[int, Any], None, None]:
    """(index, example(index)) of this rank's images, in order, made ahead in workers; now and then says how many are
    left.

    Rank r of w has images r, r + w, r + 2 w, and so on; some ranks may have one more than others. With
    loader.corrupt=skip an image that cannot be read comes as None and is named.

    Args:
        skip: so many of this rank's images are done already.
    Raises:
        UnreadableImage: of `example`.
    """
    own = range(distributed.rank(), len(files), distributed.world())
    count, unreadable = counting(store.say, f"{name}: images {verb}", len(own), skip), 0
    with contextlib.closing(in_order(_Readable(example), own[skip:], workers_of(store))) as made:
        for index, one in zip(own[skip:], made, strict=True):
            if isinstance(one, UnreadableImage):
                if store.loader.corrupt == "fail":
                    raise UnreadableImage(str(one))
                unreadable += 1
                print(
                    f"caco: {name}: {called(files, index)} cannot be read and is left out ({unreadable} such so far)",
                    file=sys.stderr,
                )
                one = None
            yield index, one
            count(1)


def workers_of(store: FeatureStore) -> int:
    """Processes that read and augment: as many as the loader of training has."""
    return getattr(store.loader, "num_workers", store.num_workers)


class _Steps:
    """Keys (step, positions, indices) of this rank's images of each step. The images come in permutations, one after
    the other, and a step may have the end of one and the beginning of the next: so every step has as many images."""

    def __init__(self, num_images: int, images: int, first: int, last: int, seed: int) -> None:
        self.num_images, self.images, self.first, self.last, self.seed = num_images, images, first, last, seed
        self.rank, self.world = distributed.rank(), distributed.world()

    def __iter__(self) -> Iterator[tuple[int, list[int], list[int]]]:
        permutations: dict[int, np.ndarray] = {}
        for step in range(self.first, self.last):
            place, following = (
                step * self.images + rank * self.images // self.world for rank in (self.rank, self.rank + 1)
            )
            own = range(place, following)
            epochs = {position // self.num_images for position in own}
            permutations = {
                epoch: permutations[epoch] if epoch in permutations else self._permutation(epoch) for epoch in epochs
            }
            yield step, list(own), [int(permutations[p // self.num_images][p % self.num_images]) for p in own]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(mixed_seed(self.seed, _ORDER, epoch)).permutation(self.num_images)


class _Examples:
    """Keys of `_Steps` to examples, and (the image, the one that stands in for it) where there is such a one; or why
    there are none.
    """

    def __init__(self, task: Task, seed: int, corrupt: str) -> None:
        self.task, self.seed, self.corrupt = task, seed, corrupt

    def __call__(
        self, key: tuple[int, list[int], list[int]]
    ) -> tuple[list[Any], list[tuple[int, int]]] | UnreadableImage:
        _, positions, indices = key
        made: list[Any] = []
        stand_ins: list[tuple[int, int]] = []
        try:
            for position, index in zip(positions, indices, strict=True):
                taken, example = self._readable(index, mixed_seed(self.seed, _EXAMPLE, position))
                made.append(example)
                stand_ins += [(index, taken)] if taken != index else []
        except UnreadableImage as error:
            return error  # raised by the process that trains: a worker's exception would arrive as a page of traceback
        return made, stand_ins

    def _readable(self, index: int, seed: int) -> tuple[int, Any]:
        try:
            return index, self.task.example(index, seed)
        except UnreadableImage:
            if self.corrupt == "fail":
                raise
        for other in those_after(index, self.task.files):
            with contextlib.suppress(UnreadableImage):
                return other, self.task.example(other, seed)
        raise AssertionError("unreachable: those_after has raised")


class _Readable:
    """Indices to examples, or to why there is none."""

    def __init__(self, example: Callable[[int], Any]) -> None:
        self.example = example

    def __call__(self, index: int) -> Any:
        try:
            return self.example(index)
        except UnreadableImage as error:
            return error
