"""The worker processes that make views: they survive signals that a whole job receives, and end with the loader in
every case.
"""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from loaded import assert_same, batches
from PIL import Image
from processes import Process

from caco.data.loaders import workers
from caco.data.loaders.plain import plain_batches
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.memory import ImagesInMemory
from caco.data.sets.sources import Source
from caco.data.views import native
from caco.data.views.augmentation import View, Views
from caco.errors import UserError


def test_workers_outlive_signals_to_the_whole_job_and_end_with_the_loader(not_compiled, noise_source, two_views):
    source = noise_source(80)
    others = multiprocessing.active_children()
    loader = TorchLoader(num_workers=2, prefetch=1).bind(source, two_views, batch=8, seed=7)
    running = loader.epoch(0)
    made = [next(running)]
    own = [child for child in multiprocessing.active_children() if child not in others]
    for name in ("USR2", "HUP", "TERM", "INT"):  # sent from outside, as SLURM signals all processes of a step
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in own)], check=True)
    made += list(running)
    assert_same(made, batches(source, two_views))
    assert len(own) == 2 and all(worker.is_alive() for worker in own)
    loader.close()
    for worker in own:
        worker.join(200)
        assert not worker.is_alive()


def test_a_parent_that_ends_its_workers_is_obeyed(not_compiled, noise_source, two_views):
    others = multiprocessing.active_children()
    loader = TorchLoader(num_workers=1).bind(noise_source(16), two_views, batch=8, seed=7)
    running = loader.epoch(0)
    next(running)
    (worker,) = (child for child in multiprocessing.active_children() if child not in others)
    list(running)
    worker.terminate()
    worker.join(200)
    assert worker.exitcode == 0
    loader.close()


