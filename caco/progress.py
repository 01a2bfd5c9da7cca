"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time

from tqdm import tqdm


def clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class Progress:
    """Steps done, images per second, time left.

    Args:
        total: steps of the run; done: steps that an earlier process made.
        batch: images a step, over all ranks.
        enabled: rank 0 alone speaks.
    """

    def __init__(self, *, total: int, done: int, batch: int, enabled: bool):
        self.total, self.batch, self.enabled = total, batch, enabled
        self.first, self.started = done, time.monotonic()
        self.next_line = self.started + 1
        self.paused = 0.0
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) if enabled and terminal else None

    def images_per_second(self, step: int) -> float:
        """Mean over this process so far, evaluation excluded."""
        busy = time.monotonic() - self.started - self.paused
        return (step - self.first) * self.batch / max(busy, 1e-9)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @contextlib.contextmanager
    def pause(self):
        """Evaluation inside does not count as training time."""
        since = time.monotonic()
        yield
        self.paused += time.monotonic() - since

    def step(self, step: int, where: str, loss: float | None) -> None:
        """`step` steps are done; `where` says in words where in the run that is. `loss` is given where it is known already."""
        if self.bar is not None:
            self.bar.update(1)
            if loss is not None:
                self.bar.set_postfix_str(
                    f"{where}, loss {loss:.3f}, {self.images_per_second(step):.0f} images/s", refresh=False
                )
        elif self.enabled and loss is not None and time.monotonic() >= self.next_line:
            rate = self.images_per_second(step)
            left = (self.total - step) * self.batch / rate
            self.say(f"step {step}/{self.total} ({where}): loss {loss:.4f}, {rate:.0f} images/s, {clock(left)} left")
            # Lines come ever more rarely, so that a long run's log stays readable.
            self.next_line = time.monotonic() + min(max(5.0, self.elapsed() / 20), 300.0)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.enabled:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
