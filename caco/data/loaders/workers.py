"""Threads and forked processes that make batches in advance. They end cleanly: no run is harmed by the death of one of
them, and none waits for ever.

PyTorch's DataLoader passes tensors between processes through files in /dev/shm and sockets in TMPDIR. If /dev/shm is
small (64 MB in a container) or the socket's name is too long, a batch is lost and the run waits for it for ever. So
here batches are written to memory that is shared by forking, which has no such limits, and messages go through pipes.
"""

import contextlib
import copy
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any

from caco import errors
from caco.errors import UserError

PATIENCE_S = 600  # longest wait for a batch, as long as ranks wait for one another
_LOOK_S = 5.0  # how often a worker checks that its parent still exists
# Signals that a terminal or a scheduler sends to every process of a job.
_JOB_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP}
_fork = multiprocessing.get_context("fork")  # forked processes share the source's pixels and paths without copying them


def in_order(
    make: Callable[[Any], Any], keys: Iterable[Any], num_workers: int, *, ahead: int = 2, item_bytes: int = 0
) -> "Workers | Inline":
    """`make(key)` for each key, in order, made by `num_workers` processes, or in this process if that is 0. Arguments
    as in `Workers`.
    """
    return Workers(make, keys, num_workers, ahead=ahead, item_bytes=item_bytes) if num_workers else Inline(make, keys)


class Inline:
    """Has the interface of `Workers`, but makes each item in this process when it is needed."""

    def __init__(self, make: Callable[[Any], Any], keys: Iterable[Any]):
        self._make, self._keys = make, keys

    def __iter__(self) -> Iterator[Any]:
        return map(self._make, self._keys)

    def close(self) -> None:
        """Nothing to end."""