def test_a_program_that_fails_with_a_loader_open_ends_at_once(repo_root: Path):
    script = """
import numpy as np, torch
import caco.data.loaders.workers
caco.data.loaders.workers._LOOK_S = 1000.0
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.memory import ImagesInMemory
from caco.data.views.augmentation import View, Views
views = Views(size=8, views={"both": View(count=2)}, mean=[0.5] * 3, std=[0.5] * 3)
source = ImagesInMemory(np.zeros((64, 8, 8, 3), np.uint8), name="black")
loader = TorchLoader(num_workers=2).bind(source, views, batch=8, seed=0)
running = loader.epoch(0)
next(running)
print("begun", flush=True)
raise SystemExit(3)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=repo_root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    assert process.wait(timeout=200) == 3
    process.stdout.close()


def test_closing_inside_an_epoch_ends_the_workers(not_compiled, noise_source, two_views):
    others = multiprocessing.active_children()
    loader = TorchLoader(num_workers=2).bind(noise_source(80), two_views, batch=8, seed=7)
    running = loader.epoch(0)
    next(running)
    assert len(multiprocessing.active_children()) == len(others) + 2
    loader.close()
    assert set(multiprocessing.active_children()) <= set(others)
    assert list(running) == []


def test_a_worker_that_is_killed_is_one_sentence_and_the_next_epoch_goes_on(not_compiled, noise_source, two_views):
    source, others = noise_source(80), multiprocessing.active_children()
    loader = TorchLoader(num_workers=2, prefetch=1).bind(source, two_views, batch=8, seed=7)
    running = loader.epoch(0)
    next(running)
    worker = next(child for child in multiprocessing.active_children() if child not in others)
    worker.kill()
    with pytest.raises(
        UserError,
        match="a worker process that reads images was ended from outside, by SIGKILL, perhaps because memory ran out",
    ):
        list(running)
    assert set(multiprocessing.active_children()) <= set(others)
    assert_same(list(loader.epoch(1)), batches(source, two_views, epochs=(1,)))
    loader.close()


class Slow(ImagesInMemory):
    """A source whose images never arrive, as from storage that does not answer."""

    def image(self, index: int) -> Image.Image:
        time.sleep(3600)
        raise AssertionError("the test's limit on time has come before")


def test_storage_that_does_not_answer_is_not_waited_for_for_ever(not_compiled, noise_source, two_views, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE_S", 0.3)
    monkeypatch.setattr(workers, "_LOOK_S", 0.3)
    others = multiprocessing.active_children()
    slow = Slow(noise_source(8).arrays, name="slow")
    for made in (
        lambda: batches(slow, two_views, workers=1),
        lambda: list(plain_batches(slow, two_views, batch=8, num_workers=1)),
    ):
        with pytest.raises(
            UserError,
            match=r"a worker process has been reading images for 0\.3 s without a result. Does the storage .* answer",
        ):
            made()
    for worker in set(multiprocessing.active_children()) - set(others):
        worker.join(100)  # it was killed, but on a busy machine it may take a while to end
        assert not worker.is_alive()


class Wrong(ImagesInMemory):
    """A source with a bug."""

    error: Exception = ZeroDivisionError("a slip")

    def image(self, index: int) -> Image.Image:
        raise self.error


def test_what_goes_wrong_in_a_worker_is_said_here_with_its_place_if_it_is_a_slip(not_compiled, noise_source, two_views):
    wrong = Wrong(noise_source(8).arrays, name="wrong")
    with pytest.raises(
        RuntimeError,
        match=r"in a process that reads images:\nTraceback (.|\n)*raise self.error(.|\n)*ZeroDivisionError: a slip",
    ):
        batches(wrong, two_views, workers=1)
    wrong.error = UserError("these are no images")
    with pytest.raises(UserError, match="^these are no images$"):
        batches(wrong, two_views, workers=1)


def _no_room(_: object) -> None:
    raise OSError(28, "No space left on device", "/there/file")


def _no_memory(_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("make, said", [(_no_room, "/there/file: No space left"), (_no_memory, "not so much memory")])
def test_what_the_machine_cannot_do_in_a_worker_is_one_sentence(make, said):
    made = workers.Workers(make, [0], 1, ahead=1)
    with pytest.raises(UserError, match=said):
        next(iter(made))
    made.close()


def test_processes_that_cannot_be_started_are_one_sentence(not_compiled, noise_source, two_views, monkeypatch):
    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(UserError, match="num_workers=2: this machine cannot start more processes .*; use fewer"):
        batches(noise_source(8), two_views, workers=2)


def make_with_nothing_to_spare(folder: str) -> None:
    """Make batches in a process whose files may not grow beyond 1 kB, even in /dev/shm, and in which the path of a
    socket in TMPDIR would be too long.
    """
    os.environ["TMPDIR"] = os.path.join(folder, "x" * 90)
    os.mkdir(os.environ["TMPDIR"])
    source = ImagesInMemory(np.zeros((64, 32, 32, 3), np.uint8), name="black")
    native.library = lambda: None
    views = Views(size=64, views={"both": View(count=2)}, mean=[0.5] * 3, std=[0.5] * 3)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    made = batches(source, views, epochs=(0, 1), workers=2, batch=32)
    plain = list(plain_batches(source, views, batch=32, num_workers=2))
    print(len(made), len(plain), made[3].views[1].shape)


def test_workers_need_neither_shared_files_nor_sockets(tmp_path):
    code, told, errors = Process(make_with_nothing_to_spare, str(tmp_path)).end()
    assert code == 0, errors
    assert told.strip() == "4 2 torch.Size([32, 3, 64, 64])"


def test_results_that_are_larger_than_was_said_go_through_the_pipe():
    made = workers.Workers(lambda size: np.arange(size), [10, 100_000, 3, 50_000], 2, ahead=2, item_bytes=800)
    assert [len(one) for one in made] == [10, 100_000, 3, 50_000] == [len(one) for one in made]
    assert all((one == np.arange(len(one))).all() for one in made)
    made.close()


class Threads(Source):
    """A source in which each pixel is the number of torch's threads in the process that reads it."""

    name, labels, classes = "threads", None, None

    def __len__(self) -> int:
        return 2

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (torch.get_num_threads(),) * 3)

    def part(self, indices, name):
        return self

    def digest(self):
        return self.name


def test_workers_use_one_thread():
    views = Views(size=8, plain_crop=1.0, views={"one": View()}, mean=[0.0] * 3, std=[1 / 255] * 3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = {
            number: next(plain_batches(Threads(), views, batch=2, num_workers=number))[0].max() for number in (0, 1)
        }
    finally:
        torch.set_num_threads(before)
    assert seen[0] == pytest.approx(2) and seen[1] == pytest.approx(1)
