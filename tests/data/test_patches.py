"""Views that are cut into patches: where the patches lie, their order, and what is done to each. All of it depends only
on seed, epoch and image.
"""

from typing import Any

import numpy as np
import pytest
import torch
from loaded import EVERY_PART, FFCV, assert_same, batches
from PIL import Image
from scipy.stats import kstest

from caco.config import composition, validation
from caco.config.composition import instantiate
from caco.data.loaders.batches import Batch
from caco.data.loaders.torch_loader import TorchLoader
from caco.data.sets.folders import folder
from caco.data.sets.memory import ImagesInMemory
from caco.data.views.augmentation import Patches, View, Views
from caco.data.views.draws import stream_of, uniforms
from caco.data.views.operations import DropChannels, Grayscale, RandAugment
from caco.errors import UserError

WHOLE: dict[str, Any] = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "jitter_p": 0.0, "gray_p": 0.0, "flip_p": 0.0}


def recipe(size: int, patches: Patches, **view) -> Views:
    views = {"cut": View(size=size, patches=patches, **WHOLE | view)}
    # so that normalisation keeps the pixel values
    return Views(size=size, views=views, mean=[0.0] * 3, std=[1 / 255] * 3)


def places(size: int) -> np.ndarray:
    """An image in which the red of each pixel is its row and the green its column."""
    y, x = np.mgrid[:size, :size]
    return np.stack([y, x, 0 * x], -1).astype(np.uint8)


def patches_of(views: Views, samples, stream: int = 5) -> np.ndarray:
    """Patches [B, P, h, w, 3] of the same image under B different image numbers."""
    *_, patches = views.batch_pixels([places(views.size)] * len(samples), np.asarray(samples), stream)
    return patches


def corners(patches: np.ndarray) -> np.ndarray:
    """Row and column of each patch's corner, [B, P, 2], after a check that the patch is exactly the window there."""
    height, width = patches.shape[2:4]
    corner = patches[:, :, 0, 0, :2].astype(int)
    y, x = np.mgrid[:height, :width]
    assert np.array_equal(patches[..., 0], corner[..., 0, None, None] + y)
    assert np.array_equal(patches[..., 1], corner[..., 1, None, None] + x)
    return corner


def test_overlapping_patches_by_hand():
    """CPC v2 takes 6 x 6 patches of 80 px, 36 px apart, from 260 px; this test uses a tenth of these sizes."""
    views = recipe(26, Patches(grid=6, size=8, stride=3))
    by_hand = [[3 * row, 3 * column] for row in range(6) for column in range(6)]
    assert corners(patches_of(views, [0, 1])).tolist() == [by_hand, by_hand]
    published = instantiate(composition.compose(["augmentation=cpcv2"]).augmentation).patches
    assert (published.grid, published.size, published.stride, published.extent) == (6, 80, 36, 260)


@pytest.mark.parametrize(("name", "jitter"), [("infomin", 21), ("pirl", 20)])
def test_the_published_jigsaws_geometry(name, jitter):
    """Images of 255 px have cells of 85 px and windows of 64 px. InfoMin's code draws offsets from 0 to 21, PIRL's from
    0 to 20.
    """
    patches = instantiate(composition.compose([f"augmentation={name}"]).augmentation).patches
    assert (patches.grid, patches.size, patches.stride, patches.jitter, patches.shuffled) == (3, 64, 85, jitter, True)
    assert patches.extent <= 255


def test_each_window_lies_anywhere_in_its_cell_and_nowhere_else():
    patches = Patches(grid=3, size=4, stride=10, jitter=6)
    cells = np.array([[10 * row, 10 * column] for row in range(3) for column in range(3)])
    offset = corners(patches_of(recipe(30, patches), range(3000))) - cells
    assert offset.min() == 0 and offset.max() == 6
    for patch in range(9):
        for axis in (0, 1):
            counts = np.bincount(offset[:, patch, axis], minlength=7)
            assert abs(counts / 3000 - 1 / 7).max() < 0.03, (patch, axis)
    assert abs(np.corrcoef(offset.reshape(3000, 18).T) - np.eye(18)).max() < 0.1, (
        "the offsets of patches and axes must be independent"
    )


