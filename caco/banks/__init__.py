"""Memory banks: rows that serve as positives and negatives, and the scores of queries against them.

Not here: which of them a loss uses (caco/methods/sources.py)."""
