"""The table of block sizes (caco/banks/kernels/cards.py): the kernels' shared memory fits every GPU in the table, and a
GPU that is not in the table gets block sizes that fit it too.
"""

import re

import pytest

from caco.banks.kernels import cards
from caco.banks.kernels.cards import TABLE, card, most_shared_kib, shared_kib

WIDTHS = [16, 32, 64, 128, 256]


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_the_shared_memory_that_its_kernels_take_fits_the_card(entry):
    for (name, bf16), blocks in entry.blocks.items():
        for width in WIDTHS:
            chosen = blocks[width > cards.WIDE]
            assert shared_kib(name, width, bf16, chosen) <= entry.shared_kib, (name, bf16, width)
            assert all(size >= 16 and size & (size - 1) == 0 for size in chosen[:2]), "the least that a product takes"
            assert chosen.warps in (1, 2, 4, 8) and chosen.stages >= 1


def test_shared_memory_by_hand():
    """With 64 queries and 32 rows of width 128, the bfloat16 kernel keeps both in bfloat16 (2 bytes), two buffers of
    float32 rows (4 bytes), and the float32 scores.
    """
    by_hand = 64 * 128 * 2 + 32 * 128 * 2 + 2 * (32 * 128 * 4) + 64 * 32 * 4
    assert shared_kib("forward", 128, True, cards.Blocks(64, 32, 4, 3)) == by_hand / 1024
    # In float32 every number is kept in two parts. The scores and rows of the second product take more memory than
    # the chunks of the first one.
    assert shared_kib("forward", 128, False, cards.Blocks(64, 32, 8, 2)) == 2 * (64 * 32 + 32 * 128) * 4 / 1024


def test_what_compiled_kernels_take_is_no_more_than_the_arithmetic_says(repo_root):
    """The numbers of compiled kernels stand in benchmarks/kernels.md, the record of benchmarks/kernels.py."""
    record = (repo_root / "benchmarks" / "kernels.md").read_text()
    line = r"\| sm_(\d+) \| (\w+) \| (bfloat16|float32) \| (\d+) \| (\d+) x (\d+) \| (\d+) \| \d+ \| \d+ \| ([\d.]+) "
    found = re.findall(line, record)
    assert len(found) >= 36
    for arch, name, factors, width, queries, rows, warps, taken in found:
        blocks = card(divmod(int(arch), 10), 99).blocks[name, factors == "bfloat16"][int(width) > cards.WIDE]
        assert blocks[:3] == (int(queries), int(rows), int(warps)), "the table has changed: measure again"
        # One KiB more is allowed, because reductions use some shared memory that the arithmetic does not count.
        assert float(taken) <= shared_kib(name, int(width), factors == "bfloat16", blocks) + 1


def test_each_card_has_its_entry_and_another_one_what_fits_its_shared_memory():
    named = {"9.0": "H100", "8.0": "A100", "8.9": "L4"}
    for capability, name in named.items():
        assert name in card(tuple(map(int, capability.split("."))), 0).name
    assert card((8, 6), 99).name == "A100" and card((12, 0), 99).name == "A100"
    assert "H100" in card((10, 3), 227).name
    for capability, kib in (((7, 5), 64), ((0, 0), 0), ((13, 0), 48)):
        assert card(capability, kib) is TABLE[-1]
    for kib in (48, 64, 99, 163, 227, 300):
        assert most_shared_kib(card((99, 0), kib)) <= kib
