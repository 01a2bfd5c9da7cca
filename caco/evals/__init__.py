"""Evaluators of a backbone, one file each; the features that they share, and the record of their results.

Not here: a figure or a table of several runs (analysis)."""
