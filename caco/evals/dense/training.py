"""The training loop with which dense evaluators fine-tune a network. The images of a step may differ in shape, all
ranks share a step, and an interrupted training resumes with the same bits.

An evaluator defines examples and their loss in a `Task`, and the length of training in a `Recipe` (recipe.py); the loop
does the rest:

    recipe = Recipe(
        steps=24_000, images=16, rate=0.02, milestones=[18 / 24, 22 / 24], warmup_steps=100, decay_norms=False
    )
    network = train(
        new_network,  # its own copy; its BatchNorm is changed to use the images of all ranks
        task,  # a Task: the training images
        recipe,
        store,  # device, workers, folder of checkpoints, receiver of messages
        seed=seed,
        name="detect_voc_c4",  # for messages and checkpoints
        # everything else that decides the weights:
        made_from={"backbone": store.digest_of(backbone), "images": images.digest(), "head": "c4"},
        precision="fp32",
        save_every_steps=1000,
    )
    for index, example in one_by_one(test_example, test.files, store, name=name):  # this rank's test images
        ...

The images of a step depend on (seed, step) alone, and the draws of an example on (seed, its position in the order), for
any number of ranks and workers. In a step, ranks may have different numbers of images, of different shapes; `Task.loss`
describes how the loss is then shared.

If an image or its labels cannot be read, the run ends with an error that names it. With loader.corrupt=skip the next
image with its own labels stands in for it in training, and an unreadable test image is left out; a message names each
such image and counts them.
"""

import contextlib
import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from caco import distributed
from caco.data.loaders.batches import called, mixed_seed, say_stand_ins, those_after
from caco.data.loaders.workers import in_order
from caco.data.sets.sources import Source, UnreadableImage
from caco.errors import UserError
from caco.evals.dense.recipe import Recipe
from caco.evals.features import FeatureStore, Precision
from caco.nn.norm import over_all_ranks
from caco.saying import amount, counting

LOOK_EVERY_STEPS = 20  # how often the loss is read; a GPU has to finish its work first
_ORDER, _EXAMPLE, _NETWORK = range(3)  # what is drawn; each has its own random stream


class Task(Protocol):
    """The training images of a network, and the loss on them.

    Attributes:
        files: the training images; their number is that of the examples, and messages name them.
    """

    files: Source

    @abstractmethod
    def example(self, index: int, seed: int) -> Any:
        """One image with its labels, augmented with draws that depend on `seed` alone: tensors on the CPU and plain
        values. Workers call this.

        Raises:
            UnreadableImage: the image or its labels cannot be read; the message names the file.
        """

    @abstractmethod
    def loss(self, network: nn.Module, examples: list[Any]) -> Tensor:
        """The loss of this rank's examples of a step, a scalar with gradient. A collective, called under the
        precision's autocast.

        The loss of all images of the step must be the mean of what the ranks return. If it divides by a number of
        pixels, say, each rank divides its sum by the number over all ranks (distributed.sum_) and multiplies by
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
    """Train a network; it is returned in eval mode, on the store's device. A collective.

    The result is deterministic on CPUs. If the store has a folder, there is a checkpoint every `save_every_steps` steps
    and at the end, and a call with the same arguments resumes from the last one, with the same bits.

    Args:
        network: it is trained in place; BatchNorm in it uses the images of all ranks for its statistics.
        name: name in messages and of the checkpoints.
        made_from: plain values: everything that decides the weights besides recipe, seed, precision and number of
            ranks.
        save_every_steps: steps between checkpoints; it does not change the result.
    Raises:
        UserError: a step has fewer images than there are ranks, the ranks see different checkpoints, or the loss is not
            finite. All ranks raise it.
        UnreadableImage: an image cannot be read. All ranks raise it.
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
        store.say(f"{name}: training on {amount(len(task.files), 'image')}, {recipe.shown()}")
    count = counting(store.say, f"{name}: step", len(rates), first)
    total = torch.zeros((), dtype=torch.float64, device=device)
    since = 0
    steps = batches(task, recipe.images, first, len(rates), store, seed=seed)
    with contextlib.closing(steps), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(first, len(rates)):
            # `on_each`, because an image that one rank cannot read must not leave the other ranks waiting.
            examples = distributed.on_each(lambda: next(steps))
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            # For dropout and other draws of the network.
            torch.manual_seed(mixed_seed(seed, _NETWORK, step, distributed.rank()))
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
            store.say(f"{name}: trained for {amount(len(rates), 'step')}, loss {mean:.4f}")
    return network.eval()


def batches(
    task: Task, images: int, first: int, last: int, store: FeatureStore, *, seed: int
) -> Generator[list[Any], None, None]:
    """This rank's examples of the steps `first` to `last` - 1, made in advance by workers. The caller has to close the
    generator.

    `train` trains on these; with another seed they serve to compute statistics afterwards.
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
    """Yields (index, example(index)) for this rank's images in order, made in advance by workers. Now and then a
    message reports the progress.

    Rank r of w has images r, r + w, r + 2 w, and so on; some ranks may have one image more than others. With
    loader.corrupt=skip an unreadable image gives None instead of an example, and a message names it.

    Args:
        verb: what is done with the images, for the messages.
        skip: number of this rank's images that are done already and are left out.
    Raises:
        UnreadableImage: `example` raised it.
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
    """The number of processes that read and augment: as many as training's loader has."""
    return getattr(store.loader, "num_workers", store.num_workers)


class _Steps:
    """Iterates over (step, positions, indices) of this rank's images in each step. The order of images is an endless
    sequence of permutations. A step may take the end of one permutation and the beginning of the next, so every step
    has the same number of images."""

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
    """Key of `_Steps` -> examples, and a pair (image, image that stands in for it) for each unreadable image. An
    UnreadableImage is returned instead if no image may stand in.
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
            return error  # the training process raises it; raised here, it would arrive as a page of traceback
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
    """Index -> example, or the UnreadableImage that prevented it."""

    def __init__(self, example: Callable[[int], Any]) -> None:
        self.example = example

    def __call__(self, index: int) -> Any:
        try:
            return self.example(index)
        except UnreadableImage as error:
            return error