class Workers:
    """`make(key)` for each key, in order, made by processes in advance. Iterating again iterates over `keys` again.

    An item and all its arrays are valid only until the next item is requested, because their memory is reused.

    Args:
        make: called in the workers. Its results are pickled; numpy arrays in them go through shared memory if there is
            room.
        keys: each iteration over the workers iterates over these anew.
        num_workers: number of processes.
        ahead: number of keys that each worker has in advance.
        item_bytes: bytes of all arrays in one result, at most; what does not fit goes through a pipe.
    Raises:
        UserError: the memory or the processes cannot be had, or a worker ends or does not answer.
    """

    def __init__(
        self, make: Callable[[Any], Any], keys: Iterable[Any], num_workers: int, *, ahead: int, item_bytes: int = 0
    ):
        self._make, self._keys, self._num_workers = make, keys, num_workers
        self._in_flight = num_workers * ahead
        self._memory = _shared((self._in_flight + 1) * item_bytes)
        self._slots = [self._memory[i * item_bytes :][:item_bytes] for i in range(self._in_flight + 1)]
        self._started: list[_Worker] = []
        # The workers that owe a result and the slot that it will be in, in order.
        self._waiting: deque[tuple[_Worker, int]] = deque()

    def __iter__(self) -> Iterator[Any]:
        while self._waiting:  # from an earlier iteration that was not finished
            self._next()
        if not self._started:
            self._start()
        given = 0
        for key in self._keys:
            if len(self._waiting) == self._in_flight:
                made = self._next()
                self._give(given, key)
                given += 1
                yield made
            else:
                self._give(given, key)
                given += 1
        while self._waiting:
            yield self._next()

    def _start(self) -> None:
        # The workers start with these signals blocked: a signal that came before `_work` handles it would end a worker.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
        try:
            for _ in range(self._num_workers):
                self._started.append(_Worker(self._make, self._slots, [worker.connection for worker in self._started]))
        except OSError as error:
            self.close()
            raise UserError(
                f"num_workers={self._num_workers}: this machine cannot start more processes ({error.strerror});"
                " use fewer num_workers"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _give(self, number: int, key: Any) -> None:
        worker, slot = self._started[number % len(self._started)], number % len(self._slots)
        try:
            # A few bytes, so sending never waits for room in the pipe.
            worker.connection.send((slot, _packed(key, self._slots[slot])))
        except OSError as error:
            raise worker.ended() from error
        self._waiting.append((worker, slot))

    def _next(self) -> Any:
        """The next result.

        Raises:
            UserError: its worker has ended, or has not answered for PATIENCE_S seconds.
        """
        worker, slot = self._waiting.popleft()
        try:
            return worker.answer(self._slots[slot])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers; those that do not react are killed."""
        self._waiting.clear()
        for worker in self._started:
            worker.connection.close()
        deadline = time.monotonic() + _LOOK_S
        for worker in self._started:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join(_LOOK_S)
        self._started.clear()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


class _Worker:
    """One worker process and this process's end of the pipe to it."""

    def __init__(self, make: Callable[[Any], Any], slots: list[memoryview], others: list[Connection]):
        self.connection, theirs = _fork.Pipe()
        self.process = _fork.Process(
            target=_work, args=(make, slots, theirs, [*others, self.connection], os.getpid()), daemon=True
        )
        sys.stdout.flush()
        sys.stderr.flush()
        self.process.start()
        theirs.close()

    def answer(self, slot: memoryview) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            # Wait for both: a worker that was killed sends nothing through the pipe.
            ready = wait([self.connection, self.process.sentinel], timeout=max(0.0, deadline - time.monotonic()))
            if self.connection in ready:
                break
            if ready:
                raise self.ended()
            raise UserError(
                f"a worker process has been reading images for {PATIENCE_S} s without a result. Does the storage that"
                " they are on still answer? Then give the same command again"
            )
        try:
            made = _unpacked(self.connection.recv(), slot)
        except (EOFError, OSError) as error:
            raise self.ended() from error
        if isinstance(made, _Failure):
            raise (
                UserError(made.text)
                if made.is_for_user
                else RuntimeError(f"in a process that reads images:\n{made.text}")
            )
        return made

    def ended(self) -> UserError:
        self.process.join(_LOOK_S)
        code = self.process.exitcode
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        return UserError(
            f"a worker process that reads images was ended from outside, {how}, perhaps because memory ran out: fewer"
            " num_workers or a smaller prefetch need less memory. Then give the same command again"
        )


class _Failure:
    """An error that a worker raised; it is sent in the place of a result."""

    def __init__(self, error: Exception):
        self.is_for_user = isinstance(error, UserError) or errors.is_for_user(error)
        self.text = errors.message(error) if self.is_for_user else traceback.format_exc()


def _work(
    make: Callable[[Any], Any],
    slots: list[memoryview],
    connection: Connection,
    of_parent: list[Connection],
    parent: int,
) -> None:
    """The main function of a worker. It ends when its parent closes the pipe, asks for its end, or has died."""
    for end in of_parent:
        end.close()  # otherwise the pipe would stay open after the parent's death
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    _leave_signals_to_parent(parent)
    while True:
        try:
            if not connection.poll(_LOOK_S):
                if os.getppid() != parent:
                    return
                continue
            number, packed = connection.recv()
            # A copy, because the result will overwrite the key's arrays.
            key = copy.deepcopy(_unpacked(packed, slots[number]))
            connection.send(_packed(_made(make, key), slots[number]))
        except (EOFError, OSError):
            return


def _made(make: Callable[[Any], Any], key: Any) -> Any:
    try:
        return make(key)
    except Exception as error:
        return _Failure(error)


def _packed(made: Any, slot: memoryview) -> tuple[bytes, list[int]]:
    """Pickle an object. Its arrays are copied into the slot one after the other, as far as they fit; the result is the
    pickle and the sizes of the arrays in the slot.
    """
    sizes: list[int] = []
    first = 0

    def keep(buffer: pickle.PickleBuffer) -> bool:
        nonlocal first
        content = buffer.raw()
        if first + content.nbytes > len(slot):
            return True  # the array becomes part of the pickle
        slot[first : first + content.nbytes] = content
        first += content.nbytes
        sizes.append(content.nbytes)
        return False

    return pickle.dumps(made, protocol=5, buffer_callback=keep), sizes


def _unpacked(packed: tuple[bytes, list[int]], slot: memoryview) -> Any:
    content, sizes = packed
    ends = list(itertools.accumulate(sizes))
    return pickle.loads(content, buffers=[slot[end - size : end] for size, end in zip(sizes, ends, strict=True)])


def _shared(num_bytes: int) -> memoryview:
    """Memory that forked processes share. It has no name, so no limit of a file system applies.

    Raises:
        UserError: the machine does not give that much memory.
    """
    if num_bytes == 0:
        return memoryview(b"")
    try:
        return memoryview(mmap.mmap(-1, num_bytes))
    except (OSError, ValueError) as error:
        raise UserError(
            f"expected {num_bytes / 2**30:.1f} GiB of memory for batches that are made in advance, got none"
            f" ({error}): fewer num_workers or a smaller prefetch need less"
        ) from error


def _leave_signals_to_parent(parent: int) -> None:
    """Let only the training process decide when a worker ends, even if a scheduler sends a signal to all processes of a
    job.
    """
    for signum in _JOB_SIGNALS - {signal.SIGTERM}:
        signal.signal(signum, signal.SIG_IGN)
    # SIGTERM stays blocked and ends a worker only if the parent sent it, as multiprocessing does when the parent exits.
    # A program learns a signal's sender only in a thread that waits for the signal.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _JOB_SIGNALS - {signal.SIGTERM})
    threading.Thread(target=_end_if_parent_asks, args=(parent,), daemon=True).start()


def _end_if_parent_asks(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def ahead_of(make: Callable[[Any], Any], keys: Iterable[Any], ahead: int) -> Generator[Any, None, None]:
    """make(key) for each key, in order, made by one thread, up to `ahead` items in advance. Errors are raised here.

    There is no time limit for a result: the thread only computes, and a thread could not be ended anyway.
    """
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
