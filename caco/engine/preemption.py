"""Handles signals to stop, from a scheduler or a user: sets a flag that the training loop reads, and ends the process
after the loop has saved.

SLURM sends SIGUSR2 ahead of a time limit or a preemption (`--signal`). SIGTERM comes from `scontrol requeue`, from
preemption on clusters that send nothing else, from `scancel`, and from any user's `kill`. SIGHUP comes when the
terminal is closed or the connection to it is lost; under nohup, with which a run is meant to go on then, SIGHUP stays
ignored.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], Any] | int | None


class Stopped(Exception):
    """The run received a signal to stop and has saved itself; not an error."""

    def __init__(self, at: str, signum: int | None):
        name = signal.Signals(signum).name if signum else "a signal to another rank"
        super().__init__(f"stopped by {name} {at}, which is saved")
        self.signum = signum


class Stop:
    """Within `with`, a signal to stop sets a flag instead of ending the process. The training loop asks `requested` at
    the end of each step. Before the loop has begun, there is nothing to save and the work may take long, so the signal
    is obeyed at once.
    """

    def __init__(self):
        self.signum: int | None = None
        self.has_begun = False  # the training loop sets this when it begins
        self._before: dict[int, Handler] = {}
        self._terminals: list[int] = []

    def requested(self) -> bool:
        """Whether this process received a signal to stop; the ranks of a run then agree among themselves."""
        return self.signum is not None

    def __enter__(self) -> "Stop":
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        self._nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        heard = [signum for signum in SIGNALS if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN]
        self._before = {signum: signal.signal(signum, self._note) for signum in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        os.close(self._nowhere)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        for stream in self._terminals:
            if not os.isatty(stream):  # the terminal is gone, and printing to it would fail before the run is saved
                os.dup2(self._nowhere, stream)
        if not self.has_begun:
            self._obey(signum, frame)

    def _obey(self, signum: int, frame: FrameType | None) -> None:
        """Call the handler that the signal had before, such as submitit's; without one, end this process."""
        handler = self._before.get(signum)
        if callable(handler):
            handler(signum, frame)
            return
        with contextlib.suppress(OSError):  # the terminal may be gone
            name = signal.Signals(signum).name
            print(f"caco: stopped by {name} before its first step here; the same command begins again", file=sys.stderr)
        sys.exit(128 + signum)


def leave(stopped: Stopped, *, is_first_rank: bool) -> NoReturn:
    """End this process so that the run can go on: in the queue of the scheduler that started it, or by the user's next
    command.

    Must be called outside `with Stop()`, where SIGUSR2 has submitit's handler again if submitit started this process.
    """
    executor = os.environ.get("SUBMITIT_EXECUTOR")
    if executor is None or (executor == "local" and stopped.signum in (signal.SIGTERM, signal.SIGHUP)):
        if is_first_rank:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"caco: {stopped}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + (stopped.signum or signal.SIGTERM))
    if not is_first_rank:
        sys.exit(0)
    if executor == "slurm" and not _still_running():
        print(f"caco: {stopped}; SLURM has requeued or cancelled this job itself", file=sys.stderr)
        sys.exit(0)
    print(f"caco: {stopped}; it goes back into the queue", file=sys.stderr)
    requeue = signal.getsignal(signal.SIGUSR2)
    assert callable(requeue), "submitit listens for the signal"
    requeue(signal.SIGUSR2, None)  # counts time-outs, writes its submission again, requeues the job and exits
    raise AssertionError("unreachable: submitit's handler exits")


def _still_running() -> bool:
    """Whether SLURM intends to keep this job running. A job that is being requeued or cancelled has another state.

    A job that the user cancels must not come back, and one that SLURM requeues must not be requeued a second time.
    """
    # In the last task of an array, SLURM_JOB_ID is the id of the whole array.
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    command = ["scontrol", "show", "job", "-o", job]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return True  # if the controller does not answer, the attempt to requeue will report that
    return "JobState=RUNNING" in shown.split()
