"""Compare the results of two commits, bit for bit: `python -m experiments.compare --help`."""
