"""Batches of views whose randomness depends on (seed, epoch, sample, view) and on nothing else."""

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from caco import instructions
from caco.data import native
from caco.data.batches import Compiled, Order, Pixels, mixed_seed, pixels, those_after
from caco.data.beton import BetonImages
from caco.data.sources import Source, UnreadableImage
from caco.data.views import Views
from caco.errors import UserError
from caco.installed import command_to_install, is_installed

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

    def parts(self, count: int) -> "Iterator[Batch]":
        """The batch cut into so many equal ones."""
        for views, index, label in zip(
            zip(*(view.chunk(count) for view in self.views), strict=True), self.index.chunk(count), self.label.chunk(count), strict=True
        ):
            yield Batch(list(views), index, label)


class TorchLoader:
    """Settings of a loader that needs no more than torch; `bind` gives them data.

    Images in memory become views in one compiled call a batch, by threads; image files, and all images where nothing was
    compiled, in the forked workers of a torch DataLoader. The bits are the same.

    Args:
        num_workers: threads or processes that make views; 0 makes them where and when the training asks for them.
        prefetch: batches that are prepared ahead (by each process, where there are processes).
        corrupt: an image that cannot be read ends the run (fail), or the next one that can stands in for it (skip).
    Raises:
        ValueError: a negative number of workers, no batch ahead, another word for `corrupt`.
    """

    def __init__(self, *, num_workers: int = 2, prefetch: int = 4, corrupt: Literal["fail", "skip"] = "fail"):
        if num_workers < 0:
            raise UserError(f"num_workers: expected 0 or more, got {num_workers}")
        check_settings(prefetch, corrupt)
        self.num_workers, self.prefetch, self.corrupt = num_workers, prefetch, corrupt

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
        device = torch.device(device)

        def maker(order: Order) -> Iterable[Pixels]:
            if source.arrays is not None and native.library() is not None:
                return _InMemory(source, views, seed, order, self.num_workers, self.prefetch, device)
            return _data_loader(
                _ViewMaker(source, views, seed, self.corrupt),
                order,
                self.num_workers,
                prefetch_factor=self.prefetch if self.num_workers else None,
                persistent_workers=self.num_workers > 0,
                pin_memory=device.type == "cuda",
            )

        return BoundLoader(maker, source, views, batch=batch, seed=seed, rank=rank, world=world, device=device)


class FFCVLoader:
    """Settings of FFCV's loader over a .beton; `bind` gives it data. The same batches as `TorchLoader`'s, to the bit.

    Each JPEG is decoded once for all of its views, inside FFCV's pipeline (caco/data/ffcv_pipeline.py).

    Args:
        num_workers: threads that decode and make views.
        prefetch, corrupt: as of `TorchLoader`.
    Raises:
        ValueError: no thread, no batch ahead, another word for `corrupt`.
    """

    def __init__(self, *, num_workers: int = 2, prefetch: int = 4, corrupt: Literal["fail", "skip"] = "fail"):
        if num_workers < 1:
            raise UserError(f"num_workers: expected at least 1 with loader=ffcv, got {num_workers}")
        check_settings(prefetch, corrupt)
        self.num_workers, self.prefetch, self.corrupt = num_workers, prefetch, corrupt

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
        """As `TorchLoader.bind`.

        Raises:
            ValueError: also: the data are no .beton; FFCV or a compiled part is missing here.
        """
        if (missing := what_ffcv_lacks(source)) is not None:
            raise UserError(f"loader=ffcv: {missing}; loader=auto and loader=torch do without")
        from caco.data.ffcv_pipeline import FFCVBatches

        device = torch.device(device)

        def maker(order: Order) -> Iterable[Pixels]:
            return FFCVBatches(source, views, seed, order, self.num_workers, self.prefetch, self.corrupt, device)

        return BoundLoader(maker, source, views, batch=batch, seed=seed, rank=rank, world=world, device=device)


