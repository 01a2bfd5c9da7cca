"""eval=geometry: each metric computed by hand for features with known values."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from caco.equations import rank_me
from caco.evals.geometry import Geometry, alignment, uniformity

SQUARE = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, -1.0]], dtype=torch.float64)


def test_alignment_is_the_mean_squared_distance_of_unit_features():
    other = torch.tensor([[5.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
    assert alignment(SQUARE, other) == pytest.approx((0 + 2 + 4 + 0) / 4)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_uniformity_is_over_pairs_of_different_images(block):
    # A square has twelve ordered pairs of corners: eight neighbours (squared distance 2), four opposite ones (4).
    expected = math.log((8 * math.exp(-4) + 4 * math.exp(-8)) / 12)
    assert uniformity(SQUARE, block=block) == pytest.approx(expected)
    assert uniformity(torch.ones(5, 3, dtype=torch.float64)) == pytest.approx(0.0, abs=1e-9)


def test_rank_me_counts_equal_singular_values():
    assert rank_me(torch.eye(6, dtype=torch.float64)[:, :4]).item() == pytest.approx(4, rel=1e-4)
    assert rank_me(torch.ones(6, 4, dtype=torch.float64)).item() == pytest.approx(1, rel=1e-4)


def test_spread_features_and_collapsed_ones_are_told_apart_without_labels(store_of):
    geometry = Geometry(images=16)
    geometry.build(store_of(batch=5), seed=0)
    torch.manual_seed(0)
    spread = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 8, bias=False))
    collapsed = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    with torch.no_grad():
        collapsed[1].weight.mul_(1e-6)
    good, bad = (
        {name.replace("geometry_images-16/", "geometry/"): v for name, v in geometry.run(one)}
        for one in (spread, collapsed)
    )
    assert (
        bad["geometry/mean_cosine"] > 0.999 and bad["geometry/spread"] < 0.01 and bad["geometry/dead_dimensions"] == 100
    )
    assert bad["geometry/uniformity"] == pytest.approx(0, abs=1e-3) and bad["geometry/rank_me"] == pytest.approx(
        1, abs=0.05
    )
    assert good["geometry/rank_me"] > 2 and good["geometry/dead_dimensions"] == 0
    assert good["geometry/rank_share"] == pytest.approx(good["geometry/rank_me"] / 8)

    store = geometry._store
    x = F.normalize(store.of(spread, geometry._source, store.views).double(), dim=1)
    cosines = (x @ x.T)[~torch.eye(16, dtype=torch.bool)]
    assert good["geometry/mean_cosine"] == pytest.approx(cosines.mean().item())
    assert good["geometry/spread"] == pytest.approx((x.std(0, correction=0).mean() * 8**0.5).item())


def test_alignment_pairs_two_views_of_the_same_image(store_of):
    geometry = Geometry(images=16)
    geometry.build(store_of(batch=5), seed=0)

    class Palette(nn.Module):
        """The strongest channel gives the class for every crop and jitter, so a wrong pairing of views would mix
        classes.
        """

        def forward(self, images):
            return images.mean((2, 3)) + 3

    a, b = geometry._two_views(Palette())
    assert a.shape == b.shape == (15, 3)  # three batches of five
    assert not torch.equal(a, b)
    assert alignment(a, b) < alignment(a, b.roll(1, dims=0))


def test_refuses_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="images: expected int from 2, got 1"):
        Geometry(images=1)
