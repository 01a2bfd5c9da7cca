"""Who makes batches ahead: a thread, or forked workers of a torch DataLoader, born, signalled and ended so that no run is hurt by one."""

import contextlib
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader

_JOB_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}  # a terminal or a scheduler sends them to every process of a job


def data_loader(maker: Any, keys: Iterable[Any], num_workers: int, **options: Any) -> DataLoader:
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


def begin(loader: Iterable[Any]) -> Iterator[Any]:
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


def ahead_of(make: Callable[[Any], Any], keys: Iterable[Any], ahead: int) -> Iterator[Any]:
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
