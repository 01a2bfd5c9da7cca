"""Optional observers of the training steps: torch's anomaly detection, its profiler, and a table of the time that each
part of a step takes."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from caco import distributed
from caco.runs.files import write_json
from caco.saying import amount

WAIT, WARM_UP, TRACED = 2, 2, 6  # numbers of steps for torch's profiler; the steps after these are timed part by part


class Part(NamedTuple):
    """A function whose calls are timed: the attribute `name` of `owner`."""

    owner: Any
    name: str
    label: str


def parts_of_a_step(trainer: Any) -> list[Part]:
    """The functions of the Trainer that make up a step, and those of the method's children with the usual names."""
    optimisation, method = trainer.optimisation, trainer.method
    parts = [
        Part(trainer, "batches", "waiting for images"),
        Part(method, "before_epoch", "before the epoch"),
        Part(trainer, "_forward_and_backward", "encoder, backward, and the method's own arithmetic"),
        Part(trainer, "_averaged", "loss, mean over ranks"),
        Part(optimisation, "step", "optimiser"),
        Part(trainer.recording, "log_step", "metrics and logging"),
        Part(trainer, "save", "saving"),
        Part(trainer, "evaluate_if_due", "evaluation"),
    ]
    children = dict(method.named_children())
    if "encoder" in children:
        parts.append(Part(children["encoder"], "forward", "encoder, forward"))
    if twin := children.get("twin"):
        parts += [Part(twin, "forward", "twin, forward"), Part(twin, "update", "twin, update")]
    if bank := children.get("bank"):
        parts += [
            Part(bank.rows, "most_probable", "bank, choice of positives"),
            Part(bank, "score", "bank, loss"),
            Part(bank, "fill", "bank, filling"),
            Part(bank, "update", "bank, motion of rows"),
        ]
    return parts


class Shares:
    """Measures the seconds that each part of a step takes, without the parts that are called inside it.

    On a GPU, each part starts and ends with a synchronisation, so nothing overlaps and a step takes longer than without
    this class. Work in other threads, such as preparing views, is not measured; only waiting for it is.

    Args:
        parts: the functions to time. Time outside of all of them is called "the rest".
    """

    def __init__(self, parts: Iterable[Part], device: torch.device) -> None:
        self.parts, self.device = list(parts), device
        self.seconds: dict[str, float] = {}
        self.steps = 0
        self._began, self._counted = 0.0, (0.0, dict[str, float]())
        self._open: list[list[Any]] = []  # for each running part, outermost first: label, start, seconds of inner parts

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """While this context is open, timed versions replace the functions of the parts."""
        for owner, name, label in self.parts:
            setattr(owner, name, self._timed(getattr(owner, name), label))
        try:
            yield
        finally:
            for owner, name, _ in self.parts:
                delattr(owner, name)

    def begin(self) -> None:
        """Start counting anew."""
        self.seconds, self.steps, self._began = {}, 0, self._now()

    def step(self) -> None:
        """Note the end of a step."""
        self.steps += 1
        self._counted = self._now() - self._began, dict(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Steps since `begin`, milliseconds per step, and each part's share of that time in percent, largest first."""
        whole, seconds = self._counted
        shares = {label: 100 * one / whole for label, one in seconds.items()}
        shares["the rest"] = 100 - sum(shares.values())
        return {
            "steps": self.steps,
            "ms_per_step": 1000 * whole / self.steps,
            "percent": dict(sorted(shares.items(), key=lambda item: -item[1])),
        }

    def enter(self, label: str) -> None:
        self._open.append([label, self._now(), 0.0])

    def leave(self) -> None:
        label, began, inside = self._open.pop()
        now = self._now()
        if began >= self._began:
            self.seconds[label] = self.seconds.get(label, 0.0) + now - began - inside
        if self._open:
            self._open[-1][2] += now - began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(label)
            try:
                given = function(*args, **kwargs)
            finally:
                self.leave()
            if isinstance(given, Iterator):
                return self._each(given, label)
            loss = getattr(given, "loss_B", None)
            if loss is not None and loss.grad_fn is not None:  # the score of a bank: its backward pass is timed too
                loss.grad_fn.register_prehook(lambda _: self.enter(f"{label}, backward"))
                loss.grad_fn.register_hook(lambda *_: self.leave())
            return given

        return timed

    def _each(self, items: Iterator[Any], label: str) -> Iterator[Any]:
        while True:
            self.enter(label)
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.leave()
            yield item


class Profile:
    """A trace of a few steps, and the shares of the steps after them. Call `step` after each step."""

    def __init__(self, profiler: torch.profiler.profile, shares: Shares, folder: Path) -> None:
        self._profiler, self._shares, self._folder = profiler, shares, folder
        self._steps = 0

    def step(self) -> None:
        self._steps += 1
        self._profiler.step()
        self._shares.step()
        if self._steps == WAIT + WARM_UP + TRACED:
            self._shares.begin()

    def lines(self) -> list[str]:
        """The lines that are printed at the end of the run. Writes the same numbers to shares.json."""
        if self._steps <= WAIT + WARM_UP + TRACED:
            return ["the shares of a step need more than 10 steps: give max_steps=40"]
        found = self._shares.as_dict()
        write_json(self._folder / "shares.json", found)
        head = (
            f"where the time of a step goes, {found['ms_per_step']:.1f} ms, mean of {amount(found['steps'], 'step')}:"
        )
        return [head, *(f"  {share:5.1f} %  {label}" for label, share in found["percent"].items())]


@contextlib.contextmanager
def instruments(
    *, anomaly: bool, profile_to: Path | None, parts: Iterable[Part], device: torch.device
) -> Iterator[Profile | None]:
    """A context for the training steps. Yields a Profile, whose `step` the loop calls after each step, or None.

    Args:
        anomaly: whether to turn on torch's anomaly detection.
        profile_to: a folder for the trace and the shares, which rank 0 writes; None turns both off.
        parts: the parts of a step.
    """
    with contextlib.ExitStack() as stack:
        if anomaly:
            stack.enter_context(torch.autograd.set_detect_anomaly(True))
        profile = None
        if profile_to is not None and distributed.is_main():
            profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=WAIT, warmup=WARM_UP, active=TRACED, repeat=1),
                on_trace_ready=lambda p: p.export_chrome_trace(str(profile_to / "trace.json")),
            )
            shares = Shares(parts, device)
            stack.enter_context(profiler)
            stack.enter_context(shares.timing())
            profile = Profile(profiler, shares, profile_to)
        yield profile