class AutoLoader:
    """FFCV where the data are a .beton and FFCV is installed, else what torch has; the batches are the same.

    Args:
        num_workers, prefetch, corrupt: as of `TorchLoader`.
    """

    def __init__(self, *, num_workers: int = 2, prefetch: int = 4, corrupt: Literal["fail", "skip"] = "fail"):
        self._torch = TorchLoader(num_workers=num_workers, prefetch=prefetch, corrupt=corrupt)
        self._settings = {"num_workers": max(1, num_workers), "prefetch": prefetch, "corrupt": corrupt}

    def bind(self, source: Source, views: Views, *, rank: int = 0, **options: Any) -> "BoundLoader":
        """As `TorchLoader.bind`; rank 0 says what was chosen."""
        missing = what_ffcv_lacks(source)
        if rank == 0:
            print(f"caco: views by {_chosen(source, missing)}", file=sys.stderr)
        loader = self._torch if missing is not None else FFCVLoader(**self._settings)
        return loader.bind(source, views, rank=rank, **options)


def _chosen(source: Source, missing: str | None) -> str:
    if missing is None:
        return "FFCV, compiled"
    how = f"Pillow (the compiled views {native.why_not()})" if native.library() is None else "the compiled views"
    if source.arrays is not None:
        return f"{how} of images in memory"
    return f"torch's DataLoader and {how}" + (f"; no FFCV: {missing}" if isinstance(source, BetonImages) else "")


def what_ffcv_lacks(source: Source) -> str | None:
    """Why FFCV cannot serve these data here, or None if it can."""
    if not isinstance(source, BetonImages):
        return "reads a .beton (data=beton), which python -m caco.data.write makes of any data"
    if native.library() is None:
        do = f"unset {instructions.VARIABLE}" if instructions.LEVEL == "torch" else "install a C++ compiler, then caco again"
        return f"needs the compiled views, which {native.why_not()}: {do}"
    if native.turbojpeg() is None:
        return "needs libturbojpeg (Debian: libturbojpeg0)"
    if not is_installed("ffcv"):
        return f"needs FFCV: {command_to_install('ffcv')} (Debian: with libopencv-dev, libturbojpeg0-dev and pkg-config)"
    return None


def check_settings(prefetch: int, corrupt: str) -> None:
    """Raises ValueError for what no loader takes."""
    if prefetch < 1:
        raise UserError(f"prefetch: expected at least 1 batch, got {prefetch}")
    if corrupt not in ("fail", "skip"):
        raise UserError(f"corrupt: expected fail or skip, got {corrupt!r}")


