"""Loaders: all of them make the same batches, and errors come at once and name the file.

No test measures time, because other processes would disturb it. To test that nothing waits after an error, the usual
wait of five seconds for a worker is raised to a thousand, so that a wait ends in the test's time-out.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from loaded import FFCV, assert_same, batches, by_image

from caco.data.loaders import workers as workers_of_loader
from caco.data.loaders.batches import Batch
from caco.data.loaders.ffcv_loader import FFCVLoader
from caco.data.loaders.plain import plain_batches
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.folders import folder
from caco.data.sets.memory import ImagesInMemory
from caco.data.views import native
from caco.data.views.augmentation import View, Views


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (3, 2)])
def test_workers_do_not_change_a_batch(noise_source, two_views, workers, prefetch):
    source = noise_source(30)
    alone = batches(source, two_views, epochs=(-1, 0, 1))
    assert_same(batches(source, two_views, epochs=(-1, 0, 1), workers=workers, prefetch=prefetch), alone)


@pytest.mark.parametrize("kind", [TorchLoader, FFCV])
def test_a_smaller_last_batch_is_kept_where_it_is_asked_for(noise_source, beton_source, two_views, kind):
    """Every image comes once, the ranks share them as evenly as possible, and the whole batches are as without it."""
    source = beton_source(29) if kind is FFCVLoader else noise_source(29)
    whole = batches(source, two_views, kind=kind, workers=1)
    made = batches(source, two_views, kind=kind, workers=1, drop_last=False)
    assert_same(made[:3], whole)
    assert [len(one.index) for one in made] == [8, 8, 8, 5] and sorted(by_image(made)) == list(range(29))
    assert_same(batches(source, two_views, kind=kind, workers=1, drop_last=False, start_step=3), made[3:])
    ranks = [batches(source, two_views, kind=kind, workers=1, drop_last=False, rank=rank, world=2) for rank in (0, 1)]
    assert [[len(one.index) for one in rank] for rank in ranks] == [[4, 4, 4, 2], [4, 4, 4, 3]]
    for parts, one in zip(zip(*ranks, strict=True), made, strict=True):
        assert torch.equal(torch.cat([part.index for part in parts]), one.index)
        assert torch.equal(torch.cat([part.views[2] for part in parts]), one.views[2])


def test_a_last_batch_that_leaves_a_rank_without_an_image_is_dropped(noise_source, two_views):
    for rank in range(4):
        made = batches(noise_source(27), two_views, drop_last=False, rank=rank, world=4)
        assert [len(one.index) for one in made] == [2, 2, 2]


@pytest.mark.parametrize("kind", [TorchLoader, FFCV])
def test_a_batch_stays_as_it_is_as_long_as_somebody_holds_it(noise_source, beton_source, two_views, kind):
    source = beton_source(64) if kind is FFCVLoader else noise_source(64)
    loader = kind(num_workers=2, prefetch=2).bind(source, two_views, batch=8, seed=7)
    held, copies = [], []
    for epoch in range(3):
        for one in loader.epoch(epoch):
            held.append(one.views[1][3])
            copies.append(held[-1].clone())
    loader.close()
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


@pytest.mark.parametrize("kind", [TorchLoader, FFCV])
def test_memory_stays_flat_over_epochs(beton_source, noise_source, two_views, kind):
    source = beton_source(64) if kind is FFCVLoader else noise_source(64)
    views = Views(size=64, views={"both": View(count=2)}, mean=[0.5] * 3, std=[0.25] * 3)  # 6.3 MB per batch
    loader = kind(num_workers=2, prefetch=2).bind(source, views, batch=64, seed=7)

    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    def run(epochs: range) -> float:
        for epoch in epochs:
            for _ in loader.epoch(epoch):
                pass
        return resident_mb()

    before = run(
        range(10 if native.library() else 100)
    )  # with Pillow, the allocator's reserve grows over this many epochs
    assert run(range(100, 130)) < before + 15
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_compiled_views_and_pillows_make_the_same_batches(noise_source, two_views, workers, request):
    source = noise_source(30)
    compiled = batches(source, two_views, epochs=(-1, 2), workers=3)
    request.getfixturevalue("not_compiled")
    assert_same(batches(source, two_views, epochs=(-1, 2), workers=workers), compiled)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_inside_an_epoch_gives_the_rest_of_it(noise_source, two_views, workers):
    source = noise_source(40)
    whole = batches(source, two_views, epochs=(3,))
    assert_same(batches(source, two_views, epochs=(3,), start_step=2, workers=workers), whole[2:])


def test_an_epoch_left_early_does_not_leak_into_the_next(noise_source, two_views):
    source = noise_source(40)
    loader = TorchLoader(num_workers=2, prefetch=2).bind(source, two_views, batch=8, seed=7)
    next(loader.epoch(0))
    assert_same(list(loader.epoch(1)), batches(source, two_views, epochs=(1,)))
    loader.close()


def test_every_image_comes_at_most_once_an_epoch_and_the_rest_is_dropped(noise_source, two_views):
    source = noise_source(30)
    made = batches(source, two_views)
    indices = torch.cat([one.index for one in made])
    assert len(made) == 3 and len(indices) == 24 == len(indices.unique())
    assert TorchLoader(num_workers=0).bind(source, two_views, batch=8, seed=7).steps_per_epoch == 3
    assert torch.equal(torch.cat([one.label for one in made]), torch.from_numpy(source.labels)[indices])


def test_order_and_views_differ_between_epochs_and_seeds(noise_source, two_views):
    source = noise_source(32)
    streams = [
        batches(source, two_views, epochs=(epoch,), seed=seed)
        for epoch, seed in [(0, 7), (1, 7), (-1, 7), (-2, 7), (0, 8)]
    ]
    for a in range(len(streams)):
        for b in range(a):
            order = [torch.cat([one.index for one in stream]) for stream in (streams[a], streams[b])]
            assert not torch.equal(*order)
            ours, theirs = by_image(streams[a]), by_image(streams[b])
            same = [torch.equal(ours[i][v], theirs[i][v]) for i in ours for v in range(3)]
            assert not any(same)


def test_views_and_samples_draw_apart(two_views):
    """Equal images at different positions get different views, and views 0 and 1 differ."""
    source = ImagesInMemory(
        np.repeat(np.random.default_rng(0).integers(0, 256, (1, 12, 12, 3), np.uint8), 16, 0), name="equal"
    )
    drawn = [view for pair in by_image(batches(source, two_views)).values() for view in pair[:2]]
    assert len({view.numpy().tobytes() for view in drawn}) == 32


def test_a_view_depends_on_seed_epoch_sample_and_view_alone(noise_source, two_views):
    """A view does not depend on the image's place in the batch, on the batch size, or on the images before it."""
    source = noise_source(32)
    ours, theirs = by_image(batches(source, two_views, batch=8)), by_image(batches(source, two_views, batch=4))
    for i in ours:
        assert all(torch.equal(a, b) for a, b in zip(ours[i], theirs[i], strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_have_the_batch_of_one_process(noise_source, two_views, world):
    source = noise_source(30)
    one = batches(source, two_views, epochs=(0, 1))
    parts = [batches(source, two_views, epochs=(0, 1), rank=rank, world=world) for rank in range(world)]
    joined = [
        Batch(
            [torch.cat([part.views[v] for part in step]) for v in range(3)],
            torch.cat([part.index for part in step]),
            torch.cat([part.label for part in step]),
        )
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, one)
    assert all(len(part.index) == 8 // world for part in parts[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_caller_keeps_its_random_state(noise_source, two_views, workers):
    source = noise_source(16)
    before = torch.get_rng_state()
    batches(source, two_views, workers=workers)
    list(plain_batches(source, two_views, batch=8, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_callers_random_state_does_not_change_a_batch(noise_source, two_views):
    source = noise_source(16)
    torch.manual_seed(1)
    first = batches(source, two_views)
    torch.manual_seed(2)
    assert_same(batches(source, two_views), first)


@pytest.mark.parametrize("workers", [0, 2])
def test_plain_batches_are_complete_and_in_order(noise_source, two_views, workers):
    source = noise_source(11)
    made = list(plain_batches(source, two_views, batch=4, num_workers=workers))
    assert [len(labels) for _, labels in made] == [4, 4, 3]
    assert torch.equal(torch.cat([labels for _, labels in made]), torch.from_numpy(source.labels))
    images = torch.cat([images for images, _ in made])
    assert torch.equal(images, torch.stack([two_views.plain(source.image(i)) for i in range(11)]))


def test_views_are_normalised_floats_in_channels_last(noise_source, two_views):
    (one,) = batches(noise_source(8), two_views)
    assert [tuple(view.shape) for view in one.views] == [(8, 3, 8, 8), (8, 3, 8, 8), (8, 3, 6, 6)]
    for view in one.views:
        assert view.dtype == torch.float32 and view.is_contiguous(memory_format=torch.channels_last)
        assert view.min() >= -2 and view.max() <= 2 and view.min() < 0 < view.max()


def test_unlabelled_images_have_label_minus_one(two_views):
    source = ImagesInMemory(np.zeros((8, 12, 12, 3), np.uint8), name="unlabelled")
    assert batches(source, two_views)[0].label.tolist() == [-1] * 8


@pytest.mark.timeout(200)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_at_once(tmp_path: Path, write_images: Callable, two_views, workers, monkeypatch):
    monkeypatch.setattr(workers_of_loader, "_LOOK_S", 1000.0)
    write_images(tmp_path / "cat", 20)
    (tmp_path / "cat" / "0013.png").write_bytes(b"not an image")
    source = folder(root=str(tmp_path), in_memory_mb=0).pretrain
    others = multiprocessing.active_children()
    with pytest.raises(
        ValueError, match=r"cat/0013\.png: expected an image that can be read, got Unidentified"
    ) as caught:
        batches(source, two_views, batch=10, workers=workers)
    assert "Traceback" not in str(caught.value)
    # the workers have ended although the exception is still referenced
    assert set(multiprocessing.active_children()) <= set(others)
    with pytest.raises(ValueError, match=r"cat/0013\.png"):
        list(plain_batches(source, two_views, batch=10, num_workers=workers))


def test_what_does_not_fit_is_refused(noise_source, two_views):
    source = noise_source(10)
    with pytest.raises(ValueError, match="at most the 10 images of noise, got 16"):
        TorchLoader(num_workers=0).bind(source, two_views, batch=16, seed=0)
    with pytest.raises(ValueError, match=r"multiple of the 4 processes that share it, got 6\. Try batch=4"):
        TorchLoader(num_workers=0).bind(source, two_views, batch=6, seed=0, world=4)
    with pytest.raises(ValueError, match=r"start_step: expected 0\.\.2, got 3"):
        TorchLoader(num_workers=0).bind(source, two_views, batch=5, seed=0).epoch(0, 3)
    with pytest.raises(ValueError, match="num_workers: expected int from 0 up to 1024, got -1"):
        TorchLoader(num_workers=-1)
    with pytest.raises(ValueError, match="prefetch: expected int from 1 up to 1024, got 0"):
        TorchLoader(prefetch=0)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        next(plain_batches(source, two_views, batch=0))
