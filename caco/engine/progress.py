"""The text that a person sees of a run: at its beginning and end, and during training a progress bar on a terminal or
plain lines elsewhere.
"""

import contextlib
import re
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from caco import metrics
from caco.runs.paths import as_typed
from caco.saying import amount, clock, doing, is_under_way, per_second

_SHOWS_ONLY = ". Less than an epoch only shows that everything runs: its accuracies may fall and say little"


def beginning(
    *, data: str, num_train: int, num_test: int, choices: Mapping[str, str], bank_rows: int, batch: int,
    warm_start_steps: int,
    epochs: int, steps_per_epoch: int, processes: int, device: str, run_dir: Path,
    total_steps: int | None = None,
) -> str:  # fmt: skip
    """Lines that say what is about to run, for how long, and where its results will be.

    Args:
        total_steps: the number of steps after which the run stops; None: after its last epoch.
    """
    shown = [
        group
        for group in ("method", "pn", "negatives", "backbone", "augmentation")
        if choices.get(group) not in (None, "", "plain")
    ]
    parts = [f"{group} {choices[group]}" for group in shown]
    bank = f", a bank of {amount(bank_rows, 'row')}" if bank_rows else ""
    warm_start = f"{amount(warm_start_steps, 'step')} of warm start, then " if warm_start_steps else ""
    tested = f", {amount(num_test, 'image')} to evaluate with" if num_test else ""
    where = device if processes == 1 else f"{processes} processes, {device}"
    planned = warm_start_steps + epochs * steps_per_epoch
    stops = ""
    if total_steps is not None and total_steps < planned:
        stops = f"caco: stops:   after {total_steps:,} of these {amount(planned, 'step')}, because of max_steps"
        stops += _SHOWS_ONLY if total_steps < warm_start_steps + steps_per_epoch else ""
        stops += "\n"
    return (
        f"caco: data:    {data}, {amount(num_train, 'image')} to learn from without their labels{tested}\n"
        f"caco: method:  {', '.join(parts)}{bank}\n"
        f"caco: length:  {warm_start}{amount(epochs, 'epoch')} of {amount(steps_per_epoch, 'step')},"
        f" {amount(batch, 'image')} a step, on {where}\n{stops}caco: results: {run_dir}"
    )


def ending(
    summary: Mapping[str, Any],
    *,
    seconds: float,
    run_dir: Path,
    evaluators: Sequence[str],
    epochs: int = 0,
    commands: bool = True,
    settings: Sequence[str] = (),
) -> str:
    """Lines that say that a run is finished, with its results, failed evaluations and, if `commands`, useful next
    commands (not for a job of a sweep).

    Args:
        settings: settings of these evaluators, as overrides, where they differ from those of the evaluators' options.
    """
    lines = [f"caco: finished in {clock(seconds)}: {run_dir}{_results(summary)}"]
    if summary.get("epochs", epochs) < min(epochs, 1):
        lines += [f"caco: stopped after {amount(summary['steps'], 'step')}, because of max_steps{_SHOWS_ONLY}"]
    if failed := summary.get("failed_evaluations"):
        lines += [f"caco: {len(failed)} evaluation{'s' * (len(failed) > 1)} failed:"]
        lines += [f"caco:   {one['message'].splitlines()[0]}" for one in failed]
        if metrics.missing_at_the_end(summary):
            lines += [
                "caco: so results are missing, and the exit code is 3; give the same command again to repeat the"
                " evaluation at the end"
            ]
    return "\n".join(lines + (_next(summary, run_dir, evaluators, epochs, settings) if commands else []))


def ended_before(
    summary: Mapping[str, Any],
    *,
    when: float,
    run_dir: Path,
    evaluators: Sequence[str],
    epochs: int,
    settings: Sequence[str] = (),
) -> str:
    """Lines for the repeated command of a run that is already finished.

    Args:
        when: the time at which the run finished, in seconds since 1970.
        settings: as for `ending`.
    """
    date = time.strftime("%Y-%m-%d at %H:%M", time.localtime(when))
    return "\n".join(
        [
            f"caco: finished already on {date}: {run_dir}{_results(summary)}",
            *_next(summary, run_dir, evaluators, epochs, settings),
        ]
    )


def _results(summary: Mapping[str, Any]) -> str:
    results = ", ".join(f"{name} {summary[name]:.2f}" for name in metrics.accuracies(summary))
    return f" ({results})" if results else ""