class BoundLoader:
    """What a loader's `bind` returns: `epoch` iterates, `close` ends the workers."""

    def __init__(
        self,
        maker: Callable[[Order], Iterable[Pixels]],
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
            raise UserError(
                f"batch: expected a positive multiple of the {world} processes that share it, got {batch}. "
                f"Try batch={max(world, batch // world * world)}."
            )
        if len(source) < batch:
            raise UserError(
                f"batch: expected at most the {len(source)} images of {source.name}, got {batch}. "
                "Lower batch or give more images."
            )
        self.steps_per_epoch = len(source) // batch
        self._views, self._device = views, device
        self._order = Order(len(source), batch=batch, seed=seed, rank=rank, world=world)
        self._loader = maker(self._order)
        self._stand_ins: dict[int, int] = {}
        self._running = _batches(iter(()), views, device, {})

    def epoch(self, epoch: int, start_step: int = 0, order: np.ndarray | None = None) -> Iterator[Batch]:
        """The batches of an epoch from a step on; negative epochs are further ones, with orders and views of their own.

        One at a time: the iterator of an earlier call ends when a later one begins.

        Args:
            order: positions of images, int64, in place of the epoch's own permutation; at least as many as an epoch takes.
        """
        if order is not None and (len(order) < self.steps_per_epoch * self._order.batch or order.min() < 0 or order.max() >= self._order.num_images):
            raise ValueError(
                f"order: expected at least {self.steps_per_epoch * self._order.batch} positions below {self._order.num_images}, got "
                f"{len(order)} of {order.min()} to {order.max()}"
            )
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step: expected 0..{self.steps_per_epoch}, got {start_step}")
        assert self._loader is not None, "the loader is closed"
        self._running.close()
        self._order.epoch, self._order.start_step, self._order.chosen = epoch, start_step, order
        self._running = _batches(_begin(self._loader), self._views, self._device, self._stand_ins)
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
        raise UserError(f"batch: expected at least 1, got {batch}")
    parts = [np.arange(i, min(i + batch, len(source))) for i in range(0, len(source), batch)]
    loader = _data_loader(_PlainMaker(source, views), parts, num_workers)
    for one in _batches(_begin(loader), views, torch.device("cpu"), {}):
        yield one.views[0], one.label


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


class _ViewMaker:
    """The dataset: (epoch, indices) to the pixels of all views."""

    def __init__(self, source: Source, views: Views, seed: int, corrupt: str):
        self.source, self.views, self.seed, self.corrupt = source, views, seed, corrupt

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Pixels | UnreadableImage:
        epoch, indices = key
        try:
            read = [self._read(index) for index in indices.tolist()]
        except UnreadableImage as error:
            return error  # raised by the process that trains: a worker's exception would arrive as a page of traceback
        made = self.views.batch_pixels([image for _, image in read], indices, mixed_seed(self.seed, epoch))
        taken = np.array([index for index, _ in read])
        return pixels([torch.from_numpy(view) for view in made], self.source, indices, taken)

    def _read(self, index: int) -> tuple[int, np.ndarray]:
        try:
            return index, np.asarray(self.source.image(index))
        except UnreadableImage:
            if self.corrupt == "fail":
                raise
        for candidate in those_after(index, len(self.source)):
            with contextlib.suppress(UnreadableImage):
                return candidate, np.asarray(self.source.image(candidate))
        raise UnreadableImage(f"{self.source.name}: expected an image that can be read, got none")


class _InMemory:
    """Batches of images in memory, each made by one compiled call, `ahead` of them before they are asked for."""

    def __init__(
        self, source: Source, views: Views, seed: int, keys: Iterable, num_workers: int, ahead: int, device: torch.device
    ):
        self.source, self.seed, self.keys = source, seed, keys
        self.ahead = ahead if num_workers else 0
        self.make_views = Compiled(views, device, max(1, num_workers))
        images = source.arrays
        mapped = isinstance(images, np.ndarray) and not images.flags.c_contiguous  # STL-10's, in an order of its own
        self.table = None if mapped else native.table(images)

    def __iter__(self) -> Iterator[Pixels]:
        return _ahead(self.make, self.keys, self.ahead)

    def make(self, key: tuple[int, np.ndarray]) -> Pixels:
        epoch, indices = key
        if self.table is None:
            images = np.ascontiguousarray(self.source.arrays[indices])
        rows = native.table(images) if self.table is None else self.table[indices]
        made, _ = self.make_views(rows, indices, mixed_seed(self.seed, epoch))
        return pixels(made, self.source, indices, indices)


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


class _PlainMaker:
    """The dataset of evaluations: indices to the pixels of plain views."""

    def __init__(self, source: Source, views: Views):
        self.source, self.views = source, views

    def __getitem__(self, indices: np.ndarray) -> Pixels | UnreadableImage:
        try:
            made = self._make(indices)
        except UnreadableImage as error:
            return error
        return pixels([torch.from_numpy(made)], self.source, indices, indices)

    def _make(self, indices: np.ndarray) -> np.ndarray:
        if not isinstance(self.source, BetonImages) or native.library() is None or native.turbojpeg() is None:
            return np.stack([self.views.plain_pixels(self.source.image(index)) for index in indices.tolist()])
        made, unreadable = self.views.plain_batch(self.source.rows(indices), num_threads=torch.get_num_threads())
        for row in np.flatnonzero(unreadable):
            raise self.source.unreadable(indices[row])
        return made


def _batches(
    made: Iterator[Pixels | UnreadableImage], views: Views, device: torch.device, stand_ins: dict[int, int]
) -> Generator[Batch, None, None]:
    try:
        for one in made:
            if isinstance(one, UnreadableImage):
                raise UnreadableImage(str(one))
            for index, other in one.stand_ins:
                if index not in stand_ins:
                    stand_ins[index] = other
                    print(
                        f"caco: image {index} cannot be read; image {other} stands in for it ({len(stand_ins)} such so far)",
                        file=sys.stderr,
                    )
            yield Batch(
                [views.normalise(view.to(device, non_blocking=True)) for view in one.views],
                one.index.to(device, non_blocking=True),
                one.label.to(device, non_blocking=True),
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
