"""A run that is told to stop ends its step, saves, and goes on later to the same bits."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from test_ranks import launch
from test_trainer import assert_same, final, record
from tiny import BANK, TINY, compose, train

from caco import build, trainer
from caco.preemption import SIGNALS, Stop, Stopped

COMMAND = [sys.executable, "-m", "caco.train", *TINY, *BANK]


def signal_in_step(monkeypatch, step, signum):
    original = trainer.distributed.mean_gradients
    made = []

    def mean_gradients(parameters):
        if len(made) == step:
            signal.raise_signal(signum)
        made.append(step)
        original(parameters)

    monkeypatch.setattr(trainer.distributed, "mean_gradients", mean_gradients)


# Steps 0 and 1 fill the bank. A signal during a step is seen by the next one's message.
@pytest.mark.parametrize("step, signum", [(0, signal.SIGTERM), (1, signal.SIGUSR2), (6, signal.SIGTERM)])
def test_a_stopped_run_saves_and_goes_on_to_the_same_bits(tmp_path, monkeypatch, step, signum):
    train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        signal_in_step(patch, step, signum)
        told = f"stopped by {signal.Signals(signum).name} after step {step + 2} of 12, which is saved"
        with pytest.raises(Stopped, match=told), Stop() as stop:
            build.train(compose(), tmp_path / "stopped", stop=stop)
    assert final(tmp_path / "stopped")["step"] == step + 2
    train(tmp_path / "stopped")
    assert_same(final(tmp_path / "whole"), final(tmp_path / "stopped"))
    assert record(tmp_path / "whole") == record(tmp_path / "stopped")


def test_a_run_told_to_stop_in_its_last_step_is_simply_done(tmp_path, monkeypatch):
    signal_in_step(monkeypatch, 11, signal.SIGTERM)
    with Stop() as stop:
        assert build.train(compose(), tmp_path, stop=stop)["steps"] == 12
    assert stop.requested()


def test_the_signals_are_as_before_afterwards():
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with Stop():
        assert all(signal.getsignal(signum) != handler for signum, handler in zip(SIGNALS, before, strict=True))
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_a_killed_command_says_how_to_go_on_and_does(tmp_path):
    """`kill`, to every process of the run as a scheduler does it, loader workers included."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "loader.num_workers=1", "log_every_steps=1"]
    subprocess.run([*command, f"hydra.run.dir={tmp_path}/whole"], env=environment, check=True, capture_output=True)
    command.append(f"hydra.run.dir={tmp_path}/killed")
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    ledger = tmp_path / "killed" / "ledger.jsonl"
    while child.poll() is None and not (ledger.exists() and len(ledger.read_bytes().splitlines()) > 2):
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM, errors
    told = r"caco: stopped by SIGTERM after step \d+ of 12, which is saved; the same command goes on from there\n"
    assert re.fullmatch(told, errors.splitlines(keepends=True)[-1]), errors
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "caco: going on from" in done.stderr
    assert_same(final(tmp_path / "whole"), final(tmp_path / "killed"))
    assert record(tmp_path / "whole") == record(tmp_path / "killed")


SIGNALLED_RANK = """
import os, sys
from test_preemption import signal_in_step
import pytest, signal
from caco.train import main
if os.environ["RANK"] == "1":
    signal_in_step(pytest.MonkeyPatch(), 4, signal.SIGUSR2)
sys.argv = ["caco-train", *sys.argv[1:]]
main()
"""


def test_the_ranks_stop_at_the_same_step_when_one_is_told_to(tmp_path):
    settings = [*TINY, *BANK, f"hydra.run.dir={tmp_path}"]
    codes, outputs = launch(2, [sys.executable, "-c", SIGNALLED_RANK, *settings])
    assert codes == [128 + signal.SIGTERM, 128 + signal.SIGUSR2], outputs[0][1][-3000:]
    state = final(tmp_path)
    assert state["step"] == 6 and len(state["random"]) == 2
    assert "stopped by a signal to another rank after step 6 of 12" in outputs[0][1]