def test_where_the_windows_lie_is_said_by_numbers_of_their_own():
    """These random numbers follow those of the view and of its `then`: two for each window's place, one for its rank in
    the order.
    """
    patches = Patches(grid=2, size=4, stride=10, jitter=6, shuffled=True)
    views = recipe(20, patches, then={"gray": Grayscale(p=0.0)})
    u = uniforms(5, np.arange(50), 0, 39 + 1 + 12)[:, 40:]
    corner = np.array([[0, 0], [0, 10], [10, 0], [10, 10]]) + np.stack([u[:, :4], u[:, 4:8]], -1) * 7 // 1
    in_turn = np.take_along_axis(corner, u[:, 8:].argsort(1)[..., None], 1)
    assert np.array_equal(corners(patches_of(views, range(50))), in_turn)


def test_the_order_is_any_permutation_alike_and_the_windows_are_those_of_the_ordered_ones():
    shuffled, ordered = (Patches(grid=2, size=4, stride=5, jitter=1, shuffled=flag) for flag in (True, False))
    mixed, straight = (patches_of(recipe(10, patches), range(2400)) for patches in (shuffled, ordered))
    order = (corners(mixed) // 5 @ [2, 1]).tolist()
    counts = {}
    for one in map(tuple, order):
        counts[one] = counts.get(one, 0) + 1
    assert len(counts) == 24 and all(60 < count < 150 for count in counts.values())
    assert all(np.array_equal(a, b[permutation]) for a, b, permutation in zip(mixed, straight, order, strict=True))


def test_patches_depend_on_seed_epoch_and_image_alone():
    views = recipe(30, Patches(grid=3, size=4, stride=10, jitter=6, shuffled=True))
    together = patches_of(views, range(20))
    assert np.array_equal(patches_of(views, [7])[0], together[7])
    assert not np.array_equal(patches_of(views, [7], stream=6)[0], together[7]) and not np.array_equal(
        together[6], together[7]
    )


def test_what_is_done_to_each_patch_is_drawn_for_each_and_as_for_an_image_of_its_own():
    each = View(**WHOLE | {"flip_p": 0.5, "gray_p": 0.3})
    patches = patches_of(recipe(12, Patches(grid=2, size=6, stride=6, each=each)), range(200))
    whole = patches_of(recipe(12, Patches(grid=2, size=6, stride=6)), range(200))
    flipped = (patches[:, :, 0, 0, 1] > patches[:, :, 0, -1, 1]) & (np.ptp(patches, axis=-1).max((2, 3)) > 0)
    grey = np.ptp(patches, axis=-1).max((2, 3)) == 0
    assert 0.25 < grey.mean() < 0.35 and np.corrcoef(grey.T)[0, 1] < 0.2
    assert 0.4 < flipped.mean() / (1 - grey.mean()) < 0.6
    alone = Views(size=6, views={"each": each}, mean=[0.0] * 3, std=[1 / 255] * 3)
    images = whole.reshape(-1, 6, 6, 3)
    (expected,) = alone.batch_pixels(list(images), np.arange(800), stream_of(5, 0))
    assert np.array_equal(patches.reshape(-1, 6, 6, 3), expected)


@pytest.fixture(params=["rgb", "lab"])
def everything(request) -> Views:
    """Whole views with operations that are not compiled, and shuffled patches that have such operations as well."""
    return Views(
        size=8,
        views={
            "cut": View(
                size=20, blur_p=0.5, then={"drop": DropChannels(p=0.5)},
                patches=Patches(
                    grid=3, size=4, stride=6, jitter=2, shuffled=True,
                    each=View(scale=[0.8, 1.0], then={"rand": RandAugment(), "gray": Grayscale()}),
                ),
            ),
            "both": View(count=2, blur_p=0.5, then={"rand": RandAugment(p=1.0), "gray": Grayscale()}),
            "small": View(size=6),
        },
        mean=[0.5] * 3, std=[0.25] * 3, colours=request.param,
    )  # fmt: skip


def test_all_ways_to_make_batches_make_the_same_bits(noise_source, beton_source, everything, monkeypatch):
    source = noise_source(30)
    expected = batches(source, everything, epochs=(0, 1))
    assert [tuple(view.shape) for view in expected[0].views] == [(8, 3, 8, 8), (8, 3, 8, 8), (8, 3, 6, 6)]
    assert tuple(expected[0].patches.shape) == (8, 9, 3, 4, 4) and expected[0].patches.isfinite().all()
    assert_same(batches(source, everything, epochs=(0, 1), workers=3), expected)
    assert_same(batches(beton_source(30), everything, epochs=(0, 1), workers=2), expected)
    monkeypatch.setattr("caco.data.views.native.library", lambda: None)
    assert_same(batches(source, everything, epochs=(0, 1)), expected)


@pytest.mark.parametrize("kind", [TorchLoader, FFCV])
def test_ranks_and_a_run_that_goes_on_see_the_same_patches(noise_source, beton_source, everything, kind):
    source, file = noise_source(30), beton_source(30)
    for part in EVERY_PART[1:3]:
        assert_same(batches(file, everything, kind=kind, workers=1, **part), batches(source, everything, **part))
    whole = batches(source, everything)
    halves = [batches(source, everything, rank=rank, world=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.patches, torch.cat([half[step].patches for half in halves]))


def test_an_unreadable_image_s_stand_in_is_cut_too(everything, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    source = folder(root=str(tmp_path), in_memory_mb=0).pretrain
    (batch,) = batches(source, everything, corrupt="skip")
    at = batch.index.tolist().index(4)
    assert batch.index.tolist().count(4) == 2 and batch.patches[at].isfinite().all()


def test_a_batch_is_cut_into_parts_with_its_patches():
    index = torch.arange(6)
    batch = Batch([torch.arange(6.0).view(6, 1, 1, 1)], index, index, torch.arange(12.0).view(6, 2, 1, 1, 1))
    parts = list(batch.parts(3))
    assert [part.index.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(parts[1].patches, batch.patches[2:4]) and torch.equal(parts[1].views[0], batch.views[0][2:4])
    assert [part.patches.shape[0] for part in Batch([], index, index, batch.patches).parts(2)] == [3, 3]


def test_a_view_s_further_numbers_leave_the_first_as_they_were():
    """Compiled views use 39 random numbers; later steps use the next numbers of the same sequence."""
    assert np.array_equal(uniforms(3, np.arange(5), 2, 60)[:, :39], uniforms(3, np.arange(5), 2))
    further = uniforms(3, np.arange(400), 0, 60)[:, 39:]
    assert kstest(further.ravel(), "uniform").pvalue > 0.001
    assert len({stream_of(stream, v) for stream in range(50) for v in range(4)}) == 200


def views_of(views: dict, **settings) -> Views:
    return Views(size=8, views=views, mean=[0.0] * 3, std=[1.0] * 3, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patches(grid=1, size=4, stride=4), "grid: expected int from 2, got 1"),
        (lambda: Patches(grid=3, size=4, stride=4, jitter=-1), "jitter: expected int from 0, got -1"),
        (lambda: Patches(grid=2, size=4, stride=4, each=View(count=2)),
        "a view without patches, count or size"),
        (lambda: View(size=20, patches=Patches(grid=3, size=8, stride=7)), "patches that reach over 22 pixels"),
        (lambda: View(patches=Patches(grid=2, size=4, stride=4)), "a view of count 1 with a size of its own"),
        (lambda: View(then={"mine": len}),  # type: ignore[dict-item]  # what a YAML may say, and is refused
        r"view then\.mine: builtin_function_or_method has no numbers"),
        (lambda: views_of({n: View(size=8, patches=Patches(grid=2, size=4, stride=4)) for n in "ab"}),
        "at most one kind that is cut"),
        (lambda: views_of({"a": View()}, colours="hsv"), r"colours: expected rgb \| lab \| ydbdr \| ycbcr, got 'hsv'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_patches_in_a_yaml_are_checked_as_every_setting():
    cfg = composition.compose(["method=infomin", "data.root=/tmp", "augmentation.views.jigsaw.patches.jitter=much"])
    with pytest.raises(
        UserError, match=r"augmentation\.views\.jigsaw\.patches\.jitter: expected int from 0, got 'much'"
    ):
        validation.check(cfg)
    cfg = composition.compose(
        ["method=infomin", "data.root=/tmp", "+augmentation.views.both.then.rand_augment.magnitud=3"]
    )
    with pytest.raises(
        UserError, match=r"then\.rand_augment\.magnitud: RandAugment takes no such argument; did you mean magnitude"
    ):
        validation.check(cfg)
    cfg = composition.compose(
        ["method=infomin", "data.root=/tmp", "augmentation.views.both.then.rand_augment.magnitude=3"]
    )
    views = instantiate(cfg.augmentation)
    assert views.kinds.kinds[0][0].then["rand_augment"].magnitude == 3


def test_images_in_the_size_of_the_cut_view_are_not_resampled():
    """A crop of a whole 255 px image equals the image."""
    image = np.random.default_rng(0).integers(0, 256, (255, 255, 3), np.uint8)
    views = recipe(255, Patches(grid=3, size=64, stride=85))
    (batch,) = batches(ImagesInMemory(image[None], name="one", labels=None, classes=None), views, batch=1)
    assert np.array_equal(batch.patches[0, 4].permute(1, 2, 0).numpy(), image[85:149, 85:149])
