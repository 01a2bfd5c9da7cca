"""Batches of views whose randomness depends on (seed, epoch, sample, view) and on nothing else."""

import contextlib
import hashlib
import math
import os
import signal
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from caco.data import native
from caco.data.sources import Source, UnreadableImage
from caco.data.views import Views

_JOB_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}  # a terminal or a scheduler sends them to every process of a job


@dataclass(frozen=True)
class Batch:
    """One step's images.

    views[v]: float32 [B, 3, H, W], normalised, channels_last. index: int64 [B], positions in the source. label: int64
    [B], -1 unlabelled.
    """

    views: list[torch.Tensor]
    index: torch.Tensor
    label: torch.Tensor


class TorchLoader:
    """Settings of a loader that needs no more than torch; `bind` gives them data.

    Images in memory become views in one compiled call a batch, by threads; image files, and all images where nothing was
    compiled, in the forked workers of a torch DataLoader. The bits are the same.

    Args:
        num_workers: threads or processes that make views; 0 makes them where and when the training asks for them.
        prefetch: batches that each worker prepares ahead.
    Raises:
        ValueError: a negative number of workers, no batch ahead.
    """

    def __init__(self, *, num_workers: int = 2, prefetch: int = 4):
        if num_workers < 0:
            raise ValueError(f"num_workers: expected 0 or more, got {num_workers}")
        if prefetch < 1:
            raise ValueError(f"prefetch: expected at least 1 batch, got {prefetch}")
        self.num_workers = num_workers
        self.prefetch = prefetch

    def bind(
        self,
        source: Source,
        views: Views,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> "BoundLoader":
        """One rank's part of every global batch of `batch` images, on `device`.

        Raises:
            ValueError: fewer images than one batch; a batch that the ranks cannot share evenly.
        """
        return BoundLoader(self, source, views, batch=batch, seed=seed, rank=rank, world=world, device=torch.device(device))


class BoundLoader:
    """What `TorchLoader.bind` returns: `epoch` iterates, `close` ends the workers."""

    def __init__(
        self,
        settings: TorchLoader,
        source: Source,
        views: Views,
        *,
        batch: int,
        seed: int,
        rank: int,
        world: int,
        device: torch.device,
    ):
        assert 0 <= rank < world
        if batch < 1 or batch % world:
            raise ValueError(
                f"batch: expected a positive multiple of the {world} processes that share it, got {batch}. "
                f"Try batch={max(world, batch // world * world)}."
            )
        if len(source) < batch:
            raise ValueError(
                f"batch: expected at most the {len(source)} images of {source.name}, got {batch}. "
                "Lower batch or give more images."
            )
        self.steps_per_epoch = len(source) // batch
        self._views, self._device = views, device
        self._order = _Order(len(source), batch=batch, seed=seed, rank=rank, world=world)
        workers = settings.num_workers
        if source.arrays is not None and native.library() is not None:
            self._loader = _InMemory(source, views, seed, self._order, workers, settings.prefetch, device)
        else:
            self._loader = _data_loader(
                _ViewMaker(source, views, seed),
                self._order,
                workers,
                prefetch_factor=settings.prefetch if workers else None,
                persistent_workers=workers > 0,
                pin_memory=device.type == "cuda",
            )
        self._running = _batches(iter(()), views, device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on; negative epochs are further ones, with orders and views of their own.

        One at a time: the iterator of an earlier call ends when a later one begins.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step: expected 0..{self.steps_per_epoch}, got {start_step}")
        assert self._loader is not None, "the loader is closed"
        self._running.close()
        self._order.epoch, self._order.start_step = epoch, start_step
        self._running = _batches(_begin(self._loader), self._views, self._device)
        return self._running

    def close(self) -> None:
        """End the workers."""
        self._running.close()
        self._loader = None  # the last reference to DataLoader's iterator, whose deletion ends them


def plain_batches(
    source: Source, views: Views, *, batch: int, num_workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every image once, in order, as evaluations see it: (images float32 [b, 3, H, W], labels int64 [b], -1 unlabelled).

    The last batch may be smaller.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    parts = [np.arange(i, min(i + batch, len(source))) for i in range(0, len(source), batch)]
    loader = _data_loader(_PlainMaker(source, views), parts, num_workers)
    for one in _batches(_begin(loader), views, torch.device("cpu")):
        yield one.views[0], one.label


def mixed_seed(*numbers: int) -> int:
    """64 well-mixed bits of any integers: neighbours, and the same numbers in another order, are as far apart as any."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


def _data_loader(maker: Any, keys: Iterable[Any], num_workers: int, **options: Any) -> DataLoader:
    """A DataLoader that takes one key a batch, and draws nothing from the caller's generators."""
    with _any_number_of_workers():
        return DataLoader(
            maker,
            sampler=keys,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            worker_init_fn=_start_worker,
            # forked: the source's pixels and paths are shared, not copied
            multiprocessing_context="fork" if num_workers else None,
            generator=torch.Generator(),
            **options,
        )


def _begin(loader: DataLoader) -> Iterator[Any]:
    # Workers are born with the signals blocked: one that came before `_start_worker` would end them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        with _any_number_of_workers():
            return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _any_number_of_workers() -> Iterator[None]:
    """More workers than cores is the user's choice, and harmless: without DataLoader's warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


@dataclass(frozen=True)
class _Pixels:
    """A batch as workers send it: uint8 [B, H, W, 3] a view, a quarter of the bytes of floats; normalised where it is used."""

    views: list[torch.Tensor]
    index: torch.Tensor
    label: torch.Tensor

    def pin_memory(self) -> "_Pixels":  # DataLoader calls it by this name
        return _Pixels([view.pin_memory() for view in self.views], self.index.pin_memory(), self.label.pin_memory())


class _Order:
    """The sampler: keys (epoch, indices) of one rank's part of each batch, so that workers need no state."""

    def __init__(self, num_images: int, *, batch: int, seed: int, rank: int, world: int):
        self.num_images, self.batch, self.seed = num_images, batch, seed
        self.part = slice(rank * batch // world, (rank + 1) * batch // world)
        self.epoch, self.start_step = 0, 0  # set before each iteration

    def __len__(self) -> int:
        return self.num_images // self.batch - self.start_step

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        order = np.random.default_rng(mixed_seed(self.seed, self.epoch)).permutation(self.num_images)
        for step in range(self.start_step, self.num_images // self.batch):
            yield self.epoch, order[step * self.batch : (step + 1) * self.batch][self.part]


class _ViewMaker:
    """The dataset: (epoch, indices) to the pixels of all views."""

    def __init__(self, source: Source, views: Views, seed: int):
        self.source, self.views, self.seed = source, views, seed

    def __getitem__(self, key: tuple[int, np.ndarray]) -> _Pixels | UnreadableImage:
        epoch, indices = key
        try:
            images = [np.asarray(self.source.image(index)) for index in indices.tolist()]
        except UnreadableImage as error:
            return error  # raised by the process that trains: a worker's exception would arrive as a page of traceback
        made = self.views.batch_pixels(images, indices, mixed_seed(self.seed, epoch))
        return _pixels([torch.from_numpy(view) for view in made], self.source, indices)


class _InMemory:
    """Batches of images in memory, each made by threads in one compiled call, `ahead` of them before they are asked for."""

    def __init__(
        self, source: Source, views: Views, seed: int, keys: Iterable, num_workers: int, ahead: int, device: torch.device
    ):
        self.source, self.seed, self.keys, self.device = source, seed, keys, device
        self.num_workers, self.ahead = num_workers, ahead
        self.sizes, self.settings = views.sizes, views.settings()
        self.memory = _Memory(device)
        images = source.arrays
        mapped = isinstance(images, np.ndarray) and not images.flags.c_contiguous  # STL-10's, in an order of its own
        self.table = None if mapped else native.table(images)

    def __iter__(self) -> Iterator[_Pixels]:
        return _ahead(self.make, self.keys, self.ahead if self.num_workers else 0)

    def make(self, key: tuple[int, np.ndarray]) -> _Pixels:
        epoch, indices = key
        if self.table is None:
            images = np.ascontiguousarray(self.source.arrays[indices])
        rows = native.table(images) if self.table is None else self.table[indices]
        # A GPU is sent bytes and normalises there; on a CPU the compiled views do it in passing.
        dtype = torch.float32 if self.device.type == "cpu" else torch.uint8
        made = [self.memory.take((len(indices), size, size, 3), dtype) for size in self.sizes]
        native.make_views(
            self.settings,
            rows,
            indices,
            mixed_seed(self.seed, epoch),
            [view.numpy() for view in made],
            num_threads=max(1, self.num_workers),
        )
        return _pixels(made, self.source, indices)


def _ahead(make: Callable[[Any], Any], keys: Iterable[Any], ahead: int) -> Iterator[Any]:
    """make(key) of each key in order, by one thread that is `ahead` of the caller; what it raises is raised here."""
    if ahead == 0:
        yield from map(make, keys)
        return
    with ThreadPoolExecutor(1) as thread:
        waiting: deque = deque()
        try:
            for key in keys:
                waiting.append(thread.submit(make, key))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _Memory:
    """Tensors whose memory is used again once nobody holds them any more: fresh pages cost more than what is done here."""

    def __init__(self, device: torch.device):
        self._device = device
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.empty(shape, dtype=dtype, pin_memory=True)  # torch keeps it until its copy to the GPU is done
        size = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else np.empty(size, np.uint8)
        handed_out = memory.view()  # dies with the last tensor that shares it
        weakref.finalize(handed_out, free.append, memory).atexit = False
        return torch.from_numpy(handed_out).view(dtype).view(shape)


class _PlainMaker:
    def __init__(self, source: Source, views: Views):
        self.source, self.views = source, views

    def __getitem__(self, indices: np.ndarray) -> _Pixels | UnreadableImage:
        try:
            made = np.stack([self.views.plain_pixels(self.source.image(index)) for index in indices.tolist()])
        except UnreadableImage as error:
            return error
        return _pixels([torch.from_numpy(made)], self.source, indices)


def _pixels(made: list[torch.Tensor], source: Source, indices: np.ndarray) -> _Pixels:
    labels = np.full(len(indices), -1) if source.labels is None else source.labels[indices]
    return _Pixels(made, torch.from_numpy(indices.copy()), torch.from_numpy(labels))


def _batches(
    made: Iterator[_Pixels | UnreadableImage], views: Views, device: torch.device
) -> Generator[Batch, None, None]:
    try:
        for pixels in made:
            if isinstance(pixels, UnreadableImage):
                raise UnreadableImage(str(pixels))
            yield Batch(
                [views.normalise(view.to(device, non_blocking=True)) for view in pixels.views],
                pixels.index.to(device, non_blocking=True),
                pixels.label.to(device, non_blocking=True),
            )
    finally:
        # An exception's traceback keeps this frame. With DataLoader's iterator in it, that would be left to the garbage
        # collector, where it fails to tell its workers to end and waits five seconds for each.
        del made


def _as_it_is(pixels: Any) -> Any:
    return pixels


def _start_worker(worker: int) -> None:
    """Let the process that trains alone decide when a worker ends, also when a scheduler signals all of a job's processes."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    # TERM, still blocked, ends a worker only if the parent sent it (as multiprocessing does when the parent exits).
    # Only a thread that waits for the signal learns its sender.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _JOB_SIGNALS - {signal.SIGTERM})
    threading.Thread(target=_end_if_parent_asks, args=(os.getppid(),), daemon=True).start()


def _end_if_parent_asks(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
