"""Compiled views equal Pillow's to the bit, for all images, sizes, settings and numbers of threads."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from caco import instructions
from caco.data.views import native
from caco.data.views.augmentation import View, Views
from caco.data.views.colours import change_contrast, turn_hue
from caco.data.views.draws import uniforms

QUIET = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "jitter_p": 0.0, "gray_p": 0.0, "flip_p": 0.0}
CASES = {
    "crop": {"jitter_p": 0.0, "gray_p": 0.0},
    "bicubic": {"jitter_p": 0.0, "gray_p": 0.0, "interpolation": "bicubic", "ratio": [0.2, 5.0]},
    "brightness": QUIET | {"jitter_p": 1.0, "jitter": [0.8, 0.0, 0.0, 0.0]},
    "contrast": QUIET | {"jitter_p": 1.0, "jitter": [0.0, 0.8, 0.0, 0.0]},
    "saturation": QUIET | {"jitter_p": 1.0, "jitter": [0.0, 0.0, 0.8, 0.0]},
    "hue": QUIET | {"jitter_p": 1.0, "jitter": [0.0, 0.0, 0.0, 0.5]},
    "gray": QUIET | {"gray_p": 1.0},
    "blur": QUIET | {"blur_p": 1.0},
    "wide blur": QUIET | {"blur_p": 1.0, "blur": [2.0, 9.0]},
    "solarize": QUIET | {"solarize_p": 1.0},
    "flip": QUIET | {"flip_p": 1.0},
    "rotate and shift": QUIET | {"rotate": 180.0, "shift": 0.4},
    "all": {"rotate": 10.0, "shift": 0.1, "blur_p": 0.5, "solarize_p": 0.5, "jitter": [0.8, 0.8, 0.8, 0.2]},
}


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    if native.library() is None:
        pytest.skip(f"the compiled views {native.why_not()}")


@pytest.fixture(params=["plain", "avx2", "avx512"])
def level(request, monkeypatch) -> None:
    """Each instruction set for which the steps are compiled and which this processor has."""
    monkeypatch.setattr(instructions, "LEVEL", request.param)
    if (serves := instructions.used(instructions.VIEWS)) != request.param:
        pytest.skip(f"needs compiled views that use {request.param}; here they are {serves}")


def images(height: int, width: int) -> list[np.ndarray]:
    """An image of noise, one of smooth colours, and one of black beside white."""
    rng = np.random.default_rng(height * width)
    y, x = np.mgrid[:height, :width]
    wash = np.stack([3 * x + y, 5 * y, 255 - 2 * x], -1).astype(np.uint8)
    return [
        rng.integers(0, 256, (height, width, 3), np.uint8),
        wash,
        np.repeat((x // 3 % 2 * 255)[..., None], 3, -1).astype(np.uint8),
    ]


def both(
    views: Views, arrays: list[np.ndarray], *, samples=None, threads=2
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The uint8 views made by the compiled library, and those made by Pillow."""
    samples = np.arange(len(arrays)) if samples is None else samples
    ours = [np.empty((len(arrays), size, size, 3), np.uint8) for size in views.sizes]
    native.make_views(views.settings(), native.table(arrays), samples, 9, ours, num_threads=threads)
    theirs = [
        np.stack(
            [
                views.view_pixels(Image.fromarray(a), v, u)
                for a, u in zip(arrays, uniforms(9, samples, v).tolist(), strict=True)
            ]
        )
        for v in range(views.num_views)
    ]
    return ours, theirs


@pytest.mark.parametrize("case", CASES)
def test_every_step_equals_pillows(case, level):
    sizes = (1, 7, 32, 33)
    views = Views(size=8, views={str(s): View(size=s, **CASES[case]) for s in sizes}, mean=[0.5] * 3, std=[0.5] * 3)
    arrays = [
        image for height, width in ((32, 32), (1, 5), (50, 37), (23, 140), (7, 7)) for image in images(height, width)
    ]
    for ours, theirs in zip(*both(views, arrays), strict=True):
        assert np.array_equal(ours, theirs)


