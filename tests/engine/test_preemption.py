"""A run that receives a signal to stop finishes its step, saves, and later resumes to the same bits."""

import os
import re
import signal
import time

import pytest
from interrupted import signal_in_step, train_told_to_stop, train_with_rank_1_told_to_stop
from processes import Process, caco_train, ranks
from recorded import assert_same, final, record
from tiny import BANK, TINY, compose, train

from caco.engine import training
from caco.engine.preemption import SIGNALS, Stop, Stopped
from caco.tracking import recorded


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is not interrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    train(run_dir)
    return run_dir


@pytest.fixture(autouse=True)
def heard():
    """The signals that stop a run. Under nohup, SIGHUP is ignored, and `Stop` does not change that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


# Steps 0 and 1 fill the bank. A signal during a step is noticed in the next step.
@pytest.mark.parametrize("step, signum", [(0, signal.SIGTERM), (1, signal.SIGUSR2), (6, signal.SIGHUP)])
def test_a_stopped_run_saves_and_goes_on_to_the_same_bits(tmp_path, monkeypatch, whole, step, signum):
    with monkeypatch.context() as patch:
        signal_in_step(patch, step, signum)
        told = f"stopped by {signal.Signals(signum).name} after step {step + 2} of 12, which is saved"
        with pytest.raises(Stopped, match=told), Stop() as stop:
            training.run_training(compose(), tmp_path / "stopped", stop=stop)
    assert final(tmp_path / "stopped")["step"] == step + 2
    train(tmp_path / "stopped")
    assert_same(final(whole), final(tmp_path / "stopped"))
    assert record(whole) == record(tmp_path / "stopped")


def test_a_run_told_to_stop_in_its_last_step_is_simply_done(tmp_path, monkeypatch):
    signal_in_step(monkeypatch, 11, signal.SIGTERM)
    with Stop() as stop:
        assert training.run_training(compose(), tmp_path, stop=stop)["steps"] == 12
    assert stop.requested()


@pytest.mark.parametrize("signum", SIGNALS)
def test_what_is_done_before_the_first_step_is_not_waited_for(signum, capsys):
    with pytest.raises(SystemExit) as end, Stop():
        try:
            os.kill(os.getpid(), signum)
            time.sleep(60)  # reading a large set, or drawing a large bank
        except Exception:  # noqa: BLE001 - as of an image that cannot be decoded
            pytest.fail("it is none of the work's own errors")
    assert end.value.code == 128 + signum
    assert f"stopped by {signal.Signals(signum).name} before its first step here" in capsys.readouterr().err


def test_before_the_first_step_a_launcher_s_own_handler_has_its_way():
    heard, before = [], signal.signal(signal.SIGUSR2, lambda signum, _: heard.append(signum))
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert heard == [signal.SIGUSR2] and stop.requested()
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_the_signals_are_as_before_afterwards():
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with Stop():
        assert all(signal.getsignal(signum) != handler for signum, handler in zip(SIGNALS, before, strict=True))
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_a_killed_command_says_how_to_go_on_and_does(tmp_path, whole):
    """Every process of the run gets SIGTERM, loader workers included, as a scheduler sends it."""
    command = [*TINY, *BANK, "loader.num_workers=1", f"hydra.run.dir={tmp_path}"]
    code, _, errors = Process(train_told_to_stop, 3, *command, session=True).end()
    assert code == 128 + signal.SIGTERM, errors
    told = r"caco: stopped by SIGTERM after step \d+ of 12, which is saved; the same command goes on from there\n"
    assert re.fullmatch(told, errors.splitlines(keepends=True)[-1]), errors
    listed = recorded.outline(tmp_path)
    assert listed.state == "stopped" and re.fullmatch(told, f"caco: {listed.note}\n")
    code, _, errors = Process(caco_train, *command).end()
    assert code == 0 and "caco: going on from" in errors
    assert recorded.outline(tmp_path).state == "finished" and not (tmp_path / "stopped.txt").exists()
    assert_same(final(whole)["method"], final(tmp_path)["method"])
    assert record(whole) == record(tmp_path)


def test_the_ranks_stop_at_the_same_step_when_one_is_told_to(tmp_path):
    codes, outputs = ranks(2, train_with_rank_1_told_to_stop, 4, *TINY, *BANK, f"hydra.run.dir={tmp_path}")
    assert codes == [128 + signal.SIGTERM, 128 + signal.SIGUSR2], outputs[0][1][-3000:]
    state = final(tmp_path)
    assert state["step"] == 6 and len(state["random"]) == 2
    assert "stopped by a signal to another rank after step 6 of 12" in outputs[0][1]
