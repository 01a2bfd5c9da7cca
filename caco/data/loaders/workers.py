"""Who makes batches ahead: a thread, or processes that are forked, fed and waited for so that no run is hurt by one,
and none waits for ever.

PyTorch's DataLoader hands tensors over through files in /dev/shm and sockets in TMPDIR: where the one is small (64 MB
in a container) or the other's name is long, a batch is lost and the run waits for it for ever. So batches go through
memory that is shared by being forked, which neither limits, and messages through pipes.
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

PATIENCE_S = 600  # of whoever waits for a batch: as long as ranks wait for one another
_LOOK_S = 5.0  # how often a worker looks whether its parent is still there
# A terminal or a scheduler sends them to every process of a job.
_JOB_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP}
_fork = multiprocessing.get_context("fork")  # the source's pixels and paths are shared, not copied


def in_order(
    make: Callable[[Any], Any], keys: Iterable[Any], num_workers: int, *, ahead: int = 2, item_bytes: int = 0
) -> "Workers | Inline":
    """`make(key)` of each key in order, made by this many processes or, without any, where it is asked for. Arguments
    as of `Workers`.
    """
    return Workers(make, keys, num_workers, ahead=ahead, item_bytes=item_bytes) if num_workers else Inline(make, keys)


class Inline:
    """As `Workers`, without one."""

    def __init__(self, make: Callable[[Any], Any], keys: Iterable[Any]):
        self._make, self._keys = make, keys

    def __iter__(self) -> Iterator[Any]:
        return map(self._make, self._keys)

    def close(self) -> None:
        """Nothing to end."""


class Workers:
    """`make(key)` of each key in order, by processes that are ahead of the caller. Iterate again for what `keys` then
    says.

    An item that comes out of an iteration, and all its arrays, is good until the next one is asked for: its memory is
    used again.

    Args:
        make: called in the workers; its results are pickled, numpy arrays in them shared where there is room.
        keys: iterated over anew by each iteration.
        ahead: keys that are given to each worker ahead of the caller.
        item_bytes: of the arrays of one result, at most; what is larger goes through a pipe.
    """

    def __init__(
        self, make: Callable[[Any], Any], keys: Iterable[Any], num_workers: int, *, ahead: int, item_bytes: int = 0
    ):
        self._make, self._keys, self._num_workers = make, keys, num_workers
        self._in_flight = num_workers * ahead
        self._memory = _shared((self._in_flight + 1) * item_bytes)
        self._slots = [self._memory[i * item_bytes :][:item_bytes] for i in range(self._in_flight + 1)]
        self._started: list[_Worker] = []
        self._waiting: deque[tuple[_Worker, int]] = (
            deque()
        )  # workers that owe a result, and where it will lie; in order

    def __iter__(self) -> Iterator[Any]:
        while self._waiting:  # of an iteration that was left early
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
        # Born with the signals blocked: one that came before `_work` handles them would end a worker.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
        try:
            for _ in range(self._num_workers):
                self._started.append(_Worker(self._make, self._slots, [worker.connection for worker in self._started]))
        except OSError as error:
            self.close()
            raise UserError(
                f"num_workers={self._num_workers}: this machine starts no more processes ({error.strerror}); expected"
                " fewer num_workers"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _give(self, number: int, key: Any) -> None:
        worker, slot = self._started[number % len(self._started)], number % len(self._slots)
        try:
            worker.connection.send(
                (slot, _packed(key, self._slots[slot]))
            )  # a few bytes, which never wait for room in the pipe
        except OSError as error:
            raise worker.ended() from error
        self._waiting.append((worker, slot))

    def _next(self) -> Any:
        """The result that is due.

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
        """End the workers, those too that do not listen."""
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
    """One process and this end of its pipe."""

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
            # Waited for both, or for a worker that was killed one would wait in vain.
            ready = wait([self.connection, self.process.sentinel], timeout=max(0.0, deadline - time.monotonic()))
            if self.connection in ready:
                break
            if ready:
                raise self.ended()
            raise UserError(
                f"a process has read images for {PATIENCE_S} s without an end. Does the storage that they are on still"
                " answer? Then give the same command again"
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
            f"a process that reads images was ended from outside, {how}, perhaps for want of memory: fewer num_workers"
            " or a smaller prefetch need less. Then give the same command again"
        )


class _Failure:
    """What a worker raised, in place of a result."""

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
    """A worker's life: it ends when its parent closes the pipe, tells it to, or is gone."""
    for end in of_parent:
        end.close()  # or the parent's death would not close it
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
            key = copy.deepcopy(_unpacked(packed, slots[number]))  # the result will lie where its arrays do
            connection.send(_packed(_made(make, key), slots[number]))
        except (EOFError, OSError):
            return


def _made(make: Callable[[Any], Any], key: Any) -> Any:
    try:
        return make(key)
    except Exception as error:
        return _Failure(error)


def _packed(made: Any, slot: memoryview) -> tuple[bytes, list[int]]:
    """Anything pickled, and the sizes of those of its arrays that were put into the slot instead, one behind the
    other.
    """
    sizes: list[int] = []
    first = 0

    def keep(buffer: pickle.PickleBuffer) -> bool:
        nonlocal first
        content = buffer.raw()
        if first + content.nbytes > len(slot):
            return True  # into the pickle
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
    """Memory that forked processes share; it has no name, so no file system limits it.

    Raises:
        UserError: there is not so much.
    """
    if num_bytes == 0:
        return memoryview(b"")
    try:
        return memoryview(mmap.mmap(-1, num_bytes))
    except (OSError, ValueError) as error:
        raise UserError(
            f"expected {num_bytes / 2**30:.1f} GiB of memory for the batches that are made ahead, got none ({error}):"
            " fewer num_workers or a smaller prefetch need less"
        ) from error


def _leave_signals_to_parent(parent: int) -> None:
    """Let the process that trains alone decide when a worker ends, also when a scheduler signals all of a job's
    processes.
    """
    for signum in _JOB_SIGNALS - {signal.SIGTERM}:
        signal.signal(signum, signal.SIG_IGN)
    # TERM, still blocked, ends a worker only if the parent sent it (as multiprocessing does when the parent exits).
    # Only a thread that waits for the signal learns its sender.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _JOB_SIGNALS - {signal.SIGTERM})
    threading.Thread(target=_end_if_parent_asks, args=(parent,), daemon=True).start()


def _end_if_parent_asks(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def ahead_of(make: Callable[[Any], Any], keys: Iterable[Any], ahead: int) -> Generator[Any, None, None]:
    """make(key) of each key in order, by one thread that is `ahead` of the caller; what it raises is raised here.

    Its results are waited for without a limit: it does nothing but compute, and could not be ended.
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
