"""What all loaders share: the order of images, a batch and its memory, images that stand in for unreadable ones, and
the call of the compiled views."""

import contextlib
import hashlib
import math
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from caco.data.sets.sources import Source, UnreadableImage
from caco.data.views import native
from caco.data.views.augmentation import Views


@dataclass(frozen=True)
class Batch:
    """The images of one step.

    Attributes:
        views: for each view float32 [B, 3, H, W], normalised, channels_last; C instead of 3 channels for images with
            data.channels=C.
        index: int64 [B], positions in the source. -1 marks an image that only fills up the last batch of a pass over
            all images (images.py).
        label: int64 [B]; -1 means unlabelled.
        patches: float32 [B, P, 3, h, w], the P patches of the view that is cut; None if no view is cut.
    """

    views: list[torch.Tensor]
    index: torch.Tensor
    label: torch.Tensor
    patches: torch.Tensor | None = None

    def parts(self, count: int) -> "Iterator[Batch]":
        """Divide the batch into `count` parts of equal size."""
        views = [view.chunk(count) for view in self.views]
        patches = None if self.patches is None else self.patches.chunk(count)
        for part, (index, label) in enumerate(zip(self.index.chunk(count), self.label.chunk(count), strict=True)):
            yield Batch([view[part] for view in views], index, label, None if patches is None else patches[part])


def mixed_seed(*numbers: int) -> int:
    """Mix any integers into 64 bits that look random. Neighbouring integers, or the same integers in another order,
    give unrelated results.
    """
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


