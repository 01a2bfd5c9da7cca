"""Profiling: how the time of a step is divided into nested parts, and which files a profiled run writes."""

import json

import pytest
import torch
from tiny import compose

from caco.engine.instruments import Part, Shares
from caco.engine.training import run_training


class Nested:
    """Two nested parts with a fake clock, so that each takes an exact time."""

    seconds = 0.0

    def outer(self):
        self.seconds += 2
        self.inner()
        return "given"

    def inner(self):
        self.seconds += 5

    def items(self):
        for i in range(2):
            self.seconds += 3
            yield i


def test_a_part_is_timed_without_those_inside_of_it_and_the_functions_are_given_back(monkeypatch):
    nested = Nested()
    monkeypatch.setattr("caco.engine.instruments.time.perf_counter", lambda: nested.seconds)
    parts = [Part(nested, name, name) for name in ("outer", "inner", "items")]
    shares = Shares(parts, torch.device("cpu"))
    with shares.timing():
        nested.inner()
        shares.begin()
        assert nested.outer() == "given" and list(nested.items()) == [0, 1]
        nested.seconds += 7
        shares.step()
        nested.inner()  # this call is after the last step and must not count
    assert "outer" not in vars(nested)
    assert shares.as_dict() == {
        "steps": 1,
        "ms_per_step": pytest.approx(20_000),
        "percent": pytest.approx({"the rest": 35, "items": 30, "inner": 25, "outer": 10}),
    }


def test_a_profiled_run_has_shares_and_a_trace_and_is_the_run_that_it_would_be(tmp_path, capsys):
    def trained(name, *more):
        cfg = compose("method=caco", "pn=both", "eval=[]", "max_steps=40", "warm_start.steps=4", *more)
        return run_training(cfg, tmp_path / name)

    plain = trained("plain")
    profiled = trained("profiled", "profile=true")
    assert plain["loss"] == profiled["loss"]
    found = json.loads((tmp_path / "profiled" / "shares.json").read_text())
    assert {
        "encoder, forward",
        "twin, forward",
        "bank, loss",
        "bank, loss, backward",
        "bank, motion of rows",
        "optimiser",
    } <= set(found["percent"])
    assert sum(found["percent"].values()) == pytest.approx(100)
    said = capsys.readouterr().err
    assert "where the time of a step goes" in said
    start = found["before_the_first_step"]
    assert {"reading the images", "the digest of the images", "building the network"} <= start.keys()
    assert all(seconds >= 0 for seconds in start.values())
    # Of the two runs the profiled one alone says it: nothing took long.
    lines = [line for line in said.splitlines() if line.startswith("caco: before the first step ")]
    assert len(lines) == 1 and all(f"{name} {seconds:.1f} s" in lines[0] for name, seconds in start.items())
    assert (tmp_path / "profiled" / "trace.json").stat().st_size > 1000
