"""In what blocks the bank's Triton kernels work on which card: one table, and the shared memory that each entry takes.

What a card needs is a line here. Nobody has timed any of these numbers: of those for H100 and A100 it is known that no
kernel spills a register there (benchmarks/kernels.md), of L4's that they fit.

forward, nearest: a program owns a block of queries and goes over rows a block at a time. update: it owns a block of
rows and goes over queries. Products of bfloat16 take the whole width at once, those of float32 go over it in chunks.
"""

from typing import NamedTuple

WIDEST = 256  # width that the kernels are made for
WIDE = 128  # widths above it have blocks of their own
CHUNK = 32  # of float32's width


class Blocks(NamedTuple):
    queries: int
    rows: int
    warps: int
    stages: int  # of the loop: how many blocks are loaded or used at a time


Table = dict[tuple[str, bool], tuple[Blocks, Blocks]]  # kernel, whether bfloat16 -> of widths up to WIDE, and above it


class Card(NamedTuple):
    """Of a kind of cards.

    capabilities: CUDA's compute capabilities. shared_kib: most shared memory of one program.
    """

    name: str
    capabilities: tuple[tuple[int, int], ...]
    shared_kib: int
    blocks: Table


_SMALL: Table = {
    ("forward", True): (Blocks(64, 32, 4, 3), Blocks(64, 32, 8, 2)),
    ("nearest", True): (Blocks(64, 64, 8, 2), Blocks(64, 32, 8, 2)),
    ("update", True): (Blocks(64, 64, 8, 2), Blocks(64, 32, 8, 2)),
    ("forward", False): (Blocks(64, 32, 8, 2), Blocks(32, 16, 8, 2)),
    ("nearest", False): (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    ("update", False): (Blocks(64, 32, 8, 2), Blocks(16, 32, 8, 2)),
}
TABLE = (
    Card(
        "H100, H200, B200", ((9, 0), (10, 0)), 227,
        {
            ("forward", True): (Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2)),
            ("nearest", True): (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2)),
            ("update", True): (Blocks(64, 128, 8, 2), Blocks(32, 64, 8, 3)),
            ("forward", False): (Blocks(64, 32, 8, 2), Blocks(32, 16, 8, 2)),
            ("nearest", False): (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
            ("update", False): (Blocks(32, 64, 8, 2), Blocks(16, 32, 8, 2)),
        },
    ),
    Card("A100", ((8, 0),), 163, _SMALL),
    Card("L4, RTX 4090", ((8, 9),), 99, _SMALL),
    # What every card has without asking for more.
    Card(
        "any other", (), 48,
        {
            ("forward", True): (Blocks(32, 16, 4, 2), Blocks(32, 16, 4, 1)),
            ("nearest", True): (Blocks(32, 16, 4, 2), Blocks(32, 16, 4, 1)),
            ("update", True): (Blocks(32, 16, 4, 1), Blocks(32, 16, 4, 1)),
            ("forward", False): (Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1)),
            ("nearest", False): (Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
            ("update", False): (Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
        },
    ),
)  # fmt: skip


def card(capability: tuple[int, int], shared_kib: float) -> Card:
    """The entry of a card: that of its capability, else the first one whose needs its shared memory meets."""
    for entry in TABLE:
        if capability in entry.capabilities:
            return entry
    return next((entry for entry in TABLE if most_shared_kib(entry) <= shared_kib), TABLE[-1])


def most_shared_kib(entry: Card) -> float:
    """Of all its kernels, at every width."""
    return max(
        shared_kib(name, width, bf16, entry.blocks[name, bf16][width > WIDE])
        for name, bf16 in entry.blocks
        for width in (WIDE, WIDEST)
    )


def shared_kib(name: str, width: int, bf16: bool, blocks: Blocks) -> float:
    """At most so much shared memory one program of a kernel takes, counted from its blocks.

    As if the compiler kept every operand of a product there, and the scores beside them. benchmarks/kernels.py has what
    compiled kernels take: as much or less.

    Args:
        width: a power of two, of rows and queries.
    """
    queries, rows, _, stages = blocks
    scores = 4 * queries * rows
    if not bf16:
        # Both factors of a chunk, split in two (tf32x3); once these are done with, the scores and what they weigh, too.
        chunks = max(2, stages) * 4 * min(CHUNK, width) * (queries + rows)
        weighed = 4 * width * (rows if name == "forward" else queries)
        taken = chunks + scores if name == "nearest" else max(chunks, 2 * (scores + weighed))
    elif name == "update":
        # Queries that both products read where they were loaded, rows in bfloat16, and three numbers of each query.
        taken = 2 * width * (stages * queries + rows) + scores + 3 * 4 * queries * stages
    else:
        # Rows come in float32, into one place less than there are stages; the products read them in bfloat16.
        taken = 2 * width * (queries + rows) + 4 * width * rows * max(1, stages - 1) + scores
    return taken / 1024
