"""Memory banks: rows that serve as positives and negatives, and the scores of queries against them; own_loop.py: for
anyone's own loop.

Not here: which of them a loss uses (caco/methods/sources.py)."""
