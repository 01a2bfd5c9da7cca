"""A checkpoint is either complete or not there; a damaged one is reported, and the one before it is used."""

import errno
import io
import os
import resource
import signal
import zipfile

import pytest
import torch
from processes import Process

from caco.errors import UserError
from caco.runs.checkpoint import Checkpoints, load


def state(step):
    return {"step": step, "weight": torch.arange(1000, dtype=torch.float32) + step}


def saved(tmp_path, *steps, keep=2):
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step in steps:
        checkpoints.save(state(step), step)
    return checkpoints


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path):
    loaded, path = saved(tmp_path, 3, 7).load_newest()
    assert loaded["step"] == 7 and torch.equal(loaded["weight"], state(7)["weight"])
    assert path.name == "step_000000007.pt"


def test_nothing_saved_is_none(tmp_path):
    assert Checkpoints(tmp_path / "none").load_newest() is None


def test_the_last_ones_and_milestones_stay(tmp_path):
    checkpoints = saved(tmp_path, 1, keep=2)
    checkpoints.save(state(2), 2, milestone=True)
    for step in (3, 4, 5):
        checkpoints.save(state(step), step)
    assert names(tmp_path) == ["milestones", "step_000000004.pt", "step_000000005.pt"]
    assert load(tmp_path / "milestones" / "step_000000002.pt")["step"] == 2


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_milestone_is_a_copy_where_the_file_system_has_no_links(tmp_path, monkeypatch, error):
    def link(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", link)
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 2, 3):
        checkpoints.save(state(step), step, milestone=step == 2)
    assert names(tmp_path) == ["milestones", "step_000000003.pt"]
    assert names(tmp_path / "milestones") == ["step_000000002.pt"]
    assert load(tmp_path / "milestones" / "step_000000002.pt")["step"] == 2


def test_a_milestone_saved_again_is_the_new_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for weight in (1.0, 2.0):
        checkpoints.save({"step": 2, "weight": weight}, 2, milestone=True)
    assert names(tmp_path / "milestones") == ["step_000000002.pt"]
    assert load(tmp_path / "milestones" / "step_000000002.pt")["weight"] == 2.0


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "empty zip", "bomb", "folder", "list"])
def test_a_damaged_newest_falls_back_with_a_message(tmp_path, capsys, damage):
    checkpoints = saved(tmp_path, 1, 2)
    path = tmp_path / "step_000000002.pt"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[len(content) // 2] ^= 1  # flips one bit of a weight
    elif damage == "empty":
        content = b""
    elif damage == "empty zip":
        content = b"PK\5\6" + bytes(18)
    elif damage == "bomb":
        with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(2**22))
        content = out.getvalue()
    elif (
        damage == "folder"
    ):  # one byte in the zip's table marks a tensor's file as a folder; torch then returns whatever is in memory
        with zipfile.ZipFile(path) as archive:
            place = archive.start_dir + content[archive.start_dir :].index(b"archive/data/0")
        content[place - 8] = 0x10
    else:
        torch.save([torch.zeros(3)], out := io.BytesIO())
        content = out.getvalue()
    path.write_bytes(bytes(content))
    loaded, _ = checkpoints.load_newest()
    assert loaded["step"] == 1
    assert (
        f"step_000000002.pt {'would unpack to 4,194,304 bytes' if damage == 'bomb' else 'is damaged'}"
        in capsys.readouterr().err
    )


def test_when_none_can_be_read_the_run_does_not_start_anew_by_itself(tmp_path):
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "step_000000001.pt").write_bytes(b"nothing")
    with pytest.raises(OSError, match="none of the 1 checkpoints"):
        checkpoints.load_newest()


def save_much(folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    Checkpoints(folder).save({"x": torch.zeros(100_000)}, 2)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    """A child process with a limit on file sizes simulates a disk that becomes full during a write."""
    saved(tmp_path, 1)
    _, _, errors = Process(save_much, tmp_path).end()
    assert "FileError: checkpoint" in errors and "could not be written" in errors
    assert names(tmp_path) == ["step_000000001.pt"]
    assert load(tmp_path / "step_000000001.pt")["step"] == 1


def test_a_write_that_was_killed_is_not_taken_for_a_checkpoint(tmp_path):
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "step_000000002.partial").write_bytes(b"half")
    assert checkpoints.load_newest()[0]["step"] == 1


def test_a_checkpoint_is_read_without_running_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"x": Evil()}, tmp_path / "step_000000001.pt")
    with pytest.raises(UserError, match=r"step_000000001\.pt is damaged \(UnpicklingError\)$"):
        load(tmp_path / "step_000000001.pt")
    assert not (tmp_path / "ran").exists()
