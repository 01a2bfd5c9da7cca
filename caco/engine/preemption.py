"""Being told to stop, by a scheduler or a user: a flag that the loop reads, and what happens after its save.

SIGUSR2 comes from SLURM ahead of a time limit or a preemption (`--signal`), SIGTERM on `scontrol requeue`, on the
preemption of clusters that send nothing else, on `scancel`, and from any user's `kill`, SIGHUP when the terminal is
closed or the connection to it is lost. (Under nohup, which lets a run go on then, SIGHUP stays ignored.)
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
    """The run was told to stop and has saved itself; not an error."""

    def __init__(self, at: str, signum: int | None):
        name = signal.Signals(signum).name if signum else "a signal to another rank"
        super().__init__(f"stopped by {name} {at}, which is saved")
        self.signum = signum


class Stop:
    """Within `with`, a signal to stop is noted instead of obeyed; the loop asks `requested` and ends at a step's
    end. Before the loop has begun there is nothing to save, and what is done then may take long: it is obeyed at once.
    """

    def __init__(self):
        self.signum: int | None = None
        self.has_begun = False  # the loop, which says so
        self._before: dict[int, Handler] = {}
        self._terminals: list[int] = []

    def requested(self) -> bool:
        """Whether this process was told to stop; the ranks of a run agree among themselves."""
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
            if not os.isatty(stream):  # any more: what is printed there would be an error, before the run is saved
                os.dup2(self._nowhere, stream)
        if not self.has_begun:
            self._obey(signum, frame)

    def _obey(self, signum: int, frame: FrameType | None) -> None:
        """As who handled the signal before, submitit say, would; else by ending this process."""
        handler = self._before.get(signum)
        if callable(handler):
            handler(signum, frame)
            return
        with contextlib.suppress(OSError):  # the terminal may be gone
            name = signal.Signals(signum).name
            print(f"caco: stopped by {name} before its first step here; the same command begins again", file=sys.stderr)
        sys.exit(128 + signum)


def leave(stopped: Stopped, *, is_first_rank: bool) -> NoReturn:
    """End this process such that the run goes on: requeued by whom it was started by, or by the user's next command.

    Called outside `with Stop()`, where SIGUSR2 is submitit's again if submitit started this process.
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
    requeue(signal.SIGUSR2, None)  # counts time-outs, writes its submission anew, requeues and exits
    raise AssertionError("unreachable: submitit's handler exits")


def _still_running() -> bool:
    """Whether SLURM means this job to run on. Once it is being requeued or cancelled its state is another one.

    A job that the user cancels must not come back, and one that SLURM requeues must not be requeued twice.
    """
    # Of an array's last task SLURM_JOB_ID is the whole array's.
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    command = ["scontrol", "show", "job", "-o", job]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return True  # requeueing, which needs the same controller, then says what is wrong
    return "JobState=RUNNING" in shown.split()
