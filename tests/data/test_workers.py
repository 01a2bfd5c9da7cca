"""The processes that make views: they outlive signals to the whole job, and end with the loader, whatever ends that."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loaded import assert_same, batches
from PIL import Image

from caco.data.loaders.plain import plain_batches
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.sources import Source
from caco.data.views.augmentation import View, Views


def test_workers_outlive_signals_to_the_whole_job_and_end_with_the_loader(not_compiled, noise_source, two_views):
    source = noise_source(80)
    others = multiprocessing.active_children()
    loader = TorchLoader(num_workers=2, prefetch=1).bind(source, two_views, batch=8, seed=7)
    running = loader.epoch(0)
    made = [next(running)]
    workers = [child for child in multiprocessing.active_children() if child not in others]
    for name in ("USR2", "TERM", "INT"):  # sent by another process, as SLURM does to all processes of a step
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    made += list(running)
    assert_same(made, batches(source, two_views))
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    loader.close()
    for worker in workers:
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
from caco.data.sets.sources import ImagesInMemory
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
    assert process.stdout.readline() == "begun\n"
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


class Threads(Source):
    """A source whose every pixel is the number of torch's threads where it is read."""

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
        seen = {workers: next(plain_batches(Threads(), views, batch=2, num_workers=workers))[0].max() for workers in (0, 1)}
    finally:
        torch.set_num_threads(before)
    assert seen[0] == pytest.approx(2) and seen[1] == pytest.approx(1)
