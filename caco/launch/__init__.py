"""Runs that start elsewhere or several at once: sweeps on this machine or in SLURM's queue, and the copy of the code
they run.

Not here: what a run does once it has started (caco/train.py)."""
