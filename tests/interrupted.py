"""Runs that are stopped or killed at a moment that the test chooses, independent of how busy the machine is."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import caco_embed, caco_train

from caco.engine import trainer, training
from caco.evals.feature_files import FeatureFiles
from caco.runs.checkpoint import Checkpoints
from caco.tracking.ledger import LedgerTracker


class Cut(BaseException):
    """Ends a run abruptly. It is not an Exception, so that no `except Exception` in the run catches it."""


def cut_after(monkeypatch, steps):
    """Let the method make a number of steps, then raise Cut."""
    made = {"steps": 0}
    original = trainer.distributed.mean_gradients

    def mean_gradients(parameters):
        if made["steps"] == steps:
            raise Cut
        made["steps"] += 1
        original(parameters)

    monkeypatch.setattr(trainer.distributed, "mean_gradients", mean_gradients)


def signal_in_step(monkeypatch, step, signum):
    """Make the process send itself a signal during its step number `step`, counted from its start."""
    original = trainer.distributed.mean_gradients
    made = []

    def mean_gradients(parameters):
        if len(made) == step:
            signal.raise_signal(signum)
        made.append(step)
        original(parameters)

    monkeypatch.setattr(trainer.distributed, "mean_gradients", mean_gradients)


def train_with_rank_1_told_to_stop(step, *overrides):
    if os.environ["RANK"] == "1":
        signal_in_step(pytest.MonkeyPatch(), step, signal.SIGUSR2)
    caco_train(*overrides)


def train_told_to_stop(rows, *overrides):
    """Train, and send SIGTERM to the whole process group, loader workers included, at a given number of ledger rows."""
    original = LedgerTracker.log
    logged = []

    def log(self, *arguments, **options):
        original(self, *arguments, **options)
        logged.append(1)
        if len(logged) == rows:
            # Sent by another process, because workers must end only when the training process tells them to.
            code = "import os, sys; os.killpg(int(sys.argv[1]), int(sys.argv[2]))"
            command = [sys.executable, "-S", "-c", code, str(os.getpgrp()), str(int(signal.SIGTERM))]
            subprocess.run(command, start_new_session=True, check=True)

    LedgerTracker.log = log
    caco_train(*overrides)


def train_killed(seconds, *overrides):
    """Train, and be killed after a number of seconds of processor time, counted from the start of the first checkpoint.

    The process does not handle SIGPROF, which therefore ends it as abruptly as SIGKILL; and the timer of SIGPROF stops
    while other processes compute. A run that is finished earlier, on a fast processor, is killed as it begins to write
    summary.json, so that each call kills.
    """
    original, write = Checkpoints.save, training.write_json
    begun = []

    def save(self, *arguments, **options):
        if not begun:
            begun.append(1)
            signal.setitimer(signal.ITIMER_PROF, seconds)
        original(self, *arguments, **options)

    def write_json(path, content):
        if path.name == "summary.json":
            signal.raise_signal(signal.SIGPROF)
        write(path, content)

    Checkpoints.save, training.write_json = save, write_json
    caco_train(*overrides)


def embed_killed(seconds, *words):
    """Like `train_killed` for caco.embed, counted from the first look for stored features; prints the processor time if
    it was not killed.
    """
    original = FeatureFiles.get
    begun = []

    def get(self, *arguments, **options):
        begun.append(time.process_time())
        signal.setitimer(signal.ITIMER_PROF, seconds)
        return original(self, *arguments, **options)

    FeatureFiles.get = get
    caco_embed(*words)
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(time.process_time() - begun[0])
