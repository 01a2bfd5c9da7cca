"""What every loader makes batches with: which images, whose random numbers, by the compiled views, in what memory."""

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
    """One step's images.

    views[v]: float32 [B, 3, H, W], normalised, channels_last. index: int64 [B], positions in the source; -1 of an image
    that only fills the last batch of a pass over all images (images.py). label: int64 [B], -1 unlabelled. patches:
    float32 [B, P, 3, h, w], of the view that is cut into P patches; None where none is.
    """

    views: list[torch.Tensor]
    index: torch.Tensor
    label: torch.Tensor
    patches: torch.Tensor | None = None

    def parts(self, count: int) -> "Iterator[Batch]":
        """The batch cut into so many equal ones."""
        views = [view.chunk(count) for view in self.views]
        patches = None if self.patches is None else self.patches.chunk(count)
        for part, (index, label) in enumerate(zip(self.index.chunk(count), self.label.chunk(count), strict=True)):
            yield Batch([view[part] for view in views], index, label, None if patches is None else patches[part])


def mixed_seed(*numbers: int) -> int:
    """64 well-mixed bits of any integers: neighbours, and the same numbers in another order, are as far apart as
    any.
    """
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


class Order:
    """Keys (epoch, indices) of one rank's part of each batch, so that workers need no state.

    steps: of an epoch. taken, own: images of it, of all ranks and of this one. size: of this rank's part of a whole
    batch.
    """

    def __init__(self, num_images: int, *, batch: int, seed: int, rank: int, world: int, drop_last: bool = True):
        self.num_images, self.batch, self.seed = num_images, batch, seed
        self.rank, self.world, self.size = rank, world, batch // world
        left = num_images % batch
        keep = not drop_last and left >= world  # every rank has an image of it
        self.steps, self.taken = num_images // batch + keep, num_images if keep else num_images - left
        self.own = sum(part.stop - part.start for part in map(self.part_of, range(self.steps)))
        self.epoch, self.start_step = 0, 0  # set before each iteration, as is
        self.chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return self.steps - self.start_step

    def images_of(self, step: int) -> int:
        """Images of a step, over all ranks."""
        return min(self.batch, self.taken - step * self.batch)

    def part_of(self, step: int) -> slice:
        """This rank's places in an epoch's order, of a step."""
        first, count = step * self.batch, self.images_of(step)
        return slice(first + self.rank * count // self.world, first + (self.rank + 1) * count // self.world)

    def permutation(self, epoch: int) -> np.ndarray:
        """All images in the order of an epoch that was given none."""
        return np.random.default_rng(mixed_seed(self.seed, epoch)).permutation(self.num_images)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        order = self.permutation(self.epoch) if self.chosen is None else self.chosen
        for step in range(self.start_step, self.steps):
            yield self.epoch, order[self.part_of(step)]


@dataclass(frozen=True)
class Pixels:
    """A batch as it was made: a view is uint8 [B, H, W, 3], a quarter of the bytes of floats, or normalised float32;
    patches come last, uint8 [B, P, H, W, 3].

    stand_ins: (index of an unreadable image, index of the one in its place) pairs.
    """

    views: list[torch.Tensor]
    index: torch.Tensor
    label: torch.Tensor
    stand_ins: list[tuple[int, int]] = field(default_factory=list)

    def __reduce__(self):
        """Between processes, as arrays: pickled tensors would go through files of /dev/shm."""
        return _received, (
            [view.numpy() for view in self.views],
            self.index.numpy(),
            self.label.numpy(),
            self.stand_ins,
        )


def _received(
    views: list[np.ndarray], index: np.ndarray, label: np.ndarray, stand_ins: list[tuple[int, int]]
) -> Pixels:
    """A batch from another process. The memory of its views is used again by a later one, that of what is kept is its
    own.
    """
    return Pixels(
        [torch.from_numpy(view) for view in views],
        torch.from_numpy(index.copy()),
        torch.from_numpy(label.copy()),
        stand_ins,
    )


def pixels(made: list[torch.Tensor], source: Source, indices: np.ndarray, taken: np.ndarray) -> Pixels:
    """A batch of the images `taken`, which differ from `indices` where one had to stand in."""
    labels = np.full(len(taken), -1) if source.labels is None else source.labels[taken]
    stand_ins = [(int(index), int(other)) for index, other in zip(indices, taken, strict=True) if index != other]
    return Pixels(made, torch.from_numpy(taken.copy()), torch.from_numpy(labels), stand_ins)


MAX_TRIES = 100  # images one after the other that cannot be read: then something else is wrong


def those_after(index: int, source: Source, *, same_class: bool = False) -> Iterator[int]:
    """The images that may stand in for an unreadable one, in order: the next ones, of its class where labels must stay
    what they are.

    Raises:
        UnreadableImage: none of the first ones can be read either.
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
    """The image that stands in for an unreadable one: its position and pixels. See `those_after`."""
    for other in those_after(index, source, same_class=same_class):
        with contextlib.suppress(UnreadableImage):
            return other, source.pixels(other)
    raise AssertionError("unreachable: those_after has raised")


def say_stand_ins(source: Source, pairs: Iterable[tuple[int, int]], known: dict[int, int]) -> None:
    """Names each image that another stands in for, once.

    Args:
        pairs: (the image, the one that stands in for it). known: those that were said; the others are added.
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
    """An image by its file, where it has one."""
    return str(source.path(index) or f"image {index} of {source.name}")


def refuse_unreadable(source: Source, corrupt: str) -> None:
    """Before anything begins, where it is known already which images cannot be read and none may stand in for them.

    Raises:
        UnreadableImage: the first one is named, and how many there are.
    """
    if source.damaged and corrupt == "fail":
        more = (
            f" {len(source.damaged) - 1} more of {source.name} cannot be read either."
            if len(source.damaged) > 1
            else ""
        )
        raise UnreadableImage(f"{next(iter(source.damaged.values()))}{more}")


class Compiled:
    """All views of a batch in one compiled call, in memory that is used again; floats for a CPU, bytes for a GPU.

    Where a recipe has operations that are not compiled, or patches, these follow, and it is bytes for both.
    """

    def __init__(self, views: Views, device: torch.device, num_threads: int):
        self.kinds, self.settings, self.num_threads = views.kinds, views.settings(), num_threads
        # A GPU is sent a quarter of the bytes and normalises there; on a CPU this call does it in passing.
        self._dtype = torch.float32 if device.type == "cpu" and views.compiled_alone else torch.uint8
        self._memory = _Memory(device)

    def __call__(self, rows: np.ndarray, samples: np.ndarray, stream: int) -> tuple[list[torch.Tensor], np.ndarray]:
        """A tensor [B, H, W, 3] a view, patches last, and bool [B]: which images could not be decoded."""
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


class _Memory:
    """Tensors whose memory is used again once nobody holds them any more: fresh pages cost more than what is done
    here.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.empty(shape, dtype=dtype, pin_memory=True)  # torch keeps it until its copy to the GPU is done
        size = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else _aligned(size)
        handed_out = memory.view()  # dies with the last tensor that shares it
        weakref.finalize(handed_out, free.append, memory).atexit = False
        return torch.from_numpy(handed_out).view(dtype).view(shape)


def _aligned(size: int) -> np.ndarray:
    """Bytes that begin a cache line: whole lines are written past the caches."""
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]
