"""Every instruction set finds the same nearest row as float64, and the lowest index among equal rows, however rounding
changes rows and keys.

AVX2 and AVX-512 search in integers (caco/banks/kernels/integers.h has the bound that proves which rows can be the
nearest), AMX in bfloat16, plain in float32.
"""

import pytest
import torch
from torch.nn import functional as F

from caco import instructions
from caco.banks import nearest
from caco.banks.kernels import fused
from caco.banks.nearest import most_probable_row


@pytest.fixture(params=["plain", "avx2", "wide", "avx512", "amx"], autouse=True)
def level(request, monkeypatch):
    monkeypatch.setattr(instructions, "LEVEL", request.param)
    if (serves := instructions.used(instructions.BANK)) != request.param:
        pytest.skip(f"needs a kernel that uses {request.param}; here it is {serves}")
    return request.param


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(k, w):
    """The expected row: among the rows other than zero, the first of those whose cosine is largest in float64."""
    cosine = k.double() @ F.normalize(w.double(), dim=1).T
    cosine[:, ~(w.norm(dim=1) > 0)] = -2
    return (cosine > cosine.amax(1, keepdim=True) - 1e-12).to(torch.uint8).argmax(1)


def spread(x, seed):
    """Scale rows to norms from 2^-12 to 2^12."""
    return x * 2.0 ** torch.randint(-12, 13, (len(x), 1), generator=torch.Generator().manual_seed(seed))


# most are not a multiple of a vector register
@pytest.mark.parametrize("D", [1, 2, 3, 5, 7, 13, 16, 31, 33, 65, 130, 257])
def test_random_and_crowded_banks(D):
    """Random rows, crowds of rows around the keys, and rows with one large number, next to which all others are rounded
    coarsely.
    """
    G, K = 61, 1501
    k = F.normalize(normal(G, D, seed=D), dim=1)
    w = normal(K, D, seed=D + 1)
    crowd = torch.arange(700) % G
    w[300:1000] = k[crowd] + 10.0 ** -(torch.arange(700) % 7)[:, None] * normal(700, D, seed=D + 2) / D**0.5
    w[1000:1200, 0] = 40.0
    w[1200:1300] = w[torch.arange(100) * 3]  # equal rows at distant indices
    w = spread(F.normalize(w, dim=1), D)
    k = torch.cat([k, F.normalize(w[1000:1010], dim=1)])
    assert torch.equal(most_probable_row(k, w, 0), oracle(k, w))


def rounding(k, *, bits):
    """The rounding error of a key when its numbers become integers."""
    scale = 127 / k.abs().amax(1, keepdim=True) if bits == 8 else 32700 / k.norm(dim=1, keepdim=True)
    return k - (k * scale).round() / scale


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("D", [24, 67, 128])
def test_rows_that_rounding_puts_in_the_wrong_order(bits, D):
    """For each key there are two rows, one shifted along the key's rounding error and one as far against it. Their
    exact cosines are nearly equal, but the rounded key is nearer to the wrong row, by about the whole rounding error.
    """
    k = F.normalize(normal(24, D, seed=D).double(), dim=1).float()
    lost = rounding(k.double(), bits=bits)
    aside = F.normalize(lost - (lost * k).sum(1, keepdim=True) * k, dim=1)
    w = torch.cat([0.8 * k - 1e-6 * k - 0.6 * aside, 0.8 * k + 0.6 * aside, normal(400, D, seed=1)]).float()
    right = oracle(k, w)
    assert right.tolist() == list(range(24, 48))
    behind = ((k - lost) * F.normalize(w[:24].double(), dim=1)).sum(1) - (
        (k - lost) * F.normalize(w[24:48].double(), dim=1)
    ).sum(1)
    assert (behind > 0.9 * lost.norm(dim=1)).all(), (
        "rounding must change the order of each key's rows, or the test would prove nothing"
    )
    assert torch.equal(most_probable_row(k, w, 0), right)


def test_shards_choose_as_the_whole_bank_does():
    """The best of the ranks' most probable rows (the first among equals) is the most probable of all rows."""
    k, w = F.normalize(normal(40, 37, seed=1), dim=1), normal(1000, 37, seed=2)
    w[[333, 334, 700]] = w[20].clone()
    k[:3] = F.normalize(w[[20, 20, 333]], dim=1)
    cuts = [0, 5, 333, 701, 1000]
    rows = torch.stack([most_probable_row(k, w[a:b], a) for a, b in zip(cuts, cuts[1:], strict=False)])
    cosine = (k.double() * F.normalize(w[rows].double(), dim=2)).sum(2)
    best = torch.where(cosine > cosine.amax(0) - 1e-12, rows, 1000).amin(0)
    assert torch.equal(best, oracle(k, w)) and best[:3].tolist() == [20, 20, 20]


def test_degenerate_banks():
    k = F.normalize(normal(20, 19, seed=1), dim=1)
    w = normal(700, 19, seed=2)
    w[::3] = 0.0  # zero rows have no direction and must never be chosen
    w[5], w[7] = float("inf"), float("nan")
    rows = w.clone()
    rows[[5, 7]] = 0.0
    assert torch.equal(most_probable_row(k, w, 0), oracle(k, rows))
    assert torch.equal(most_probable_row(-k[:1].repeat(3, 1), k[:1] * 7, 0), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(most_probable_row(k, w[[5]].repeat(300, 1) * 0 + 1, 0), torch.zeros(20, dtype=torch.int64))
    opposite = torch.cat([torch.zeros(40, 19), -k[:1], torch.zeros(40, 19)])  # all cosines are below 0
    assert most_probable_row(k[:1], opposite, 0).tolist() == [40]
    # any row is allowed, but the search must end
    for spoilt in (torch.zeros(2, 19), torch.full((2, 19), float("nan"))):
        assert most_probable_row(spoilt, w, 0).lt(700).all()


def test_few_rows_are_left_to_float64(monkeypatch):
    """A search with a weak bound would be slow and not wrong, so this checks that no key amid random rows is searched
    for again.
    """
    monkeypatch.setattr(nearest, "_search_exactly", None)
    k, w = F.normalize(normal(50, 128, seed=1), dim=1), normal(20000, 128, seed=2)
    assert torch.equal(most_probable_row(k, w, 0), oracle(k, w))
    value, row, error = fused.nearest(k, w)
    assert ((value[:, 1:] >= value[:, :1] - 2 * error[:, None]) & (row[:, 1:] >= 0)).float().mean() < 0.2
