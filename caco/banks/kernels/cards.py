"""The block sizes of the bank's Triton kernels for each kind of GPU (card), in one table, and the shared memory that
they need.

To give a new GPU block sizes of its own, add an entry to TABLE. Nobody has timed any of these sizes. Compiled for H100
and A100 they spill no register, and for L4 and RTX 4090 at most 8 bytes per thread (benchmarks/kernels.md).

In the kernels `forward` and `nearest`, a program owns a block of queries and goes over the rows block by block. In
`update`, a program owns a block of rows and goes over the queries. A product of bfloat16 factors takes the whole width
at once; a product of float32 factors goes over the width in chunks.
"""

from typing import NamedTuple

WIDEST = 256  # the largest width D of rows and queries that the kernels can take
WIDE = 128  # widths above this one have block sizes of their own
CHUNK = 32  # so much of the width a product of float32 factors takes at a time


class Blocks(NamedTuple):
    queries: int  # in a block
    rows: int  # in a block
    warps: int  # of a program; Triton's num_warps
    stages: int  # how many blocks of the loop are in shared memory at a time, being loaded or used; Triton's num_stages


# (name of the kernel, whether the factors are bfloat16) -> (blocks for widths up to WIDE, blocks for larger widths)
Table = dict[tuple[str, bool], tuple[Blocks, Blocks]]


class Card(NamedTuple):
    """A kind of GPU and the block sizes that the kernels use on it."""

    name: str
    capabilities: tuple[tuple[int, int], ...]  # CUDA's compute capabilities of these GPUs, as (major, minor)
    shared_kib: int  # KiB of shared memory that one program can use at most
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
    # Every CUDA GPU gives a program 48 KiB of shared memory without a special request.
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
    """The table's entry for a GPU: the entry that lists its compute capability, otherwise the first entry whose kernels
    fit into its shared memory, otherwise the last entry.

    Args:
        capability: CUDA's compute capability, as (major, minor).
        shared_kib: KiB of shared memory that one program can use at most.
    """
    for entry in TABLE:
        if capability in entry.capabilities:
            return entry
    return next((entry for entry in TABLE if most_shared_kib(entry) <= shared_kib), TABLE[-1])


def most_shared_kib(entry: Card) -> float:
    """KiB of shared memory that the entry's most demanding kernel needs, over all widths."""
    return max(
        shared_kib(name, width, bf16, entry.blocks[name, bf16][width > WIDE])
        for name, bf16 in entry.blocks
        for width in (WIDE, WIDEST)
    )


def shared_kib(name: str, width: int, bf16: bool, blocks: Blocks) -> float:
    """An estimate from above, computed from the block sizes, of the KiB of shared memory that one program needs.

    The estimate assumes that the compiler keeps every factor of a product in shared memory, and the scores too.
    benchmarks/kernels.py measures compiled kernels; tests/banks/test_cards.py checks that they need no more, up to 1
    KiB.

    Args:
        name: the kernel: "forward", "nearest" or "update".
        width: of rows and queries, rounded up to a power of two.
        bf16: whether the factors are bfloat16; otherwise they are float32.
        blocks: the block sizes.
    """
    queries, rows, _, stages = blocks
    scores = 4 * queries * rows
    if not bf16:
        # tf32x3 splits each factor in two. First come the chunks of queries and rows; `forward` and `update` then reuse
        # the memory for their second product, whose factors are the scores and the vectors that the scores weight.
        chunks = max(2, stages) * 4 * min(CHUNK, width) * (queries + rows)
        weighed = 4 * width * (rows if name == "forward" else queries)
        taken = chunks + scores if name == "nearest" else max(chunks, 2 * (scores + weighed))
    elif name == "update":
        # The queries, which both products read where they were loaded; the rows, in bfloat16; the scores; and three
        # numbers of 4 bytes for each query.
        taken = 2 * width * (stages * queries + rows) + scores + 3 * 4 * queries * stages
    else:
        # The rows are loaded in float32, into one buffer less than there are stages; the products read them, like the
        # queries, in bfloat16.
        taken = 2 * width * (queries + rows) + 4 * width * rows * max(1, stages - 1) + scores
    return taken / 1024
