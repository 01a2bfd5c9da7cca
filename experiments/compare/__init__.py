"""The comparison of two commits: `python -m experiments.compare --help`."""
