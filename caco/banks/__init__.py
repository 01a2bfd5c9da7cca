"""Memory banks: their rows, which serve as positives and negatives, and the scoring of queries against the rows.
own_loop.py is for training loops of the user's own.

Not here: the choice of which rows are positives and negatives in a loss (caco/methods/sources.py)."""
