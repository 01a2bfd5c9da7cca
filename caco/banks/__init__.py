"""Memory banks: rows that serve as positives and negatives, and the scores of queries against them.

For a program of one's own: `LearnableBank` and `FifoBank`, each with `loss` and `update`, and `leave_to_ranks`, for
DistributedDataParallel (caco/banks/own_loop.py). Not here: which of them a loss uses (caco/methods/sources.py)."""

from caco.banks.fifo import FifoBank
from caco.banks.learnable import LearnableBank
from caco.banks.own_loop import leave_to_ranks

__all__ = ["FifoBank", "LearnableBank", "leave_to_ranks"]
