"""Evaluators of a backbone, one file each; features that they share, and the record of what they found.

Not here: a figure or a table of several runs (analysis)."""