class Order:
    """Iterates over (epoch, indices) for one rank: its share of each batch. Whoever makes a batch needs no other state.

    Attributes:
        epoch, start_step: where the next iteration begins.
        chosen: int64, an order of images to use instead of the epoch's own; None uses its own.
        steps: number of steps of an epoch.
        taken, own: number of images that an epoch uses, over all ranks and on this rank.
        size: number of images of this rank in a whole batch.
    """

    def __init__(self, num_images: int, *, batch: int, seed: int, rank: int, world: int, drop_last: bool = True):
        self.num_images, self.batch, self.seed = num_images, batch, seed
        self.rank, self.world, self.size = rank, world, batch // world
        left = num_images % batch
        keep = not drop_last and left >= world  # the smaller last batch is used only if every rank gets an image of it
        self.steps, self.taken = num_images // batch + keep, num_images if keep else num_images - left
        self.own = sum(part.stop - part.start for part in map(self.part_of, range(self.steps)))
        self.epoch, self.start_step = 0, 0  # set before each iteration, and so is `chosen`
        self.chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return self.steps - self.start_step

    def images_of(self, step: int) -> int:
        """Number of images in this step, over all ranks."""
        return min(self.batch, self.taken - step * self.batch)

    def part_of(self, step: int) -> slice:
        """The places of this rank's images of this step in the epoch's order."""
        first, count = step * self.batch, self.images_of(step)
        return slice(first + self.rank * count // self.world, first + (self.rank + 1) * count // self.world)

    def permutation(self, epoch: int) -> np.ndarray:
        """The epoch's own order of all images, int64 [N]."""
        return np.random.default_rng(mixed_seed(self.seed, epoch)).permutation(self.num_images)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        order = self.permutation(self.epoch) if self.chosen is None else self.chosen
        for step in range(self.start_step, self.steps):
            yield self.epoch, order[self.part_of(step)]


@dataclass(frozen=True)
class Pixels:
    """A batch before it is put on its device. Each view is uint8 [B, H, W, 3], a quarter of the bytes of floats, or
    normalised float32. Patches, if there are any, come last, uint8 [B, P, H, W, 3].

    Attributes:
        stand_ins: (index of an unreadable image, index of the image used instead) pairs.
    """

    views: list[torch.Tensor]
    index: torch.Tensor
    label: torch.Tensor
    stand_ins: list[tuple[int, int]] = field(default_factory=list)

    def __reduce__(self):
        """Pickle as arrays, because pickled tensors travel between processes through files in /dev/shm."""
        return _received, (
            [view.numpy() for view in self.views],
            self.index.numpy(),
            self.label.numpy(),
            self.stand_ins,
        )


def _received(
    views: list[np.ndarray], index: np.ndarray, label: np.ndarray, stand_ins: list[tuple[int, int]]
) -> Pixels:
    """Unpickle a batch from another process. A later batch will reuse the memory of the views, so what outlives the
    batch, index and labels, is copied.
    """
    return Pixels(
        [torch.from_numpy(view) for view in views],
        torch.from_numpy(index.copy()),
        torch.from_numpy(label.copy()),
        stand_ins,
    )


def pixels(made: list[torch.Tensor], source: Source, indices: np.ndarray, taken: np.ndarray) -> Pixels:
    """A batch of the images `taken`; these differ from the requested `indices` where an image stands in for another."""
    labels = np.full(len(taken), -1) if source.labels is None else source.labels[taken]
    stand_ins = [(int(index), int(other)) for index, other in zip(indices, taken, strict=True) if index != other]
    return Pixels(made, torch.from_numpy(taken.copy()), torch.from_numpy(labels), stand_ins)


MAX_TRIES = 100  # after this many unreadable images in a row, the cause is something else than single damaged files


def those_after(index: int, source: Source, *, same_class: bool = False) -> Iterator[int]:
    """The images that may stand in for an unreadable one, in order: the images that follow it, or only those of its
    class if labels matter.

    Raises:
        UnreadableImage: the caller has used up all candidates, at most MAX_TRIES.
    """
    count, tried = len(source), 0
    labels = source.labels if same_class else None
    for other in ((index + step) % count for step in range(1, count)):
        if labels is None or np.array_equal(labels[other], labels[index]):
            if tried == MAX_TRIES:
                break
            tried += 1
            yield other
    raise UnreadableImage(
        f"{source.name}: expected an image that can be read in place of {called(source, index)}, got none among the"
        f" {tried} {'of its class ' if labels is not None else ''}that follow it. Are the images still where they were?"
    )


def first_readable(index: int, source: Source, *, same_class: bool = False) -> tuple[int, np.ndarray]:
    """Position and pixels of the image that stands in for an unreadable one. See `those_after`."""
    for other in those_after(index, source, same_class=same_class):
        with contextlib.suppress(UnreadableImage):
            return other, source.pixels(other)
    raise AssertionError("unreachable: those_after has raised")


def readable(index: int, source: Source, corrupt: str, *, same_class: bool = False) -> tuple[int, np.ndarray]:
    """Position and pixels of an image; if it cannot be read and `corrupt` is skip, those of the image that stands in
    for it.

    Raises:
        UnreadableImage: the image cannot be read, and `corrupt` is fail or no other image can stand in for it.
    """
    try:
        return index, source.pixels(index)
    except UnreadableImage:
        if corrupt == "fail":
            raise
    return first_readable(index, source, same_class=same_class)


def say_stand_ins(source: Source, pairs: Iterable[tuple[int, int]], known: dict[int, int]) -> None:
    """Print a message for each new image that another image stands in for.

    Args:
        pairs: (unreadable image, image that stands in for it).
        known: the pairs that were printed already; new ones are added.
    """
    for index, other in pairs:
        if index not in known:
            known[index] = other
            print(
                f"caco: image {index} cannot be read; image {other} stands in for it ({len(known)} such so far):"
                f" {called(source, index)}",
                file=sys.stderr,
            )


def called(source: Source, index: int) -> str:
    """A name for an image in messages: its file if it has one of its own."""
    return str(source.path(index) or f"image {index} of {source.name}")


def refuse_unreadable(source: Source, corrupt: str) -> None:
    """Fail before training starts, if it is known already that images cannot be read and none may stand in for them.

    Raises:
        UnreadableImage: names the first such image and counts the others.
    """
    if source.damaged and corrupt == "fail":
        more = (
            f" {len(source.damaged) - 1} more of {source.name} cannot be read either."
            if len(source.damaged) > 1
            else ""
        )
        raise UnreadableImage(f"{next(iter(source.damaged.values()))}{more}")


class Compiled:
    """Makes all views of a batch in one compiled call, in memory that is reused: normalised floats for a CPU, bytes for
    a GPU.

    If steps follow that are not compiled (patches, operations in `then`, other colour spaces), the results are bytes on
    both.
    """

    def __init__(self, views: Views, device: torch.device, num_threads: int):
        self.kinds, self.settings, self.num_threads = views.kinds, views.settings(), num_threads
        # Bytes are a quarter of the data to send to a GPU, which normalises them there. On a CPU, the compiled call
        # normalises at little extra cost.
        self._dtype = torch.float32 if device.type == "cpu" and views.compiled_alone else torch.uint8
        self._memory = Memory(device)

    def __call__(self, rows: np.ndarray, samples: np.ndarray, stream: int) -> tuple[list[torch.Tensor], np.ndarray]:
        """Make the views: a tensor [B, H, W, 3] for each view, patches last; and bool [B], which images could not be
        decoded."""
        kinds = self.kinds
        drawn = [self._memory.take(shape, self._dtype) for shape in kinds.shapes(len(rows))]
        out = [view.numpy() for view in drawn]
        unreadable = native.make_views(self.settings, rows, samples, stream, out, num_threads=self.num_threads)
        patches = None if kinds.cut is None else self._memory.take(kinds.shape_of_patches(len(rows)), torch.uint8)
        kinds.finish(
            out, samples, stream, patches=None if patches is None else patches.numpy(), num_threads=self.num_threads
        )
        made = [view for v, view in enumerate(drawn) if v != kinds.cut]
        return made if patches is None else [*made, patches], unreadable


class Memory:
    """Tensors whose memory is reused once nobody holds them, because fresh memory pages cost more time than making the
    views.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.empty(shape, dtype=dtype, pin_memory=True)  # torch keeps it until its copy to the GPU is done
        size = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(size, [])
        try:
            memory = free.pop()
        except IndexError:  # tried instead of asked, because several threads may take memory at the same time
            memory = _aligned(size)
        handed_out = memory.view()  # freed when the last tensor that shares it is freed
        weakref.finalize(handed_out, free.append, memory).atexit = False
        return torch.from_numpy(handed_out).view(dtype).view(shape)


def _aligned(size: int) -> np.ndarray:
    """Memory that starts at a cache line, so that the compiled code can write whole lines past the caches."""
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]