def _next(
    summary: Mapping[str, Any], run_dir: Path, evaluators: Sequence[str], epochs: int, settings: Sequence[str]
) -> list[str]:
    """Commands that work as they are printed, if given in the folder where the run was started."""
    run, folder = as_typed(run_dir), as_typed(Path(run_dir).parent)
    is_cut = summary.get("epochs", epochs) < epochs
    longer, how = ("to its planned end", f"epochs={epochs} continued_schedule=planned") if is_cut else (
        "twice as long", f"epochs={2 * epochs} continued_schedule=restart",
    )  # fmt: skip
    commands = {
        "beside the untrained network and raw pixels": (
            f"python -m caco.evaluate {_setting('run', run)} eval=[{','.join(evaluators)}]"
            f"{''.join(f' {shlex.quote(setting)}' for setting in settings)} baselines=true"
        ),
        "beside other runs": f"python -m caco.results {shlex.quote(folder)}",
        longer: f"python -m caco.train {_setting('continue_from', run)} {how}",
    }
    shown = {
        what: command
        for what, command in commands.items()
        if (evaluators or "evaluate" not in command) and (epochs or "train " not in command)
    }
    return [f"caco: next, {what}:\ncaco:   {command}" for what, command in shown.items()]


def _setting(key: str, path: str) -> str:
    """A setting KEY=PATH in a form that both Hydra's grammar and the shell accept."""
    if re.fullmatch(r"[\w./+-]+", path):
        return f"{key}={path}"
    inner = path.replace("\\", "\\\\").replace("'", "\\'")
    return shlex.quote(f"{key}='{inner}'")


class Progress:
    """Shows the steps done, images per second and the time left. During a step that takes longer than the pause between
    two lines, it shows what the step is doing.

    Args:
        total: number of steps of the run; done: number of steps made by earlier processes.
        batch: images in a step, over all ranks.
        enabled: whether this rank prints; only rank 0 does.
    """

    _tick_s = 1.0

    def __init__(self, *, total: int, done: int, batch: int, enabled: bool):
        self.total, self.batch, self.enabled = total, batch, enabled
        self.first, self.started = done, time.monotonic()
        self._done = done
        self.next_line = self.started + 1
        self.paused = 0.0
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) if enabled and terminal else None
        self._said = self.started
        self._at = "waiting for its images", self.started  # what the current step is doing, and since when
        self._over = threading.Event()
        if enabled:
            threading.Thread(target=self._watch, name="caco-progress", daemon=True).start()
        self._first = contextlib.ExitStack()  # open until the first step is done
        self._await_the_first()

    def _await_the_first(self) -> None:
        if self.enabled and self.first < self.total:
            self._first.enter_context(doing("the first step, for which workers and device start"))

    def seconds_of_training(self) -> float:
        """Seconds that this process has spent on training so far, without evaluation."""
        return time.monotonic() - self.started - self.paused

    def images_per_second(self, step: int) -> float:
        """Mean over this process so far, without evaluation."""
        return (step - self.first) * self.batch / max(self.seconds_of_training(), 1e-9)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @contextlib.contextmanager
    def pause(self):
        """A context for evaluation, which does not count as training time."""
        since, waits = time.monotonic(), self._done == self.first
        self._first.close()
        yield
        if waits:
            self._await_the_first()
        self.paused += time.monotonic() - since

    def computing(self) -> None:
        """Note that the images of the next step have arrived."""
        self._at = "computing", time.monotonic()

    def _pause_s(self) -> float:
        """Seconds between two lines. They grow with the run, so that its log stays readable."""
        return min(max(5.0, self.elapsed() / 20), 300.0)

    def _watch(self) -> None:
        while not self._over.wait(self._tick_s):
            now, (what, since) = time.monotonic(), self._at
            if is_under_way():  # a longer action prints its own lines
                self._at = what, now
            elif self.bar is not None:
                self.bar.refresh()
            elif now - max(since, self._said) >= self._pause_s():
                self.say(f"step {self._done + 1}/{self.total}: {what}, {clock(now - since)} so far")

    def step(self, step: int, where: str, loss: float | None) -> None:
        """Note that `step` steps are done.

        Args:
            where: the position in the run, in words.
            loss: the loss, or None if it has not been read from the device.
        """
        self._done, self._at = step, ("waiting for its images", time.monotonic())
        self._first.close()
        if self.bar is not None:
            self.bar.update(1)
            if loss is not None:
                self.bar.set_postfix_str(
                    f"{where}, loss {loss:.3f}, {per_second(self.images_per_second(step))} images/s", refresh=False
                )
        elif self.enabled and loss is not None and time.monotonic() >= self.next_line:
            rate = self.images_per_second(step)
            left = (self.total - step) * self.batch / rate
            self.say(
                f"step {step}/{self.total} ({where}): loss {loss:.4f}, {per_second(rate)} images/s, {clock(left)} left"
            )
            self.next_line = time.monotonic() + self._pause_s()

    def say(self, text: str) -> None:
        """Print a line that stays above the progress bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.enabled:
            self._said = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._over.set()
        self._first.close()
        if self.bar is not None:
            self.bar.close()
