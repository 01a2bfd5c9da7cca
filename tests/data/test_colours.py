"""Colour spaces: conversions compared with formulas in float64 and with known colours, and their use in recipes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from loaded import batches
from PIL import Image

from caco.config import views_needed
from caco.config.composition import compose, instantiate
from caco.data.loaders.batches import mixed_seed
from caco.data.views.augmentation import View, Views
from caco.data.views.colours import CONVERSIONS


def lab_by_hand(r: float, g: float, b: float) -> list[float]:
    """CIE 1976 Lab of an sRGB colour under D65."""
    linear = [((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in (r, g, b)]
    rows = ([0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227])
    white = (0.95047, 1.0, 1.08883)
    xyz = [sum(m * c for m, c in zip(row, linear, strict=True)) / w for row, w in zip(rows, white, strict=True)]
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return [116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)]


def ydbdr_by_hand(r: float, g: float, b: float) -> list[float]:
    return [0.299 * r + 0.587 * g + 0.114 * b, -0.45 * r - 0.883 * g + 1.333 * b, -1.333 * r + 1.116 * g + 0.217 * b]


def ycbcr_by_hand(r: float, g: float, b: float) -> list[float]:
    return [
        16 + 65.481 * r + 128.553 * g + 24.966 * b, 128 - 37.797 * r - 74.203 * g + 112 * b,
        128 + 112 * r - 93.786 * g - 18.214 * b,
    ]  # fmt: skip


BY_HAND = {"lab": lab_by_hand, "ydbdr": ydbdr_by_hand, "ycbcr": ycbcr_by_hand}


# The results of skimage.color (scikit-image 0.26; the published code calls it) for red, a dark and a mixed 8-bit
# colour.
SCIKIT_IMAGE = {
    "lab": [[53.240588, 80.092308, 67.202751], [2.530334, -0.020471, 2.557631], [65.250628, -16.885725, -34.829776]],
    "ydbdr": [[0.299, -0.45, -1.333], [0.036129, -0.036659, -0.020788], [0.536588, 0.490784, 0.722118]],
    "ycbcr": [[81.481, 90.203, 240.0], [23.912341, 124.920035, 129.746212], [133.512824, 169.229843, 67.330588]],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_conversion_is_its_formula(name):
    pixels = torch.rand(40, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pixels[0] /= 25  # dark colours have a separate formula
    pixels[1, :2] = torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64)
    by_hand = torch.tensor([[BY_HAND[name](*colour) for colour in row] for row in pixels.tolist()], dtype=torch.float64)
    assert torch.allclose(CONVERSIONS[name](pixels), by_hand, atol=1e-10)
    assert torch.allclose(CONVERSIONS[name](pixels.float()).double(), by_hand, atol=2e-4)


@pytest.mark.parametrize("name", SCIKIT_IMAGE)
def test_a_conversion_gives_scikit_image_s_numbers(name):
    ours = CONVERSIONS[name](torch.tensor([[255, 0, 0], [12, 9, 3], [40, 170, 220]], dtype=torch.float64) / 255)
    assert torch.allclose(ours, torch.tensor(SCIKIT_IMAGE[name], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("name", BY_HAND)
def test_views_and_plain_views_are_in_it_and_normalised_in_it(name):
    """The published normalisation of Lab is (L - 50) / 50, (a - 6.025) / 92.208, (b + 6.6895) / 101.1675."""
    mean, std = [50.0, 6.025, -6.6895], [50.0, 92.208, 101.1675]
    quiet = View(scale=[1.0, 1.0], ratio=[1.0, 1.0], jitter_p=0.0, gray_p=0.0, flip_p=0.0)
    views = Views(size=6, plain_crop=1.0, views={"one": quiet}, mean=mean, std=std, colours=name)
    pixels = np.random.default_rng(1).integers(0, 256, (6, 6, 3), np.uint8)
    made = views.normalise(torch.from_numpy(views.batch_pixels([pixels], np.array([0]), 0)[0]))[0]
    by_hand = torch.tensor([[BY_HAND[name](*colour) for colour in row] for row in (pixels / 255).tolist()])
    expected = ((by_hand - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)
    assert made.dtype == torch.float32 and torch.allclose(made, expected, atol=1e-5)
    assert torch.allclose(views.plain(Image.fromarray(pixels)), expected, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_views_in_it(noise_source, workers):
    """Compiled views give bytes that are converted afterwards, because their own normalisation is for RGB."""
    source = noise_source(8)
    views = Views(size=6, views={"both": View(count=2)}, mean=[50.0, 0, 0], std=[50.0, 90, 90], colours="lab")
    (batch,) = batches(source, views, workers=workers)
    images = [np.asarray(source.image(index)) for index in batch.index.tolist()]
    made = views.batch_pixels(images, batch.index.numpy(), mixed_seed(7, 0))
    for ours, pixels in zip(batch.views, made, strict=True):
        assert torch.equal(ours, views.normalise(torch.from_numpy(pixels)))
        lab = CONVERSIONS["lab"](torch.from_numpy(pixels).double() / 255)
        assert torch.allclose(ours[:, 0].double(), (lab[..., 0] - 50) / 50, atol=1e-5)


def test_grey_has_no_colour_and_lightness_comes_first():
    grey = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None].repeat(1, 3)
    for name, middle in (("lab", 0.0), ("ydbdr", 0.0), ("ycbcr", 128.0)):
        made = CONVERSIONS[name](grey)
        assert (made[:, 1:] - middle).abs().max() < 0.02, name
        assert (made[1:, 0] > made[:-1, 0]).all()
    assert set(views_needed.LIGHTNESS_FIRST) == set(CONVERSIONS) - {"rgb"}


def test_cmc_s_views_of_table_2_are_changed_as_rgb_and_then_converted(noise_source):
    """RandAugment changes the pixels; whatever it does, the result is the YDbDr of those pixels."""
    cfg = compose(["method=cmc", "augmentation=cmc_randaugment", "augmentation.size=16"])
    views = instantiate(cfg.augmentation)
    source = noise_source(8)
    without = Views(
        size=16, views={"one": replace(views._views[0], then={})}, mean=views.mean, std=views.std, colours="ydbdr"
    )
    (batch,), (plain,) = batches(source, views, workers=0), batches(source, without, workers=0)
    images = [np.asarray(source.image(index)) for index in batch.index.tolist()]
    (made,) = views.batch_pixels(images, batch.index.numpy(), mixed_seed(7, 0))
    ydbdr = CONVERSIONS["ydbdr"](torch.from_numpy(made).double() / 255)
    expected = (ydbdr - torch.tensor([0.457, -0.082, -0.052])) / torch.tensor([0.5, 1.331, 1.333])
    assert torch.allclose(batch.views[0].double(), expected.movedim(-1, 1), atol=1e-5)
    changed = (batch.views[0] != plain.views[0]).flatten(1).any(1)
    assert changed.any() and not changed.all(), "with p = 0.5, about a quarter of the views stay as they are"
