"""Failures of the machine during a run (full or read-only disks, data that disappear) give one sentence and exit code
2, and nothing is lost.
"""

import builtins
import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from processes import Process, caco_train
from tiny import TINY, compose, train

from caco.engine.training import run_training
from caco.errors import UserError
from caco.runs.checkpoint import load
from caco.runs.files import read_json
from caco.tracking.ledger import LedgerTracker

SHORT = ["bank.size=128", "max_steps=4", "data.limit=128", "checkpoint.every_steps=2"]


def assert_one_sentence(ended: tuple[int, str, str], *words: str) -> None:
    code, _, told = ended
    assert code == 2, told
    assert "Traceback" not in told and all(word in told for word in words), told
    assert sum("then give the same command again" in line for line in told.splitlines()) == 1, told


def train_on_a_full_disk(limit: int, *overrides: str) -> None:
    """Train in a process in which no file may grow beyond `limit` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    caco_train(*overrides)


@pytest.mark.parametrize(
    "limit", [pytest.param(0, marks=pytest.mark.long), 1500, pytest.param(12_000, marks=pytest.mark.long)]
)  # limits at which the very first file, the run's records, or its checkpoint fail
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(tmp_path, limit):
    run_dir = tmp_path / "run"
    command = [*TINY, *SHORT, f"hydra.run.dir={run_dir}"]
    log = tmp_path / "told"
    code, _, _ = Process(_told_to, str(log), limit, *command).end()
    told = os.read(fd := os.open(log, os.O_RDONLY | os.O_NONBLOCK), 1 << 20).decode()
    os.close(fd)
    assert code == 2 and "Traceback" not in told, told
    assert "File too large" in told and "caco: " in told
    ended = Process(caco_train, *command).end()
    assert ended[0] == 0, ended[2]
    assert (
        read_json(run_dir / "summary.json")["loss"]
        == train(tmp_path / "whole", "max_steps=4", "data.limit=128", "checkpoint.every_steps=2")["loss"]
    )


def _told_to(log: str, limit: int, *overrides: str) -> None:
    """Run a function with its standard error in a pipe, to which the limit on files does not apply."""
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    os.dup2(os.open(log, os.O_WRONLY), 2)
    keeper = os.fork()
    if keeper == 0:  # this process keeps the output until the test has read it
        signal.alarm(200)
        os.read(reader, 0)
        signal.pause()
    train_on_a_full_disk(limit, *overrides)


def train_where_nothing_can_be_written(folder: str, *overrides: str) -> None:
    """Train as on a file system that is mounted read-only, which also stops the superuser."""

    def refuse(path: object) -> None:
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fsdecode(path))

    mkdir, os_open, plain_open = os.mkdir, os.open, builtins.open

    def made(path, *arguments, **options):
        if not os.path.isdir(path):
            refuse(path)
        return mkdir(path, *arguments, **options)

    def opened(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return os_open(path, flags, *arguments, **options)

    def opened_as_file(path, mode="r", *arguments, **options):
        if set(mode) & set("wax+"):
            refuse(path)
        return plain_open(path, mode, *arguments, **options)

    os.mkdir, os.open = made, opened
    builtins.open = opened_as_file  # type: ignore[assignment]  # it stands in for each of open's overloads
    caco_train(*overrides)


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_directory_that_cannot_be_written_to_is_one_sentence(tmp_path, begun):
    run_dir = tmp_path / "run"
    command = [*TINY, *SHORT, f"hydra.run.dir={run_dir}"]
    if begun:
        assert Process(caco_train, *command, "max_steps=2").end()[0] == 0
    ended = Process(
        train_where_nothing_can_be_written, str(run_dir), *command, *(["max_steps=2"] if begun else [])
    ).end()
    assert_one_sentence(
        ended, "Read-only file system", f"caco: {run_dir}", "choose a place that can be written to".capitalize()
    )


def test_a_run_directory_below_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    code, _, told = Process(caco_train, *TINY, *SHORT, f"hydra.run.dir={tmp_path}/file/run").end()
    assert (
        code == 2
        and told.endswith(f"{tmp_path}/file is not a folder; choose another one with hydra.run.dir\n")
        and "Traceback" not in told
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_images_that_disappears_in_the_middle_is_one_sentence_and_the_checkpoint_stays(
    tmp_path, monkeypatch, workers
):
    from PIL import Image

    for kind in ("cat", "dog"):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (16, 16), (i, 100, 7 * i)).save(tmp_path / "pets" / kind / f"{i}.png")
    original = LedgerTracker.log

    def log(self, step, *arguments, **options):
        original(self, step, *arguments, **options)
        if step == 3:
            shutil.rmtree(tmp_path / "pets", ignore_errors=True)

    monkeypatch.setattr(LedgerTracker, "log", log)
    settings = [
        "data=folder",
        f"data.root={tmp_path}/pets",
        "data.in_memory_mb=0",
        "batch=8",
        "augmentation.size=16",
        f"loader.num_workers={workers}",
    ]
    cfg = compose(
        *settings,
        "loader.prefetch=1",
        "eval=[]",
        "max_steps=20",
        "bank.size=16",
        "checkpoint.every_steps=2",
        bank=False,
    )
    with pytest.raises(UserError, match=r"pets/(cat|dog)/\d+\.png: .* Are the images still where they were"):
        run_training(cfg, tmp_path / "run")
    assert load(max(Path(tmp_path / "run" / "checkpoints").glob("*.pt")))["step"] >= 2