def test_the_papers_views_of_photographs_sizes_equal_pillows(level):
    kind = {"blur_p": 0.5, "solarize_p": 0.3}
    views = Views(
        size=224,
        views={"large": View(**kind), "small": View(size=96, scale=[0.05, 0.14], **kind)},
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
    arrays = [image for _ in range(2) for image in images(375, 500) + images(333, 240)]
    for ours, theirs in zip(*both(views, arrays), strict=True):
        assert np.array_equal(ours, theirs)


def all_colours() -> np.ndarray:
    """An image, uint8 [4096, 4096, 3], that has each of the 2**24 colours once."""
    every = np.arange(2**24, dtype=np.uint32)
    return np.stack([every, every >> 8, every >> 16], -1).astype(np.uint8).reshape(4096, 4096, 3)


def test_hue_and_contrast_equal_pillows_for_every_colour(monkeypatch):
    colours = all_colours()
    views = Views(
        size=4096,
        views={"hue": View(**CASES["hue"]), "contrast": View(**CASES["contrast"])},
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
    factors = [uniforms(9, np.array([0]), v)[0, 35:] for v in (0, 1)]
    image = Image.fromarray(colours)
    turned, changed = turn_hue(image, -0.5 + factors[0][3]), change_contrast(image, 0.2 + 1.6 * factors[1][1])
    ours = [np.empty((1, 4096, 4096, 3), np.uint8) for _ in range(2)]
    for level in ("plain", "avx2", "avx512"):  # a level that the processor lacks falls back to its best
        monkeypatch.setattr(instructions, "LEVEL", level)
        for one in ours:
            one.fill(0)
        native.make_views(views.settings(), native.table([colours]), np.array([0]), 9, ours)
        assert np.array_equal(ours[0][0], np.asarray(turned))
        assert np.array_equal(ours[1][0], np.asarray(changed))


def test_every_turn_of_the_hue_equals_pillows_for_every_saturation_and_value(level):
    """This tests all inputs of the conversion from HSV to RGB; the test above tests all of the conversion to HSV."""
    value, spread = np.mgrid[:256, :256]
    colours = np.stack([value, np.maximum(value - spread, 0), np.maximum(value - spread, 0)], -1).astype(np.uint8)
    views = Views(size=256, views={"hue": View(**CASES["hue"])}, mean=[0.5] * 3, std=[0.5] * 3)
    turns = uniforms(9, np.arange(4000), 0)[:, 38] - 0.5
    _, samples = np.unique((turns * 255).astype(int), return_index=True)
    assert len(samples) == 255
    ours = [np.empty((255, 256, 256, 3), np.uint8)]
    native.make_views(views.settings(), native.table([colours] * 255), samples, 9, ours, num_threads=2)
    for one, turn in zip(ours[0], turns[samples], strict=True):
        assert np.array_equal(one, np.asarray(turn_hue(Image.fromarray(colours), turn)))


@pytest.mark.parametrize("height", [17, 70, 201])
@pytest.mark.parametrize(
    "options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"quality": 20}]
)
def test_a_jpeg_of_which_only_some_rows_are_decoded_gives_the_views_of_the_whole(height, options):
    if native.turbojpeg() is None:
        pytest.skip("libturbojpeg is missing")
    files, arrays = [], []
    for array in images(height, 90) + [image[..., 0].copy() for image in images(height, 41)]:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", **options)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
        arrays.append(np.asarray(Image.open(file).convert("RGB")))
    views = Views(size=24, views={"one": View(scale=[0.02, 0.3])}, mean=[0.5] * 3, std=[0.5] * 3)
    many = np.arange(40) % len(files)
    table = native.table([arrays[i] for i in many])
    expected, made = ([np.empty((40, 24, 24, 3), np.uint8)] for _ in range(2))
    native.make_views(views.settings(), table, np.arange(40), 9, expected)
    table["data"], table["bytes"] = [files[i].ctypes.data for i in many], [len(files[i]) for i in many]
    assert not native.make_views(views.settings(), table, np.arange(40), 9, made, num_threads=2).any()
    assert np.array_equal(made[0], expected[0])
    table["bytes"] -= 40  # a file that is cut short is noticed, whichever rows are missing
    assert native.make_views(views.settings(), table, np.arange(40), 9, made).all()


def test_normalised_views_equal_torchs_normalisation_of_the_pixels(level):
    views = Views(size=9, views={"one": View(count=2)}, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    arrays = images(20, 30)
    pixels, _ = both(views, arrays)
    floats = [np.empty((3, 9, 9, 3), np.float32) for _ in range(2)]
    native.make_views(views.settings(), native.table(arrays), np.arange(3), 9, floats)
    for a, b in zip(pixels, floats, strict=True):
        assert torch.equal(views.normalise(torch.from_numpy(a)), torch.from_numpy(b).permute(0, 3, 1, 2))


@pytest.mark.parametrize("threads", [1, 3, 50])
def test_threads_and_company_do_not_change_a_view(threads):
    views = Views(size=12, views={"one": View(count=2, blur_p=0.5)}, mean=[0.5] * 3, std=[0.5] * 3)
    arrays = [image for size in range(8, 20) for image in images(size, 12)]
    together, _ = both(views, arrays, threads=threads)
    alone, _ = both(views, [arrays[17]], samples=np.array([17]))
    assert all(np.array_equal(a[17], b[0]) for a, b in zip(together, alone, strict=True))
