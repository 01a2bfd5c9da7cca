"""Memory banks: their rows, which serve as positives and negatives, and the scoring of queries against the rows. With
own_loop.py a bank works in a training loop of the user's own.

Not here: the choice of which rows are positives and negatives in a loss (caco/methods/sources.py)."""
