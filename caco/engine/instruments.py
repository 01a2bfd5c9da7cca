"""What watches the training's steps when it is asked for: torch's detection of anomalies and its profiler."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from caco import distributed


@contextlib.contextmanager
def instruments(*, anomaly: bool, profile_to: Path | None) -> Iterator[torch.profiler.profile | None]:
    """Around the steps; yields a profiler that is told of each, or None.

    Args:
        profile_to: a folder for the trace of a few steps, which rank 0 writes.
    """
    with contextlib.ExitStack() as stack:
        if anomaly:
            stack.enter_context(torch.autograd.set_detect_anomaly(True))
        profiler = None
        if profile_to is not None and distributed.is_main():
            profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=2, warmup=2, active=6, repeat=1),
                on_trace_ready=lambda p: p.export_chrome_trace(str(profile_to / "trace.json")),
            )
            stack.enter_context(profiler)
        yield profiler
